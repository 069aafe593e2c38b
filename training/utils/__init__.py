"""What the three steps share: flags, data, engine, checkpoints, metrics."""
