"""Trained models for other programs: merged, in another dtype, in shards, as GGUF."""
