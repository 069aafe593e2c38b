"""``python -m training.step1_sft.prompt_eval`` runs training/evaluate/side_by_side.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("training.evaluate.side_by_side", run_name="__main__")
