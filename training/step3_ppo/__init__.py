"""Step 3: PPO."""
