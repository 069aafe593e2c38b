"""DeepSpeed: configurations, the optimizer step, whole weights, checkpoints."""
