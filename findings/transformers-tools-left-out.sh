#!/usr/bin/env bash
# A chat template that does not know tools leaves the tools and the calls out of the text, without an error or a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 Jinja2==3.1.6
"$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { tail -n 5 "$folder/log"; exit 1; }
from importlib.metadata import version

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
tools = [{"type": "function", "function": {"name": "weather", "description": "Tell the weather.", "parameters": parameters}}]
call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
dialogue = [
    {"role": "user", "content": "Weather in Lima?"},
    {"role": "assistant", "content": "", "tool_calls": [call]},
    {"role": "tool", "name": "weather", "content": "18 degrees"},
]
text = tokenizer.apply_chat_template(dialogue, tools=tools, tokenize=False)
print("transformers", version("transformers"))
print("text to learn from:", text)
same = text == "<user>Weather in Lima?<assistant><tool>18 degrees"
print("as found: tools and call are gone" if same else "CHANGED")
raise SystemExit(not same)
PY
