"""``python -m scripts.flags_table`` runs scripts/docs/flags_table.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("scripts.docs.flags_table", run_name="__main__")
