"""LoRA, prefixes, the shared trunk, quantised bases."""
