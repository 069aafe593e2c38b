#!/usr/bin/env bash
# transformers reads a GGUF without two of its sizes: Qwen3's width of a head and GPT-2's positions stay at the classes' defaults.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0
"$folder/venv/bin/python" - "$folder" 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
import sys
from importlib.metadata import version

from gguf import GGUFWriter
from transformers import AutoConfig

print("transformers", version("transformers"), "gguf", version("gguf"))


def read(arch):
    """Return the config of a GGUF with 256 positions and, in a hidden size of 32, 4 heads of 16."""
    writer = GGUFWriter(f"{sys.argv[1]}/{arch}.gguf", arch)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_context_length(256)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return AutoConfig.from_pretrained(sys.argv[1], gguf_file=f"{arch}.gguf")


head, positions = read("qwen3").head_dim, read("gpt2").n_positions
print("qwen3: attention.key_length 16, config.head_dim", head)
print("gpt2: context_length 256, config.n_positions", positions)
same = (head, positions) == (128, 1024)
print("as found: the defaults of the classes, whatever the file says" if same else "CHANGED")
sys.exit(not same)
PY
