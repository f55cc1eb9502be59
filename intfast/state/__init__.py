"""What keeps a run honest on a disk: durable files, journals, checkpoints, stops, metrics."""
