"""Shared by the evaluations: built-in prompts, held-out records, a loaded model, its decoded answers, JSON output."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errors import UserError
from inference.chatbot import context_length
from inference.engine import generate_many
from models.checkpoint_folder import CheckpointFolder
from models.device import Platform, attention_implementation, detect_platform, resolve_dtype, set_device
from models.heads import prefix_length
from models.load import load_causal_lm, load_tokenizer
from models.templates import Template, load_template
from training.utils.data.records import load_records
from training.utils.data.tokenize import cut_prompt

logger = logging.getLogger("sanbu")
BUILT_IN = json.loads(Path(__file__).with_name("builtin.json").read_text(encoding="utf-8"))
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its length in tokens with the end token, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, with its tokenizer and template."""

    path: str
    model: torch.nn.Module
    tokenizer: Any
    template: Template
    device: torch.device

    def encode(self, prompts: list[Messages], room: int, flag: str, longest: int | None = None) -> list[list[int]]:
        """Return the token ids of the prompts, cut at the beginning where they leave less room for an answer.

        longest: further limit of a prompt in tokens. Raises UserError, which names the flag, if no prompt leaves the room.
        """
        context = context_length(self.model.config) - prefix_length(self.model)
        limit = min(context - room, longest or context)
        if limit < 1:
            raise UserError(
                f"{flag} {room} leaves no room for a prompt in the {context} tokens that {self.path} reads; lower it."
            )
        return [cut_prompt(ids, limit, self.template) for ids in self.template.encode_prompts(self.tokenizer, prompts)]

    def answer(self, prompts: list[list[int]], **settings: Any) -> list[Answer]:
        """Return the answers to encoded prompts, those to one prompt together. settings: those of generate_many."""
        stop, pad = self.template.stop_token_ids, self.tokenizer.pad_token_id
        generation = generate_many(self.model, prompts, stop_token_ids=stop, pad_token_id=pad, **settings)
        columns = (generation.sequences, generation.lengths, generation.ended)
        return [
            Answer(self.template.decode_answer(self.tokenizer, tokens[:length]), length, ended)
            for tokens, length, ended in zip(*(column.tolist() for column in columns), strict=True)
        ]


def load_for_evaluation(
    checkpoint: CheckpointFolder,
    dtype: str,
    attention: str,
    load: Callable[..., torch.nn.Module] = load_causal_lm,
    platform: Platform | None = None,
    local_rank: int = 0,
    **options: Any,
) -> LoadedModel:
    """Load a checkpoint on this process's device. dtype, attention: the flags; options: further arguments of load."""
    platform = platform or detect_platform()
    device = set_device(platform, local_rank)
    tokenizer = load_tokenizer(checkpoint)
    kernels = attention_implementation(attention, platform)
    model = load(checkpoint, dtype=resolve_dtype(dtype, platform), attn=kernels, **options).to(device).eval()
    return LoadedModel(checkpoint.path, model, tokenizer, load_template(checkpoint, tokenizer), device)


def mean_lengths(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the mean length in tokens, and the share of answers that ended before the limit."""
    return {
        "mean_tokens": sum(answer.tokens for answer in answers) / len(answers),
        "ended": sum(answer.ended for answer in answers) / len(answers),
    }


def held_out(path: str, columns: dict[str, str], cache_dir: str | None = None, alone: bool = True) -> Any:
    """Return the held-out records of a data set, or all where it has no held-out part. alone: see load_records.

    Dialogues with tools are left out, with a line in the log: here prompts are messages alone.
    """
    splits = load_records(path, columns=columns, cache_dir=cache_dir, alone=alone)
    records = splits.get("eval", splits["train"])
    plain = [row for row, calls in enumerate(records["calls"]) if calls is None]
    if len(plain) < len(records):
        logger.warning("%s: %d dialogues with tools are not evaluated", path, len(records) - len(plain))
    if not plain:
        raise UserError(f"{path}: only dialogues with tools, which the evaluation does not read; name another set.")
    return records.select(plain) if len(plain) < len(records) else records


def write_json(file: Path | str, content: Any) -> None:
    """Write a readable JSON file: indented, letters as letters."""
    Path(file).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
