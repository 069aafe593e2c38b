"""Commands around the three steps."""
