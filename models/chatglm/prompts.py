"""How the three generations of ChatGLM write a dialogue, and what they add when they show an answer.

ChatGLM-6B    the bare question, or numbered rounds "[Round i]\\n问：...\\n答：..." from 0; every prompt ends in [gMASK] <sop>,
              behind which the network writes; an answer ends in <eop>. The published fine-tuning (P-Tuning) also has
              [gMASK] learn to be followed by <sop>; here <sop> is part of the prompt, and not learned.
ChatGLM2-6B   [gMASK] sop, then rounds "[Round i]\\n\\n问：...\\n\\n答：..." from 1, a single question too. An answer ends in
              </s> where it is learned; in the history it ends in "\\n\\n".
ChatGLM3-6B   [gMASK] sop, then <|role|>, a line of metadata and the content of each message. Metadata is the name of a tool
              where the assistant calls one ("metadata" of the message), else the line is empty: an answer begins with a
              line break. It ends with </s> where it is learned; in the history the next role token ends it.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from errors import UserError
from models.chat_templates import fill

Messages = Sequence[dict[str, Any]]

CJK = "[\u4e00-\u9fff]"
BESIDE_CJK = re.compile(f"(?<={CJK})[,!:;?]|[,!:;?](?={CJK})")
FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")
ROLES = ("system", "user", "assistant", "observation")  # of ChatGLM3
# ChatGLM3's published prompt
CHATGLM3_TOOLS = "Answer the following questions as best as you can. You have access to the following tools:"


@dataclass(frozen=True)
class Prompts:
    """A generation's form of dialogue.

    opening, closing: tokens around every prompt. stops: tokens that end an answer, the first in training.
    encode_dialogues: tokens of each dialogue up to where the answer begins, without opening and closing.
    encode_answers: tokens of each answer, without the stop. clean_reply: a generated answer as the original shows it.
    """

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    stops: tuple[str, ...]
    encode_dialogues: Callable[[Any, Sequence[Messages]], list[list[int]]]
    encode_answers: Callable[[Any, Sequence[str]], list[list[int]]]
    clean_reply: Callable[[str], str]


# --- numbered rounds: ChatGLM-6B and ChatGLM2-6B ----------------------------------------------------------------------


def rounds(messages: Messages) -> tuple[list[tuple[str, str]], str]:
    """Return [(question, answer), ...] of the earlier turns, and the last question.

    There is no place for a system message: its text and a line break go in front of the question behind it. Questions
    that follow each other are joined by a line break. Raises UserError for other roles, and if no question is last.
    """
    history, waiting = [], []
    for message in messages:
        role, content = message["role"], message["content"]
        if role in ("system", "user"):
            waiting.append(content)
        elif role == "assistant":
            history.append(("\n".join(waiting), content))
            waiting = []
        else:
            raise UserError(f"ChatGLM's dialogues have no role {role!r}; expected system, user and assistant.")
    if not messages or messages[-1]["role"] != "user":
        raise UserError("a dialogue must end with a user message, which ChatGLM is to answer.")
    return history, "\n".join(waiting)


def write_rounds(messages: Messages, *, gap: str, first: int, bare: bool) -> str:
    """Return the text of a dialogue up to where the answer begins.

    gap: between the lines of a round. first: the number of the first round. bare: a single question stands alone.
    """
    history, question = rounds(messages)
    if bare and not history:
        return question
    turns = [f"问：{asked}{gap}答：{answer}{gap}" for asked, answer in history] + [f"问：{question}{gap}答："]
    return "".join(f"[Round {number}]{gap}{turn}" for number, turn in enumerate(turns, first))


def encode_rounds(tokenizer: Any, dialogues: Sequence[Messages], **form: Any) -> list[list[int]]:
    """Prompts.encode_dialogues of ChatGLM-6B and ChatGLM2-6B; form as in write_rounds."""
    return tokenizer.encode_plain([write_rounds(messages, **form) for messages in dialogues])


def encode_plain_answers(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """Prompts.encode_answers of ChatGLM-6B and ChatGLM2-6B."""
    return tokenizer.encode_plain(answers)


def clean_reply(text: str) -> str:
    """Return a generated answer with the date of training filled in, as the originals do."""
    return text.strip().replace("[[训练时间]]", "2023年")


def clean_punctuation(text: str) -> str:
    """As clean_reply; punctuation that SentencePiece made ASCII becomes full-width again beside a Chinese character."""
    return BESIDE_CJK.sub(lambda mark: mark[0].translate(FULL_WIDTH), clean_reply(text))


# --- roles: ChatGLM3-6B -----------------------------------------------------------------------------------------------


def heading_and_content(message: dict[str, Any]) -> tuple[str, str]:
    """Return the two texts of a message. "tools" of a system message, a list of descriptions, stand behind its content."""
    content = message["content"]
    if message.get("tools"):
        content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    return f"{message.get('metadata') or ''}\n", content


def encode_roles(tokenizer: Any, dialogues: Sequence[Messages]) -> list[list[int]]:
    """Prompts.encode_dialogues of ChatGLM3-6B.

    Raises UserError for roles that ChatGLM3 does not have, and if the assistant itself spoke last.
    """
    for messages in dialogues:
        odd = next((message["role"] for message in messages if message["role"] not in ROLES), None)
        if odd is not None:
            raise UserError(f"ChatGLM3's dialogues have no role {odd!r}; expected one of {', '.join(ROLES)}.")
        if not messages or messages[-1]["role"] == "assistant":
            raise UserError("a dialogue must end with a message that ChatGLM3 is to answer, not with its own.")
    texts = [text for messages in dialogues for message in messages for text in heading_and_content(message)]
    encoded = iter(tokenizer.encode_plain(texts))
    rows = []
    for messages in dialogues:
        row: list[int] = []
        for message in messages:
            role = tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")
            row += [role, *next(encoded), *next(encoded)]
        rows.append(row)
    return rows


def encode_answers_behind_heading(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """Prompts.encode_answers of ChatGLM3-6B: each behind its empty line of metadata."""
    heading, *encoded = tokenizer.encode_plain(["\n", *answers])
    return [heading + ids for ids in encoded]


# --- the same as chat templates ---------------------------------------------------------------------------------------

ROUNDS_JINJA = """
{%- set ns = namespace(number=FIRST, waiting="", asked=false) -%}
{{- OPENING -}}
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {{- "[Round " ~ ns.number ~ "]" ~ GAP ~ "问：" ~ ns.waiting ~ GAP ~ "答：" ~ message.content ~ GAP -}}
        {%- set ns.number = ns.number + 1 -%}{%- set ns.waiting = "" -%}{%- set ns.asked = false -%}
    {%- elif message.role in ["system", "user"] -%}
        {%- set ns.waiting = ns.waiting + ("\\n" if ns.asked else "") + message.content -%}{%- set ns.asked = true -%}
    {%- else -%}{{- raise_exception("ChatGLM's dialogues have no role " + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if ns.asked and BARE and ns.number == FIRST -%}{{- ns.waiting -}}
{%- elif ns.asked -%}{{- "[Round " ~ ns.number ~ "]" ~ GAP ~ "问：" ~ ns.waiting ~ GAP ~ "答：" -}}
{%- elif add_generation_prompt -%}{{- raise_exception("a dialogue must end with a user message") -}}
{%- endif -%}
{%- if add_generation_prompt -%}{{- CLOSING -}}{%- endif -%}
"""
# SentencePiece puts a space before each text that it is given; heading and content are two. Tools, calls and results as
# models/tool_calls.py turns them into ChatGLM3's roles; "%r" gives a value as Python writes it.
ROLES_JINJA = """
{%- macro turn(role, heading, content) -%}
    {{- "<|" + role + "|>" + heading + "\\n" + (" " + content if content else "") -}}
{%- endmacro -%}
{%- set ns = namespace(tools=[]) -%}
{%- for tool in tools or [] -%}
    {%- set ns.tools = ns.tools + [tool.function if tool.function is defined else tool] -%}
{%- endfor -%}
{{- OPENING -}}
{%- if ns.tools and messages[0].role != "system" -%}
    {{- turn("system", "", TOOLS + "\\n" + ns.tools | tojson(indent=4)) -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant", "observation", "tool"] -%}
        {{- raise_exception("ChatGLM3's dialogues have no role " + message.role) -}}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
        {%- set words = namespace(text="") -%}
        {%- if call.function.arguments is string -%}
            {{- raise_exception("arguments of a call must be an object, not text") -}}
        {%- endif -%}
        {%- for name, value in (call.function.arguments or {}).items() -%}
            {%- set words.text = words.text + (", " if words.text else "") + name + "=" + "%r" | format(value) -%}
        {%- endfor -%}
        {{- turn("assistant", call.function.name, "```python\\ntool_call(" + words.text + ")\\n```") -}}
    {%- endfor -%}
    {%- if not message.tool_calls -%}
        {%- set told = ns.tools if loop.first and message.role == "system" and ns.tools else message.tools -%}
        {%- set role = "observation" if message.role == "tool" else message.role -%}
        {%- set content = message.content + ("\\n" + told | tojson(indent=4) if told else "") -%}
        {{- turn(role, message.metadata or "", content) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- CLOSING -}}{%- endif -%}
"""


def chat_template(version: str) -> str:
    """Return a generation's form of dialogue as a Jinja chat template; its marks are written out as text."""
    prompts = CHATGLM[version]
    values: dict[str, Any] = {"OPENING": "".join(prompts.opening), "CLOSING": "".join(prompts.closing)}
    if version not in FORMS:
        return fill(ROLES_JINJA, values | {"TOOLS": CHATGLM3_TOOLS})
    form = FORMS[version]
    return fill(ROUNDS_JINJA, values | {"FIRST": form["first"], "GAP": form["gap"], "BARE": form["bare"]})


# By the chatglm_version of their tokenizers.
FORMS = {"chatglm": {"gap": "\n", "first": 0, "bare": True}, "chatglm2": {"gap": "\n\n", "first": 1, "bare": False}}
ROUNDS = {version: partial(encode_rounds, **form) for version, form in FORMS.items()}
CHATGLM = {
    "chatglm": Prompts(
        (), ("[gMASK]", "<sop>"), ("<eop>",), ROUNDS["chatglm"], encode_plain_answers, clean_punctuation
    ),
    "chatglm2": Prompts(("[gMASK]", "sop"), (), ("</s>",), ROUNDS["chatglm2"], encode_plain_answers, clean_reply),
    "chatglm3": Prompts(
        ("[gMASK]", "sop"),
        ("<|assistant|>",),
        ("</s>", "<|user|>", "<|observation|>"),
        encode_roles,
        encode_answers_behind_heading,
        clean_reply,
    ),
}
