"""How ChatGLM2-6B writes a dialogue: [gMASK] sop, then numbered rounds "[Round i]\\n\\n问：...\\n\\n答：..." from 1.

A single question is a round, too. An answer ends in </s> where it is learned; in the history it ends in "\\n\\n".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.chatglm.prompts import Messages, rounds

OPENING = ("[gMASK]", "sop")
CLOSING: tuple[str, ...] = ()
STOPS = ("</s>",)


def dialogue(messages: Messages) -> str:
    """The text of a dialogue, up to where the answer begins. System messages as with ChatGLM-6B (rounds)."""
    history, question = rounds(messages)
    turns = [f"[Round {number}]\n\n问：{asked}\n\n答：{said}\n\n" for number, (asked, said) in enumerate(history, 1)]
    return "".join(turns) + f"[Round {len(history) + 1}]\n\n问：{question}\n\n答："


def encode_dialogues(tokenizer: Any, dialogues: Sequence[Messages]) -> list[list[int]]:
    """Tokens of each dialogue, without [gMASK] sop."""
    return tokenizer.encode_plain([dialogue(messages) for messages in dialogues])


def encode_answers(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """Tokens of each answer, without </s>."""
    return tokenizer.encode_plain(answers)


def clean_reply(text: str) -> str:
    """A generated answer as the original shows it."""
    return text.strip().replace("[[训练时间]]", "2023年")
