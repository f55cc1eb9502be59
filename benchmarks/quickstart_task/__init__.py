"""The quickstart: a procedural reasoning task and the small base model that is trained on it."""
