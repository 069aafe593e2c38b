#!/usr/bin/env bash
# "auto", the word of transformers' DeepSpeed files, is taken by DeepSpeed itself too: as the default, which is off for bf16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools==84.2.1
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
DS_ACCELERATOR=cpu "$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
from importlib.metadata import version

from deepspeed.runtime.config import DeepSpeedConfig

print("deepspeed", version("deepspeed"))
written = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}, "zero_optimization": {"stage": "auto"}}
read = DeepSpeedConfig({"train_batch_size": 1, "gradient_clipping": "auto", **written})
found = [read.bfloat16_config.enabled, read.float16_config.enabled, read.zero_optimization_stage, read.gradient_clipping]
for name, value in zip(("bf16.enabled", "fp16.enabled", "zero_optimization.stage", "gradient_clipping"), found, strict=True):
    print(f'{name}: written "auto", read {value!r}')
same = found == [False, False, 0, "auto"]
print("as found: float32 and ZeRO 0 without an error, a text where a number belongs" if same else "CHANGED")
raise SystemExit(not same)
PY
