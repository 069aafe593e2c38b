"""The demo: a closed world or SmolLM2 through all three steps."""
