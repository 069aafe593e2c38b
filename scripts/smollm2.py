"""``python -m scripts.smollm2`` runs scripts/demo/smollm2.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("scripts.demo.smollm2", run_name="__main__")
