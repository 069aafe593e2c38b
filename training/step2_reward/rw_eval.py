"""``python -m training.step2_reward.rw_eval`` runs training/evaluate/reward_scores.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("training.evaluate.reward_scores", run_name="__main__")
