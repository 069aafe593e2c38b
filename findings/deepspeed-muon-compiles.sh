#!/usr/bin/env bash
# A ZeRO engine of DeepSpeed imports its Muon whatever the optimizer is, and with it TorchInductor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools==84.2.1
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29788 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
import sys
import time
from importlib.metadata import version

import deepspeed
import torch
from deepspeed.runtime import engine

checked, seconds = engine.is_zero_supported_optimizer, []


def timed(optimizer):
    begin = time.process_time()
    supported = checked(optimizer)
    seconds.append(time.process_time() - begin)
    return supported


def imported():
    wanted = ("torch._inductor", "deepspeed.runtime.zero.muon.muon_optimizer")
    return [name for name in wanted if name in sys.modules]


engine.is_zero_supported_optimizer = timed
# Another matter: an operator for collectives that DeepSpeed would compile for half a minute.
vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
model, before = torch.nn.Linear(4, 4), imported()
config = {"train_batch_size": 1, "zero_optimization": {"stage": 1}}
deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
print("deepspeed", version("deepspeed"))
print("imported before the engine:", before)
print("imported by a ZeRO-1 engine with torch's AdamW:", imported())
print(f"CPU seconds of its check that AdamW is supported: {sum(seconds):.1f}")
same = not before and len(imported()) == 2 and sum(seconds) > 0.3
print("as found: a compiler is imported, and not used" if same else "CHANGED")
raise SystemExit(not same)
PY
