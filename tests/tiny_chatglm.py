"""Tiny ChatGLM checkpoints in the layout of the published ones: sharded float16 .bin files and the real tokenizers."""

import io
import json
import shutil
from functools import cache
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import models  # noqa: F401  (registers the networks)
from tests.tiny import TEXT

GENERATIONS = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b")
SIZE = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
SMALL = {
    "chatglm-6b": SIZE | {"inner_hidden_size": 64},
    "chatglm2-6b": SIZE | {"kv_channels": 8, "ffn_hidden_size": 48},
}
SMALL["chatglm3-6b"] = SMALL["chatglm2-6b"]


def copy_tokenizer(folder: Path, generation: str, shared: Path) -> None:
    """Copy the published tokenizer files; ChatGLM3 has the vocabulary of ChatGLM2."""
    golden = shared / "golden"
    for file in (golden / generation / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    if generation == "chatglm3-6b":
        name = "tokenizer.model"
        shutil.copyfile(golden / "chatglm2-6b" / "tokenizer" / name, folder / name)


@cache
def small_vocabulary(generation: str) -> bytes:
    """Train a SentencePiece model of a few hundred pieces with the control pieces of the published one."""
    first = generation == "chatglm-6b"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=700, hard_vocab_limit=False, byte_fallback=True,
        model_type="unigram" if first else "bpe", pad_id=3 if first else -1, character_coverage=1.0, minloglevel=2,
        normalization_rule_name="nmt_nfkc" if first else "identity", remove_extra_whitespaces=first,
        user_defined_symbols=["<n>", "<|tab|>", *(f"<|blank_{run}|>" for run in range(2, 81))] if first else [],
        control_symbols=["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"] if first else [],
    )  # fmt: skip
    return model.getvalue()


def shrink_vocabulary(folder: Path, generation: str, config: dict) -> dict:
    """Put the small vocabulary in the published one's place; returns the config with its size and ids."""
    first = generation == "chatglm-6b"
    content = small_vocabulary(generation)
    (folder / ("ice_text.model" if first else "tokenizer.model")).write_bytes(content)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    rows = {"vocab_size" if first else "padded_vocab_size": len(pieces) + 40}
    ids = {"bos": "<sop>", "eos": "<eop>", "mask": "[MASK]", "gmask": "[gMASK]"} if first else {}
    return config | rows | {f"{name}_token_id": pieces.piece_to_id(piece) for name, piece in ids.items()}


def tiny_chatglm(
    folder: Path, generation: str, shared: Path, *, seed: int = 0, shards: int = 3, published: bool = False, **changes
) -> Path:
    """Write a random checkpoint with the official config.json (sizes aside) into the folder; returns the folder.

    ``published``: with the published vocabulary of 65,000 or 130,000 pieces, which costs seconds in every load and step.
    """
    official = json.loads((shared / "golden" / generation / "official" / "config.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True)
    copy_tokenizer(folder, generation, shared)
    if not published:
        official = shrink_vocabulary(folder, generation, official)
    (folder / "config.json").write_text(json.dumps(official | SMALL[generation] | changes))
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():  # the default start is so small that every token is equally likely; tests want differences
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "prefix" not in name:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    torch.set_rng_state(state)
    write_shards(folder, {name: tensor.half() for name, tensor in model.state_dict().items()}, shards)
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """pytorch_model-0000i-of-0000n.bin and their index, as the published checkpoints have them."""
    places, names = {}, list(tensors)
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        mine = names[number::shards]
        torch.save({name: tensors[name].clone() for name in mine}, folder / file)
        places |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
