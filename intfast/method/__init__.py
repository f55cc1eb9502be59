"""Behind intervene.py and learn.py: replies read, waves, rivals' data, credit inside rollouts."""
