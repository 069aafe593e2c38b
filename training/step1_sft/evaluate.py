"""``python -m training.step1_sft.evaluate`` runs training/evaluate/bleu_rouge.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("training.evaluate.bleu_rouge", run_name="__main__")
