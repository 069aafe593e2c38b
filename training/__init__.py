"""The three training steps and what they share."""
