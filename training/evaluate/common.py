"""Shared by the evaluations: built-in prompts, held-out records, a loaded model, its decoded answers, JSON output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errors import UserError
from inference.chatbot import context_length
from inference.engine import Generation
from models.checkpoint_folder import CheckpointFolder
from models.device import Platform, attention_implementation, detect_platform, resolve_dtype, set_device
from models.heads import prefix_length
from models.load import load_causal_lm, load_tokenizer
from models.templates import Template, load_template
from training.utils.data.records import load_records
from training.utils.data.tokenize import cut_prompt

BUILT_IN = json.loads(Path(__file__).with_name("builtin.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its length in tokens with the end token, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Answerer:
    """A language model on its device, with its tokenizer and template."""

    model: torch.nn.Module
    tokenizer: Any
    template: Template
    device: torch.device

    @classmethod
    def load(
        cls,
        checkpoint: CheckpointFolder,
        dtype: str,
        attention: str,
        local_rank: int = 0,
        platform: Platform | None = None,
        **adapter: Any,
    ) -> Answerer:
        """Load a checkpoint for generation. dtype, attention: the flags; adapter: further arguments of load_causal_lm."""
        platform = platform or detect_platform()
        device = set_device(platform, local_rank)
        tokenizer = load_tokenizer(checkpoint)
        attention = attention_implementation(attention, platform)
        model = load_causal_lm(checkpoint, dtype=resolve_dtype(dtype, platform), attn=attention, **adapter)
        return cls(model.to(device).eval(), tokenizer, load_template(checkpoint, tokenizer), device)

    def encode(
        self, prompts: list[list[dict[str, str]]], answer_length: int, flag: str, model: str, longest: int | None = None
    ) -> list[list[int]]:
        """Return the token ids of the prompts, cut at the beginning where they leave no room for answer_length tokens.

        longest: further limit of a prompt in tokens. Raises UserError, which names the flag, if no room is left at all.
        """
        context = context_length(self.model.config) - prefix_length(self.model)
        limit = context - answer_length
        if limit < 1:
            raise UserError(
                f"{flag} {answer_length} leaves no room for a prompt in the {context} tokens that {model} reads; lower it."
            )
        limit = min(limit, longest or limit)
        return [cut_prompt(ids, limit, self.template) for ids in self.template.encode_prompts(self.tokenizer, prompts)]

    def decode(self, generation: Generation) -> list[Answer]:
        """Return the answers of a generation, one a row."""
        rows = zip(
            generation.sequences.tolist(), generation.lengths.tolist(), generation.ended.tolist(), strict=True
        )
        return [Answer(self.template.decode_answer(self.tokenizer, row[:length]), length, ended) for row, length, ended in rows]


def lengths(answers: list[Answer]) -> dict[str, float]:
    """Return the mean length in tokens, and the share of answers that ended before the limit."""
    return {
        "mean_tokens": sum(answer.tokens for answer in answers) / len(answers),
        "ended": sum(answer.ended for answer in answers) / len(answers),
    }


def held_out(path: str, columns: dict[str, str], cache_dir: str | None = None) -> Any:
    """Return the held-out records of a data set, or all where it has no held-out part."""
    records = load_records(path, columns=columns, cache_dir=cache_dir)
    return records.get("eval", records["train"])


def write_json(file: Path | str, content: Any) -> None:
    """Write a readable JSON file: indented, letters as letters."""
    Path(file).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
