"""Answers found and compared, in processes that can be killed."""
