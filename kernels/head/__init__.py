"""What the three ops on the loss head share: its plan, its chunks of rows, and the three paths."""
