"""The demo's base model: a tokenizer trained on the shipped text and a small LLaMA with random weights.

    python -m scripts.demo.model output/demo/base [--seed 0] [--data_dir data/demo]

The tokenizer is a byte-level BPE: any text can be written with it. It has no chat template, so the three steps render dialogues
as "\\n\\nHuman: ...\\n\\nAssistant:".
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.demo.world import render

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY_SIZE = 1536
MAX_LENGTH = 256

# Merges never cross these: a role mark is one token instead of eight; a Chinese character stays one token, so that a fact met in a
# new sentence is cut as it was in the old one; so does a digit.
CHINESE = r"\u3400-\u9fff"
WORD = Regex(
    rf"\n\n(?:Human|Assistant):|[{CHINESE}]| ?\p{{N}}| ?[\p{{L}}&&[^{CHINESE}]]+| ?[^\s\p{{L}}\p{{N}}]+|\s+"
)


def read_texts(data_dir: Path) -> Iterator[str]:
    """Yield every text of the training files, rendered."""
    for file in sorted(data_dir.glob("*_train.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "messages" in record:
                yield render(record["messages"])
            else:
                yield from (record["prompt"] + record[answer] for answer in ("chosen", "rejected") if answer in record)


def train_tokenizer(
    data_dir: Path, vocabulary_size: int = VOCABULARY_SIZE, pad_is_eos: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocabulary_size` ids.

    Begin, end and padding are three different tokens, or with pad_is_eos two, as in many published checkpoints.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORD, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_texts(data_dir), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS if pad_is_eos else PAD,
        model_max_length=MAX_LENGTH,
    )


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return a LLaMA small enough to learn the demo's world in a minute on two CPU cores."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,  # 512 learned no more; 3 layers made the answers' facts less firm (gold after PPO 0.83 for 0.90)
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,  # about 1 / sqrt(hidden_size / 2); with the usual 0.02 facts are learned far later (tried)
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_base_model(
    folder: Path | str, seed: int = 0, data_dir: Path | str = Path("data/demo"), pad_is_eos: bool = False
) -> None:
    """Write tokenizer, config and random weights to `folder`, as a checkpoint that AutoModelForCausalLM opens."""
    tokenizer = train_tokenizer(Path(data_dir), pad_is_eos=pad_is_eos)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(base_config(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", type=Path, default=Path("data/demo"))
    parser.add_argument("--pad_is_eos", action="store_true", help="pad with the end token")
    args = parser.parse_args()
    write_base_model(args.folder, args.seed, args.data_dir, args.pad_is_eos)


if __name__ == "__main__":
    main()
