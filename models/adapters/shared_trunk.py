"""Several networks over one frozen trunk: each has modules of its own, and all of them compute with the same weights.

What differs between actor, critic, reward model and reference is small: adapters and a scalar head. Each network here is
built without weights and then lent the trunk's parameters and buffers - the same tensors, not copies - so there is no
active adapter to switch: a forward or backward pass of one network, gradient checkpointing included, cannot meet another
one's adapter, and an engine around one network trains what that network alone has.

The reward model is the trunk, the adapter that step 2 saved beside its merged weights, and the score head. The critic
starts there and gets an adapter of its own, as it does over the merged weights of a separate model.
"""

import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from errors import UserError
from models.adapters.new_rows import put_new_rows
from models.chatglm.quantized_linear import QuantizedLinear
from models.checkpoint_folder import CheckpointFolder, open_checkpoint
from models.heads import SCALAR_HEADS, score_name, start_head
from models.load import ready_to_train, set_dropout
from models.weight_files import first_line, read_json, stored_rows
from models.zero3 import gathered

logger = logging.getLogger("sanbu")

ADAPTER = "adapter"  # the folder beside merged weights that holds what was added to them
ADAPTER_FILE = "adapter_model.safetensors"
ROWS = 16  # of every tensor, which are compared to see whether two checkpoints have the same base
PEFT_ROWS = "token_adapter.trainable_tokens_delta"  # new rows in an adapter's file, behind the name of their module
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Change:
    """The addition of a frozen adapter to a linear layer's output: scale · up · down · x. down [rank, in], up [out, rank]."""

    down: Tensor
    up: Tensor
    scale: float

    def matrix(self) -> Tensor:
        """Return the matrix that it adds to the weight, [out, in] in float32."""
        return self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class Scorer:
    """A reward model without the trunk: its config, changes and new rows by the name of the layer, its head ({} for a new one)."""

    config: PretrainedConfig
    changes: dict[str, Change]
    new_rows: dict[str, Tensor]
    head: dict[str, Tensor]


class SharedTrunk:
    """A causal language model whose weights, frozen, serve several networks.

    The model must be on its device already. name: its folder, for sentences. What is read of a reward model's folder is
    kept, so that two networks over it share that too.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model.requires_grad_(False), name
        self._scorers: dict[str, Scorer] = {}

    def causal_lm(self, *, dropout: float | None = None, gradient_checkpointing: bool = False) -> PreTrainedModel:
        """Return another language model with the trunk's weights. dropout as in load_causal_lm."""
        config = copy.deepcopy(self.model.config)
        set_dropout(config, dropout)
        network = self._built(type(self.model), config)
        lend(self.model, network)
        return ready_to_train(network, gradient_checkpointing)

    def scalar_model(
        self, path: str, *, dropout: float | None = None, gradient_checkpointing: bool = False, seed: int = 0
    ) -> PreTrainedModel:
        """Return the reward model in the folder ``path``, as load_scalar_model gives it, with the trunk's weights: its adapter,
        frozen, and its head. From the trunk's own folder, or another with the same weights, the head is new.

        Raises UserError if the folder's weights are not the trunk's with the adapter in them.
        """
        if path not in self._scorers:
            self._scorers[path] = read_scorer(path, self.model, self.name)
        scorer = self._scorers[path]
        config = copy.deepcopy(scorer.config)
        set_dropout(config, dropout)
        network = self._built(AutoModelForSequenceClassification._model_mapping[type(config)], config)
        lend(self.model.base_model, network.base_model)
        for name, change in scorer.changes.items():
            add_change(network.get_submodule(name), change)
        for name, rows in scorer.new_rows.items():
            put_new_rows(network.get_submodule(name), nn.Parameter(rows))
        head = getattr(network, score_name(network))
        for name, empty in list(head.named_parameters()):
            value = scorer.head.get(name, torch.empty(empty.shape))
            setattr(head, name, nn.Parameter(value.to(self.model.device, self.model.dtype)))
        if not scorer.head:
            start_head(head, seed)
        config.problem_type = "regression"
        return ready_to_train(network, gradient_checkpointing)

    def _built(self, network_class: type, config: PretrainedConfig) -> PreTrainedModel:
        """Return a network without weights."""
        with torch.device("meta"):
            return network_class._from_config(config, attn_implementation=self.model.config._attn_implementation)


