#!/usr/bin/env bash
# A key that does not exist is an error inside a section of a DeepSpeed config, and passed over at its top level.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools==84.2.1
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
DS_ACCELERATOR=cpu "$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
from importlib.metadata import version

from deepspeed.runtime.config import DeepSpeedConfig


def reads(**config):
    """What DeepSpeed says of a config."""
    try:
        DeepSpeedConfig({"train_batch_size": 1, **config})
    except Exception as error:
        return type(error).__name__
    return "accepted"


print("deepspeed", version("deepspeed"))
found = {
    "gradient_cliping at the top": reads(gradient_cliping=0.5),
    "stagee in zero_optimization": reads(zero_optimization={"stagee": 1}),
}
for key, answer in found.items():
    print(f"{key}: {answer}")
same = list(found.values()) == ["accepted", "ValidationError"]
print("as found: only the section is checked" if same else "CHANGED")
raise SystemExit(not same)
PY
