#!/usr/bin/env bash
# With pad_token = eos_token, as GPT-2's users set it, a classifier scores the token before a text's end token.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - "$folder" 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
import sys
from importlib.metadata import version

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

torch.manual_seed(0)
end = 49
config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=end, eos_token_id=end)
model = GPT2ForSequenceClassification(config).eval()
text = torch.tensor([[5, 6, 7, end]])
mask = torch.ones_like(text)   # four real tokens, no padding
with torch.no_grad():
    everywhere = model.score(model.transformer(text, attention_mask=mask).last_hidden_state)[0, :, 0]
    score = model(text, attention_mask=mask).logits[0, 0]
print("transformers", version("transformers"))
print("scores at the four tokens:", [round(float(value), 4) for value in everywhere], " returned:", round(float(score), 4))
same = torch.equal(score, everywhere[2]) and not torch.equal(score, everywhere[3])
print("as found: the mask is not looked at" if same else "CHANGED: another token is scored")
sys.exit(not same)
PY
