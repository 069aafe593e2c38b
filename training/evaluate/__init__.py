"""Evaluate trained models: two models side by side, reward scores, and what scripts.evaluate measures with."""
