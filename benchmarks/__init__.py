"""Measurements; results go to RESULTS.md."""
