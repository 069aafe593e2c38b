"""The memory of a run, computed before it starts."""
