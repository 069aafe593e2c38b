"""P-Tuning v2 (Liu et al. 2021, arXiv 2110.07602): learned keys and values in front of every text, on a frozen model.

Both kinds of prefix are made, read and stored here. ChatGLM's networks hold their own (transformer.prefix_encoder) and its
file, prefix_only.bin, has the names and shapes of the original trainer's; every other family gets peft's prefix tuning
and peft's files. Either way the folder names the model that the prefix belongs to and holds no other weights of it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from errors import UserError
from models.checkpoint_folder import CheckpointFolder, check_recomputed_prefix
from models.heads import SCALAR_HEADS, base_model, is_peft, prefix_length, score_name
from models.weight_files import (
    BASE_FIELD,
    OFFICIAL_FILE,
    PEFT_FILES,
    PREFIX_FILE,
    base_named_in,
    first_line,
    load_pickled,
)
from models.zero3 import gathered

if TYPE_CHECKING:  # peft takes seconds to import, and is needed only where there is an adapter
    from peft import PeftModel, PrefixTuningConfig
    from transformers import PretrainedConfig, PreTrainedModel

OWN = "transformer.prefix_encoder."
_NAME = "default"  # peft can hold several; we use one
_PROMPT = f"prompt_encoder.{_NAME}."


@dataclass(frozen=True)
class SavedPrefix:
    """A prefix in a file. own: ChatGLM's, else peft's. tensors, float32: the prefix under its own names. head: the
    scalar head of a reward model ("weight", "bias") that was trained with it, or empty.
    """

    file: Path
    own: bool
    tensors: dict[str, Tensor]
    head: dict[str, Tensor]

    @property
    def length(self) -> int:
        """Return its number of places."""
        return next(tensor for name, tensor in self.tensors.items() if "embedding" in name).shape[0]

    @property
    def projection(self) -> bool:
        """Return True if its embeddings go through a network of two layers; what peft stores went through it already."""
        return any(".trans." in name for name in self.tensors)


@dataclass(frozen=True)
class PrefixPlan:
    """The prefix that a model gets. base: the folder or hub id of the model that it belongs to. saved: trained before;
    None for a new one. seed: of a new one.
    """

    length: int
    projection: bool
    base: str
    saved: SavedPrefix | None
    seed: int = 0


# --- folders ----------------------------------------------------------------------------------------------------------


def read_prefix(folder: Path) -> SavedPrefix:
    """Return the prefix of a folder of ours, of peft's, or of the original trainer's (checkpoint-N). UserError if it has none."""
    names = (PREFIX_FILE, PEFT_FILES[1], OFFICIAL_FILE)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} holds no prefix (looked for {', '.join(names)}); name a folder that P-Tuning saved.")
    try:
        if file.suffix == ".safetensors":
            stored = load_file(file)
        else:
            stored = {name: tensor for name, tensor in load_pickled(file).items() if isinstance(tensor, Tensor)}
    except Exception as error:  # by format and version: RuntimeError, EOFError, UnpicklingError, SafetensorError, …
        raise UserError(f"{file} is truncated or damaged ({first_line(error)}); copy it again.") from error
    own = file.suffix == ".bin"
    tensors = {
        name: tensor.float() for name, tensor in stored.items() if (name.startswith(OWN) if own else "prompt" in name)
    }
    if not any("embedding" in name for name in tensors):
        raise UserError(
            f"{file} holds no prefix (its tensors are named like {min(stored, default='nothing')!r}, looked for "
            f"{OWN + 'embedding.weight' if own else 'prompt_embeddings'}); name a folder that P-Tuning saved."
        )
    head = {
        name.rsplit(".", 1)[-1]: tensor.float()
        for name, tensor in stored.items()
        if not name.startswith(OWN) and set(name.split(".")) & set(SCALAR_HEADS)
    }
    return SavedPrefix(file, own, tensors, head)


def plan_prefix(
    checkpoint: CheckpointFolder,
    *,
    pre_seq_len: int = 0,
    prefix_projection: bool = False,
    ptuning_checkpoint: str | Path | None = None,
    seed: int = 0,
) -> PrefixPlan | None:
    """Return the prefix that a model shall have: the one in its folder, the one in ptuning_checkpoint, or a new one of
    pre_seq_len positions; None for none.

    0 positions and no projection mean "as saved". Raises UserError for two prefixes, for numbers that differ from a saved
    one's, and if config.json contradicts the file.
    """
    path, folder, content = checkpoint.path, checkpoint.folder, checkpoint.content
    named = base_named_in(folder)
    if named is None:
        base = str(Path(path).expanduser().resolve()) if Path(path).expanduser().is_dir() else path
        source = Path(ptuning_checkpoint).expanduser() if ptuning_checkpoint else None
        if source is not None and not source.is_dir():
            raise UserError(f"--ptuning_checkpoint {ptuning_checkpoint}: no such folder; name one that P-Tuning saved.")
    else:
        base, source = named[1], folder
        if ptuning_checkpoint:
            raise UserError(
                f"model {path} has a prefix already and --ptuning_checkpoint {ptuning_checkpoint} names another; drop the "
                f"flag, or give {base} as the model."
            )
    if source is None:
        length = content.get("pre_seq_len") or 0  # a ChatGLM checkpoint may have a prefix among its weights
        if length and pre_seq_len not in (0, length):
            raise UserError(
                f"--pre_seq_len {pre_seq_len}, but model {path} has a prefix of {length} places; give {length} or drop it."
            )
        projection = bool(content.get("prefix_projection")) if length else prefix_projection
        return PrefixPlan(length or pre_seq_len, projection, base, None, seed) if length or pre_seq_len else None
    saved = read_prefix(source)
    if named and saved.own and content.get("pre_seq_len") != saved.length:
        raise UserError(
            f"{folder / 'config.json'} says pre_seq_len {content.get('pre_seq_len')}, but the prefix in {saved.file} has "
            f"{saved.length} places; copy the folder again."
        )
    if pre_seq_len not in (0, saved.length):
        raise UserError(
            f"--pre_seq_len {pre_seq_len}, but the prefix in {saved.file} has {saved.length} places; give "
            f"--pre_seq_len {saved.length}, or drop the flag."
        )
    if prefix_projection != saved.projection and (prefix_projection or pre_seq_len):
        raise UserError(
            f"--prefix_projection {str(prefix_projection).lower()}, but the prefix in {saved.file} was saved "
            f"{'with' if saved.projection else 'without'} a projection; {'add' if saved.projection else 'drop'} the flag."
        )
    return PrefixPlan(saved.length, saved.projection, base, saved, seed)


# --- networks ---------------------------------------------------------------------------------------------------------


def has_prefix(model: nn.Module) -> bool:
    """Return True if a prefix stands before every text of the model."""
    return prefix_length(model) > 0 or own_encoder(model) is not None


def own_encoder(model: nn.Module) -> nn.Module | None:
    """Return the prefix encoder inside a ChatGLM network, or None."""
    network = base_model(model)
    return getattr(getattr(network, "base_model", network), "prefix_encoder", None)


def base_of(model: nn.Module) -> str:
    """Return the folder or hub id of the model that a prefix belongs to."""
    return model.peft_config[_NAME].base_model_name_or_path if is_peft(model) else getattr(model.config, BASE_FIELD)


def check_prefix(plan: PrefixPlan, config: PretrainedConfig, gradient_checkpointing: bool) -> None:
    """Raise, before any weight is read, UserError for a saved prefix of the other kind, and outside ChatGLM for gradient
    checkpointing, which drops the cache that peft's prefix is in.
    """
    own = hasattr(config, "pre_seq_len")
    if plan.saved is not None and plan.saved.own != own:
        raise UserError(
            f"the prefix in {plan.saved.file} is {'a ChatGLM' if plan.saved.own else 'no ChatGLM'} one, but the model "
            f"{plan.base} is of type {config.model_type}; give the model that it was trained on."
        )
    check_recomputed_prefix(config.model_type, gradient_checkpointing)


def add_prefix(model: PreTrainedModel, plan: PrefixPlan, fresh: bool = True) -> nn.Module:
    """Return the model with its prefix; trained are the prefix and, if the model has one, the scalar head, all else is frozen.

    A ChatGLM network that was built with config.pre_seq_len has an encoder, whose values stay if not ``fresh``; around
    any other one comes a PeftModel. The prefix is float32 whatever the model's dtype (but under ZeRO-3, where DeepSpeed
    splits ChatGLM's in the dtype of the rest). Raises UserError for a saved prefix of another shape.
    """
    saved, encoder, head = plan.saved, own_encoder(model), score_name(model)
    if saved is not None and head and saved.head:
        copy_into(getattr(model, head), saved.head, saved.file)
    if encoder is not None:
        setattr(model.config, BASE_FIELD, plan.base)
        model.requires_grad_(False)
        encoder.requires_grad_(True)
        if not any(hasattr(parameter, "ds_id") for parameter in encoder.parameters()):
            encoder.float()  # transformers makes what a checkpoint lacks in the model's dtype
        if head:
            getattr(model, head).requires_grad_(True)
    else:
        from peft import get_peft_model

        model = get_peft_model(model, _peft_config(model, plan), autocast_adapter_dtype=False)
        model.peft_config[_NAME].base_model_name_or_path = plan.base
        encoder = model.prompt_encoder[_NAME]
    if saved is not None:
        renamed = {name.removeprefix(OWN): tensor for name, tensor in saved.tensors.items()}
        copy_into(encoder, renamed if saved.own else {"embedding.weight": renamed["prompt_embeddings"]}, saved.file)
    elif fresh or is_peft(model):
        _start(encoder, plan.seed)
    return model


def _peft_config(model: PreTrainedModel, plan: PrefixPlan) -> PrefixTuningConfig:
    """Return peft's settings; the shape of keys and values is said outright, because peft guessed it in different ways."""
    from peft import PrefixTuningConfig

    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return PrefixTuningConfig(
        task_type="SEQ_CLS" if score_name(model) else "CAUSAL_LM",
        num_virtual_tokens=plan.length,
        prefix_projection=plan.projection,
        encoder_hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        token_dim=heads * width,
    )


