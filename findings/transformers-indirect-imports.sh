#!/usr/bin/env bash
# trust_remote_code on a local folder in transformers 5.0.0: a file that is imported by an imported file is not found, though it
# lies in the folder. Newer versions find it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.0.0
mkdir "$folder/model"
printf 'from transformers import PretrainedConfig\n\nfrom .near import SIZE\n\n\nclass OwnConfig(PretrainedConfig):\n    size = SIZE\n' \
  >"$folder/model/configuration_own.py"
printf 'from .far import SIZE\n' >"$folder/model/near.py"
printf 'SIZE = 3\n' >"$folder/model/far.py"
echo '{"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}' >"$folder/model/config.json"
HF_HUB_OFFLINE=1 HF_MODULES_CACHE="$folder/modules" "$folder/venv/bin/python" - "$folder/model" 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
import sys
from importlib.metadata import version
from pathlib import Path

from transformers import AutoConfig

print("transformers", version("transformers"), "with", sorted(file.name for file in Path(sys.argv[1]).iterdir()))
try:
    print("opened, size", AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).size)
    same = False
except FileNotFoundError as error:
    print("FileNotFoundError:", Path(error.filename).name)
    same = error.filename.endswith("far.py")
print("as found: the file that near.py imports is missed" if same else "CHANGED")
raise SystemExit(not same)
PY
