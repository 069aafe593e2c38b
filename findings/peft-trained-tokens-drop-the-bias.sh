#!/usr/bin/env bash
# trainable_token_indices on an output matrix with a bias: the bias is gone from the logits before anything is trained.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import PhiConfig, PhiForCausalLM

print("peft", version("peft"), "transformers", version("transformers"))
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = PhiForCausalLM(PhiConfig(vocab_size=50, **sizes)).eval()
with torch.no_grad():
    model.lm_head.bias.normal_()
    bias, ids = model.lm_head.bias.clone(), torch.arange(10)[None]
    before = model(input_ids=ids).logits
    rows = {"embed_tokens": [48, 49], "lm_head": [48, 49]}
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows)).eval()
    after = adapted(input_ids=ids).logits
    gap, without = (before - after).abs().max().item(), (before - bias - after).abs().max().item()
print(f"fresh adapter: logits moved by {gap:.2f}; from logits without the bias they differ by {without:.0e}")
same = gap > 0.1 and without < 1e-5
print("as found: the bias is left out" if same else "CHANGED")
raise SystemExit(not same)
PY
