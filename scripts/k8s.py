"""``python -m scripts.k8s`` runs scripts/kubernetes/__main__.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("scripts.kubernetes.__main__", run_name="__main__")
