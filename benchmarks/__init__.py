"""Measurements; figures go to RESULTS.md."""
