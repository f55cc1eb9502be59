"""What keeps a run honest: durable files, stops, faults, parity, hostile text and models."""
