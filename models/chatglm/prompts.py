"""How ChatGLM-6B writes a dialogue: the bare question, or numbered rounds "[Round i]\\n问：...\\n答：..." from 0.

Every prompt ends in [gMASK] <sop>, behind which the network writes; an answer ends in <eop>. The published fine-tuning
(P-Tuning) also has [gMASK] learn to be followed by <sop>; here <sop> is part of the prompt, and not learned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from errors import UserError

Messages = Sequence[dict[str, Any]]

OPENING: tuple[str, ...] = ()
CLOSING = ("[gMASK]", "<sop>")
STOPS = ("<eop>",)
CJK = "[\u4e00-\u9fff]"
BESIDE_CJK = re.compile(f"(?<={CJK})[,!:;?]|[,!:;?](?={CJK})")
FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")


def rounds(messages: Messages) -> tuple[list[tuple[str, str]], str]:
    """[(question, answer), ...] of the earlier turns, and the last question.

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


def dialogue(messages: Messages) -> str:
    """The text of a dialogue, up to where the answer begins."""
    history, question = rounds(messages)
    if not history:
        return question
    turns = [f"[Round {number}]\n问：{asked}\n答：{said}\n" for number, (asked, said) in enumerate(history)]
    return "".join(turns) + f"[Round {len(history)}]\n问：{question}\n答："


def encode_dialogues(tokenizer: Any, dialogues: Sequence[Messages]) -> list[list[int]]:
    """Tokens of each dialogue, without [gMASK] <sop>."""
    return tokenizer.encode_plain([dialogue(messages) for messages in dialogues])


def encode_answers(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """Tokens of each answer, without <eop>."""
    return tokenizer.encode_plain(answers)


def clean_reply(text: str) -> str:
    """A generated answer as the original shows it.

    SentencePiece makes full-width punctuation ASCII; beside a Chinese character it becomes full-width again.
    """
    text = text.strip().replace("[[训练时间]]", "2023年")
    return BESIDE_CJK.sub(lambda mark: mark[0].translate(FULL_WIDTH), text)
