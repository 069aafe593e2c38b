"""How ChatGLM3-6B writes a dialogue: [gMASK] sop, then <|role|>, a line of metadata and the content of each message.

Metadata is the name of a tool where the assistant calls one ("metadata" of the message), else the line is empty: an
answer begins with a line break. It ends with </s> where it is learned; in the history the next role token ends it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from errors import UserError
from models.chatglm.prompts import Messages
from models.chatglm2.prompts import clean_reply

__all__ = ["CLOSING", "OPENING", "STOPS", "clean_reply", "encode_answers", "encode_dialogues"]

OPENING = ("[gMASK]", "sop")
CLOSING = ("<|assistant|>",)
STOPS = ("</s>", "<|user|>", "<|observation|>")
ROLES = ("system", "user", "assistant", "observation")


def heading_and_content(message: dict[str, Any]) -> tuple[str, str]:
    """The two texts of a message. "tools" of a system message, a list of descriptions, are written behind its content."""
    content = message["content"]
    if message.get("tools"):
        content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    return f"{message.get('metadata') or ''}\n", content


def encode_dialogues(tokenizer: Any, dialogues: Sequence[Messages]) -> list[list[int]]:
    """Tokens of each dialogue, without [gMASK] sop in front and <|assistant|> at its end.

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


def encode_answers(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """Tokens of each answer behind its empty line of metadata, without </s>."""
    heading, *encoded = tokenizer.encode_plain(["\n", *answers])
    return [heading + ids for ids in encoded]
