#!/usr/bin/env bash
# A column whose texts all look like dates comes back as datetime objects: an answer is no text any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check datasets==5.2.0
"$folder/venv/bin/python" - "$folder" 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
import json
import sys
from importlib.metadata import version
from pathlib import Path

from datasets import load_dataset

file = Path(sys.argv[1], "rows.jsonl")
rows = [{"prompt": "On which day?", "answer": day} for day in ("2023-01-05", "2024-02-29")]
file.write_text("".join(json.dumps(row) + "\n" for row in rows))
data = load_dataset("json", data_files=str(file), split="train", cache_dir=sys.argv[1])
print("datasets", version("datasets"), data.features)
print("written:", repr(rows[0]["answer"]), " read:", repr(data[0]["answer"]))
same = type(data[0]["answer"]).__name__ == "datetime"
print("as found" if same else "CHANGED: the text is read as a text")
sys.exit(not same)
PY
