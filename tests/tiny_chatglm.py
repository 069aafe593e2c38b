"""Tiny ChatGLM checkpoints in the layout of the published ones: sharded float16 .bin files and the real tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import models  # noqa: F401  (registers the networks)

GENERATIONS = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b")
SMALL = {
    "chatglm-6b": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 64},
    "chatglm2-6b": {
        "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 8, "ffn_hidden_size": 48,
    },
}  # fmt: skip
SMALL["chatglm3-6b"] = SMALL["chatglm2-6b"]


def copy_tokenizer(folder: Path, generation: str, shared: Path) -> None:
    """The published tokenizer files; ChatGLM3 has the vocabulary of ChatGLM2."""
    golden = shared / "golden"
    for file in (golden / generation / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    if generation == "chatglm3-6b":
        name = "tokenizer.model"
        shutil.copyfile(golden / "chatglm2-6b" / "tokenizer" / name, folder / name)


def tiny_chatglm(folder: Path, generation: str, shared: Path, *, seed: int = 0, shards: int = 3, **changes) -> Path:
    """Write a random checkpoint with the official config.json (sizes aside) into the folder; returns the folder."""
    official = json.loads((shared / "golden" / generation / "official" / "config.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True)
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
    copy_tokenizer(folder, generation, shared)
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
