"""``python -m scripts.pod`` runs scripts/kubernetes/pod.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("scripts.kubernetes.pod", run_name="__main__")
