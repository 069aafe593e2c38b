"""VADER's score under its former path: --reward_function scripts/smollm2_score.py:vader (scripts/demo/smollm2_score.py)."""

from scripts.demo.smollm2_score import vader  # noqa: F401