def _start(encoder: nn.Module, seed: int) -> None:
    """Draw random values as the original's (embedding N(0, 1), linear layers as torch makes them), the same on every process
    and under every ZeRO stage.
    """
    parameters = list(encoder.parameters())
    with gathered(parameters), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in encoder.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                module.reset_parameters()


def copy_into(module: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Fill the module's parameters, whatever the ZeRO stage. UserError unless names and shapes are the module's."""
    parameters = dict(module.named_parameters())
    wanted = {name: list(getattr(one, "ds_shape", one.shape)) for name, one in parameters.items()}
    given = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if wanted != given:
        name = next(name for name in sorted(wanted | given) if wanted.get(name) != given.get(name))
        raise UserError(
            f"{file}: {name} has the shape {given.get(name, 'none')}, this model takes {wanted.get(name, 'none')}; the prefix "
            "was trained on another model, or with another --prefix_projection."
        )
    with gathered(list(parameters.values())), torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape == tensors[name].shape:  # under ZeRO-3 whole only inside
                parameter.copy_(tensors[name])


# --- what is stored ---------------------------------------------------------------------------------------------------


def prefix_tensors(model: nn.Module, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a prefix's file holds. trained: every trained parameter, whole, named as in model.named_parameters().

    ChatGLM: the names of the original trainer, and those of the scalar head. peft: "prompt_embeddings", the keys and
    values themselves with any projection computed (peft keeps none), and the head under peft's name. All float32.
    """
    trained = {name: tensor.detach().float().cpu().contiguous() for name, tensor in trained.items()}
    if not is_peft(model):
        return trained
    encoder = {name.removeprefix(_PROMPT): tensor for name, tensor in trained.items() if name.startswith(_PROMPT)}
    prompts = encoder["embedding.weight"]
    if "transform.0.weight" in encoder:
        prompts = torch.tanh(F.linear(prompts, encoder["transform.0.weight"], encoder["transform.0.bias"]))
        prompts = F.linear(prompts, encoder["transform.2.weight"], encoder["transform.2.bias"])
    head = {
        name.replace(f".modules_to_save.{_NAME}", ""): tensor
        for name, tensor in trained.items()
        if not name.startswith(_PROMPT)
    }
    return {"prompt_embeddings": prompts.contiguous(), **head}


def peft_config_to_save(model: PeftModel) -> PrefixTuningConfig:
    """Return the config for adapter_config.json: the keys and values are stored themselves, so there is no projection left."""
    config = copy.deepcopy(model.peft_config[_NAME])
    config.prefix_projection, config.inference_mode = False, True
    return config
