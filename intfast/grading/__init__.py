"""Behind grade.py: answers found and compared, in processes that can be killed; regrading."""
