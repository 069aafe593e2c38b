#!/usr/bin/env bash
# A universal checkpoint loaded under ZeRO-3 gives every parameter group the learning rate and weight decay of the first one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools==84.2.1
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
cat >"$folder/groups.py" <<'PY'
import os
import sys
from importlib.metadata import version

import torch

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29731")
import deepspeed
from deepspeed.checkpoint.ds_to_universal import main as convert
from deepspeed.checkpoint.ds_to_universal import parse_arguments


def engine(stage, universal):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    matrices = {"params": list(model[0].parameters()), "lr": 1e-3, "weight_decay": 0.1}
    norms = {"params": list(model[1].parameters()), "lr": 1e-2, "weight_decay": 0.0}
    config = {"train_batch_size": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    config["checkpoint"] = {"load_universal": universal}
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW([matrices, norms]), config=config)[0]


def groups(made):
    return [(group["lr"], group["weight_decay"]) for group in made.optimizer.param_groups]


found = {}
print("deepspeed", version("deepspeed"))
for stage in (2, 3):
    made = engine(stage, False)
    made.backward(made(torch.randn(2, 4)).square().sum())
    made.step()
    made.save_checkpoint(f"saved-{stage}", tag="t")
    sys.argv = ["", "--input_folder", f"saved-{stage}/t", "--output_folder", f"universal-{stage}/t", "--inject_missing_state"]
    sys.argv += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    convert(parse_arguments())
    loaded = engine(stage, True)
    loaded.load_checkpoint(f"universal-{stage}", tag="t")
    found[stage] = groups(loaded)
    print(f"ZeRO-{stage}: (lr, weight_decay) of the groups: saved {groups(made)}, loaded {found[stage]}")
same = found == {2: [(1e-3, 0.1), (1e-2, 0.0)], 3: [(1e-3, 0.1), (1e-3, 0.1)]}
print("as found: under ZeRO-3 norms get the matrices' rate and weight decay" if same else "CHANGED")
raise SystemExit(not same)
PY
cd "$folder"
OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu "$folder/venv/bin/python" groups.py >"$folder/out" 2>"$folder/log" || { tail -n 5 "$folder/log"; grep -E "^deepspeed|^ZeRO|CHANGED" "$folder/out"; exit 1; }
grep -E "^deepspeed|^ZeRO|^as found" "$folder/out"
