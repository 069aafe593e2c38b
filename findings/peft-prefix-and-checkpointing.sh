#!/usr/bin/env bash
# A prefix (P-Tuning v2) trains until activation checkpointing is on; then the forward fails inside attention.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - "$folder" 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
import sys
from importlib.metadata import version

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print("peft", version("peft"), "transformers", version("transformers"))
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
ids = torch.arange(10)[None]
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
tuned(**batch).loss.backward()
print("without checkpointing the prefix has a gradient:", any(p.grad is not None for p in tuned.parameters()))
tuned.train()
tuned.base_model.activation_checkpointing_enable()
try:
    tuned(**batch)
    said = ""
except RuntimeError as error:
    said = str(error)
print("with it:", said or "a loss")
same = "must match the size" in said
print("as found: the cache that holds the prefix is dropped, its mask is not" if same else "CHANGED")
sys.exit(not same)
PY
