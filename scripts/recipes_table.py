"""``python -m scripts.recipes_table`` runs scripts/docs/recipes_table.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("scripts.docs.recipes_table", run_name="__main__")