def lend(owner: nn.Module, borrower: nn.Module) -> None:
    """Put the owner's parameters and buffers - the same objects - in the place of the borrower's. Quantised layers, which
    a config does not always tell, take the place of others, their integers shared. The borrower may lack modules.
    """
    for name, module in list(borrower.named_modules(remove_duplicate=False)):
        own = owner.get_submodule(name)
        if isinstance(own, QuantizedLinear) and type(module) is not type(own):
            held = (*own.parameters(), *own.buffers())
            parent, _, attribute = name.rpartition(".")
            setattr(borrower.get_submodule(parent), attribute, copy.deepcopy(own, {id(tensor): tensor for tensor in held}))
            continue
        module._parameters.update(own._parameters.items())
        module._buffers.update(own._buffers.items())
        module._non_persistent_buffers_set = set(own._non_persistent_buffers_set)


# --- the frozen adapter -----------------------------------------------------------------------------------------------


def add_change(layer: nn.Module, change: Change) -> None:
    """Let a linear layer of any kind (Conv1D and quantised ones, LoRA around them) add the change to its output."""
    layer.register_buffer("frozen_down", change.down, persistent=False)
    layer.register_buffer("frozen_up", change.up, persistent=False)
    layer.frozen_scale = change.scale
    layer.register_forward_hook(_changed)


