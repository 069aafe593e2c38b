"""Command lines and results of the steps that the benchmarks run."""

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any


def as_flags(values: dict[str, Any]) -> list[str]:
    """Return --name value pairs; a name with True stands alone."""
    return [str(text) for name, value in values.items() for text in ([f"--{name}"] if value is True else [f"--{name}", value])]


def read_records(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def opt_config(width: int, layers: int, heads: int, **more: int) -> Any:
    """Return the configuration of an OPT of these sizes."""
    from transformers import OPTConfig

    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    return OPTConfig(num_hidden_layers=layers, num_attention_heads=heads, **sizes, **more)


def byte_tokenizer(vocabulary: int) -> Any:
    """Return a tokenizer without merges, a byte a token, filled up with words that no text holds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["</s>", "<pad>", *letters, *(f"<word{number}>" for number in range(vocabulary - len(letters) - 2))]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def print_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Print a Markdown table, each row as soon as it is measured; return it."""
    lines = []
    for row in chain([head, ["---"] * len(head)], rows):
        lines.append(f"| {' | '.join(map(str, row))} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"
