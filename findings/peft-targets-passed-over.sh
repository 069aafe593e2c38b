#!/usr/bin/env bash
# A LoRA target that matches no module is an error alone, and passed over beside one that matches.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
import sys
import warnings
from importlib.metadata import version

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print("peft", version("peft"), "transformers", version("transformers"))
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def adapted(*targets):
    """The modules that get an adapter, and whether a warning names a target; or the name of the error."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            tuned = get_peft_model(model, LoraConfig(r=2, target_modules=list(targets)))
        except ValueError as error:
            return type(error).__name__
    modules = sorted({name.split(".")[-4] for name, weight in tuned.named_parameters() if weight.requires_grad})
    return modules, any(target in str(one.message) for one in warned for target in targets)


alone, beside = adapted("v_porj"), adapted("q_proj", "v_porj")
print("v_porj alone:", alone)
print("q_proj and v_porj:", beside[0], "- warned" if beside[1] else "- not a word about the other")
same = isinstance(alone, str) and beside == (["q_proj"], False)
print("as found: half of the adapters are missing" if same else "CHANGED")
sys.exit(not same)
PY
