"""The Jinja chat template that a saved tokenizer carries, so that transformers and servers write dialogues as we train on them.

What such a template cannot do: a text that spells a special token ("</s>", "<|user|>") becomes that token.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

# The reasoning templates (Qwen3, GLM-4.5) then put an empty thought into the prompt, as in training.
NO_THOUGHT = "{% set enable_thinking = false %}"

HUMAN_ASSISTANT = """
{{- OPENING -}}
{%- for message in messages -%}
    {%- if loop.first -%}{{- FIRST_GAP -}}{%- elif messages[loop.index0 - 1].role == "assistant" -%}{{- GAP -}}{%- endif -%}
    {%- if message.role == "assistant" -%}{{- "\\n\\nAssistant: " + message.content + END -}}
    {%- elif message.role == "user" -%}{{- "\\n\\nHuman: " + message.content -}}
    {%- elif message.role == "system" -%}{{- ("" if loop.first else "\\n\\n") + message.content -}}
    {%- else -%}{{- raise_exception("no role " + message.role + " here: system, user and assistant") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if messages and messages[-1].role == "assistant" -%}{{- GAP -}}{%- endif -%}{{- "\\n\\nAssistant:" -}}
{%- endif -%}
"""


def fill(jinja: str, values: dict[str, Any]) -> str:
    """Return a template with the names in it replaced by their values, on one line: no line break of ours is rendered."""
    for name, value in values.items():
        jinja = jinja.replace(name, json.dumps(value, ensure_ascii=False))
    return "".join(line.strip() for line in jinja.splitlines())


def own_template(existing: Any, prompt_suffix: str) -> Any:
    """Return the tokenizer's own chat template (or its several, by name) with what training adds to it."""
    if isinstance(existing, dict):
        return {name: own_template(one, prompt_suffix) for name, one in existing.items()}
    if "enable_thinking" in existing and not existing.startswith(NO_THOUGHT):
        existing = NO_THOUGHT + existing
    if prompt_suffix:  # jinja drops a line break at the end of a template
        written = json.dumps(prompt_suffix, ensure_ascii=False)
        existing = existing.removesuffix("\n") + "{{ " + written + " if add_generation_prompt else '' }}"
    return existing


def human_assistant(
    tokenizer: Any, prefix_ids: Sequence[int], end_id: int, encode: Callable[..., list[list[int]]]
) -> str:
    """Return the Human/Assistant form as a chat template. encode: templates.encode_texts.

    Each block is tokenised by itself in training. SentencePiece tokenizers that put a space only before the first text of a
    string do it there before every block, and not behind a special token of one rendered text: the template writes it then.
    """
    opening, end = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (list(prefix_ids), [end_id]))
    block = "\n\nHuman: a"
    alone = encode(tokenizer, [block], literal=True)[0]

    def gap(before: str, ids: Sequence[int]) -> str:
        joined = encode(tokenizer, [before + block, f"{before} {block}"])
        return " " if [*ids, *alone] == joined[1] != joined[0] else ""

    first_gap, later_gap = gap(opening, prefix_ids), gap(end, [end_id])
    return fill(HUMAN_ASSISTANT, {"OPENING": opening, "FIRST_GAP": first_gap, "GAP": later_gap, "END": end})
