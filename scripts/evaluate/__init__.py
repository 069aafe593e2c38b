"""python -m scripts.evaluate: a model, and the one before training beside it, measured on the same records."""
