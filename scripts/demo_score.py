"""The demo's gold rule under its former path: --reward_function scripts/demo_score.py:reward (scripts/demo/score.py)."""

import sys

from scripts.demo.score import main, reward  # noqa: F401

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
