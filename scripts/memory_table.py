"""``python -m scripts.memory_table`` runs scripts/docs/memory_table.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("scripts.docs.memory_table", run_name="__main__")
