"""Intervention Training and outcome-reward RL. Importing this loads neither torch nor vLLM."""

__version__ = "0.1.0"
