"""The demo's gold rule under its former path: --reward_function scripts/demo_score.py:reward (scripts/demo/score.py)."""

from scripts.demo.score import reward  # noqa: F401
