"""``python -m scripts.make_demo_data`` runs scripts/demo/make_data.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("scripts.demo.make_data", run_name="__main__")