def _changed(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + layer.frozen_scale * F.linear(F.linear(inputs[0], layer.frozen_down), layer.frozen_up)


def frozen_change(layer: nn.Module) -> Change | None:
    """Return the change that a layer adds to its output; None if it adds none."""
    return Change(layer.frozen_down, layer.frozen_up, layer.frozen_scale) if hasattr(layer, "frozen_scale") else None


# --- reading a reward model ---------------------------------------------------------------------------------------------


def check_scorer(path: str | CheckpointFolder, name: str | CheckpointFolder) -> None:
    """Raise UserError for a reward model that cannot be one over the model ``name``, as far as that shows unloaded."""
    reward, base = open_checkpoint(path), open_checkpoint(name)
    kinds = [open_checkpoint(one.weights).content.get("model_type") for one in (reward, base)]
    if kinds[0] != kinds[1]:
        raise other_base(reward.path, base.path, f"it is of type {kinds[0]}, not {kinds[1]}")
    has_head = any(set(tensor.split(".")) & set(SCALAR_HEADS) for tensor, _, _ in stored_rows(reward.weights, 1))
    if has_head and not (reward.weights / ADAPTER / ADAPTER_FILE).is_file():
        raise other_base(reward.path, base.path, "there is none: all its weights were trained")


def read_scorer(path: str | CheckpointFolder, trunk: PreTrainedModel, name: str) -> Scorer:
    """Return what the reward model in the folder ``path`` has beside the trunk, on the trunk's device in its dtype.

    Raises UserError unless its weights are those of the trunk (the model ``name``) with the adapter added.
    """
    checkpoint = open_checkpoint(path)
    path, folder = checkpoint.path, checkpoint.weights
    config = open_checkpoint(folder).config(num_labels=1)
    if type(config) is not type(trunk.config):
        raise other_base(path, name, f"it is of type {config.model_type}, not {trunk.config.model_type}")
    file = folder / ADAPTER / ADAPTER_FILE
    changes, new_rows = read_changes(file, path, name, config.vocab_size) if file.is_file() else ({}, {})
    head = compare(path, folder, trunk, name, changes)
    device, dtype = trunk.device, trunk.dtype
    changes = {
        layer: Change(change.down.to(device, dtype), change.up.to(device, dtype), change.scale)
        for layer, change in changes.items()
    }
    new_rows = {layer: rows.to(device, dtype) for layer, rows in new_rows.items()}
    return Scorer(config, changes, new_rows, head)


def read_changes(file: Path, path: str, name: str, rows: int) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """Read the LoRA matrices and the new rows of an adapter's file to host memory, by the full name of their layer. UserError
    for what is neither. rows: of the embedding, whose last ones the new ones are.
    """
    config = read_json(file.with_name("adapter_config.json"), file.parent)
    try:
        stored = load_file(file)
    except Exception as error:  # SafetensorError is not public in every version
        raise UserError(f"{file} is truncated or damaged ({first_line(error)}); copy it again.") from error
    rank, alpha = config.get("r") or 1, config.get("lora_alpha") or 0
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    downs, ups, new_rows = {}, {}, {}
    for key, tensor in stored.items():
        layer, dot, kind = key.removeprefix(_PREFIX).partition(".lora_")
        if dot and kind in ("A.weight", "B.weight"):
            (downs if kind[0] == "A" else ups)[layer] = tensor
        elif layer.endswith(f".{PEFT_ROWS}"):
            layer = layer.removesuffix(f".{PEFT_ROWS}")
            new_rows[layer] = tensor
            if config["trainable_token_indices"].get(layer) != list(range(rows - len(tensor), rows)):
                raise other_base(path, name, f"{file} holds rows of {layer} that are not its last ones")
        elif not set(key.split(".")) & set(SCALAR_HEADS):
            raise other_base(path, name, f"{file} holds {key}, which is no LoRA of a linear layer")
    if downs.keys() != ups.keys():
        raise other_base(path, name, f"{file} lacks one of the two matrices of {min(downs.keys() ^ ups.keys())}")
    return {layer: Change(down, ups[layer], scale) for layer, down in downs.items()}, new_rows


def compare(path: str, folder: Path, trunk: PreTrainedModel, name: str, changes: dict[str, Change]) -> dict[str, Tensor]:
    """Return the head of a reward model, after its weights were compared with the trunk's, the changes added: the first rows of
    every tensor. All processes call it. UserError if they differ by more than rounding.
    """
    own = trunk.state_dict(keep_vars=True)
    head, adapted = {}, set()
    for tensor_name, shape, rows in stored_rows(folder, ROWS):
        names = tensor_name.split(".")
        if set(names) & set(SCALAR_HEADS):
            head[names[-1]] = rows
            continue
        layer = tensor_name.removesuffix(".weight")
        change = changes.get(layer) if layer != tensor_name else None
        if tensor_name not in own:
            raise other_base(path, name, f"it has {tensor_name}, which {name} does not have")
        base_shape, base, tolerance = trunk_rows(trunk, tensor_name, own[tensor_name])
        wanted = base
        if base_shape != shape or (change is not None and len(change.down.T) * len(change.up) != math.prod(shape)):
            raise other_base(path, name, f"{tensor_name} has other sizes ({list(shape)}, there {list(base_shape)})")
        if change is not None:
            adapted.add(layer)
            module = trunk.get_submodule(layer)
            as_rows = isinstance(module, Conv1D) or getattr(module, "transposed", False)  # stored as [in, out]
            wanted = base + (change.matrix().T if as_rows else change.matrix())[:ROWS]
        # Step 2 may have rounded the base to its dtype, and then the sum; this run rounds the base to its own.
        size = base.abs() + wanted.abs()
        tolerance = tolerance + size * (rounding(rows.dtype) + rounding(own[tensor_name].dtype)) + 1e-6 * wanted.abs().max()
        if not bool(((rows.float() - wanted).abs() <= tolerance).all()):
            gap = float((rows.float() - wanted).abs().max())
            raise other_base(path, name, f"{tensor_name} differs by {gap:.2g}, rounding explains {float(tolerance.max()):.2g}")
    if len(adapted) < len(changes):
        raise other_base(path, name, f"its adapter changes {min(changes.keys() - adapted)}, which is not among its weights")
    return head


def trunk_rows(trunk: PreTrainedModel, name: str, tensor: Tensor) -> tuple[tuple[int, ...], Tensor, Tensor | float]:
    """Return shape and first rows (float32, host) of a tensor of the trunk, and how far quantisation may have moved it."""
    layer = trunk.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, QuantizedLinear) and name.endswith(".weight"):
        values, scale = (layer.weight, layer.weight_scale)
        shape = (layer.in_features, layer.out_features) if layer.transposed else (layer.out_features, layer.in_features)
        kept = slice(None) if layer.transposed else slice(ROWS)
        whole = layer.plain_weight(values[kept].cpu(), scale[kept].cpu(), torch.float32)
        tolerance = scale[kept].cpu().float()
        return shape, whole[:ROWS], tolerance[None, :] if layer.transposed else tolerance[:, None]
    with gathered([tensor]) if isinstance(tensor, nn.Parameter) else gathered([]):
        return tuple(tensor.shape), tensor.detach()[:ROWS].float().cpu(), 0.0


def rounding(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to dtype; 0 for integers."""
    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0


def other_base(path: str, name: str, difference: str) -> UserError:
    """Return the sentence for a reward model that is not the trunk with an adapter."""
    return UserError(
        f"--memory_mode shared: the reward model {path} is not {name} with the adapter in {Path(path) / ADAPTER} added "
        f"({difference}); train step 2 with --lora_dim from {name}, or take --memory_mode separate."
    )
