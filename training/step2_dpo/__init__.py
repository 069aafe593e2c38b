"""DPO: the SFT model learns from pairs directly, in place of steps 2 and 3."""
