#!/usr/bin/env bash
# trust_remote_code on a local folder imports the configuration file twice: the config that AutoConfig gives is no instance of
# the class that the network's own file imports from the same file. From the hub both come from one module.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
mkdir "$folder/model"
cat >"$folder/model/configuration_own.py" <<'PY'
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own"
PY
cat >"$folder/model/modeling_own.py" <<'PY'
import torch
from transformers import PreTrainedModel

from .configuration_own import OwnConfig


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.known = isinstance(config, OwnConfig)
        self.layer = torch.nn.Linear(2, 2)
        self.post_init()
PY
echo '{"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}}' \
  >"$folder/model/config.json"
HF_HUB_OFFLINE=1 HF_MODULES_CACHE="$folder/modules" "$folder/venv/bin/python" - "$folder/model" 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
import sys
from importlib.metadata import version

from transformers import AutoConfig, AutoModel

config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_config(config, trust_remote_code=True)
print("transformers", version("transformers"))
for one in (type(config), model.config_class):
    print(one.__module__, one.__name__)
print("isinstance(config, OwnConfig) inside the network:", model.known)
same = type(config).__name__ == model.config_class.__name__ and not model.known
print("as found: two classes of one name" if same else "CHANGED")
raise SystemExit(not same)
PY
