"""LoRA through peft: which layers, what is trained, the model without it (the reference), saved alone and merged; and a
prefix (models/adapters/prefix.py) saved alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.dynamic_module_utils import custom_object_save
from transformers.pytorch_utils import Conv1D

from errors import UserError
from models.adapters.new_rows import NAME, add_new_rows, new_rows_disabled, with_rows_in_place
from models.adapters.prefix import base_of, has_prefix, peft_config_to_save, prefix_tensors
from models.adapters.shared_trunk import PEFT_ROWS, frozen_change
from models.chatglm.quantized_linear import QuantizedLinear
from models.checkpoint_folder import check_module_name
from models.families import FAMILIES
from models.heads import SCALAR_HEADS, base_model, is_peft, score_name
from models.save import new_checkpoint, share_permissions
from models.weight_files import PREFIX_FILE

if TYPE_CHECKING:  # peft takes seconds to import, and is needed only where there is an adapter
    from peft import PeftModel
    from transformers import PreTrainedModel

_NAME = "default"  # peft can hold several adapters; we use one
_PREFIX = "base_model.model."
logger = logging.getLogger("sanbu")


def add_lora(
    model: PreTrainedModel,
    dim: int,
    alpha: float,
    dropout: float = 0.0,
    module_name: str = "auto",
    first_new_row: int | None = None,
) -> PeftModel:
    """Put LoRA (Hu et al. 2021, arXiv 2106.09685) into the model: W x + alpha/dim · B A x, B = 0 at the start.

    module_name: "auto" for all linear layers of attention and MLP, or parts of module names separated by commas; a
    layer is adapted when its name contains one of them ("decoder.layers.", "q_proj,v_proj"). The output matrix and the
    scalar head never are. Trained are the adapter and, if the model has one, the scalar head; all else is frozen, but for the
    rows of embedding and output matrix from first_new_row on (checkpoint_folder.first_new_row). The adapter has the
    model's dtype: DeepSpeed, which casts whole modules, keeps float32 masters of what is trained.
    UserError for a part that no layer's name contains.
    """
    if has_prefix(model):
        raise UserError("this model has a prefix (P-Tuning), beside which adapters are not trained; drop --lora_dim.")
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    names = lora_targets(model, module_name)
    head = score_name(model)
    config = LoraConfig(
        r=dim,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # published adapters list short names; they say the same for "auto"
        target_modules=list(FAMILIES[model.config.model_type].lora_targets) if module_name == "auto" else names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        modules_to_save=[head] if head else None,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), QuantizedLinear):
            layer.lora_A.to(model.dtype)  # peft takes the dtype of the weight, and these are integers
            layer.lora_B.to(model.dtype)
    if first_new_row is not None:
        layers = add_new_rows(model, first_new_row)
        rows = range(first_new_row, model.config.vocab_size)
        adapted.peft_config[_NAME].trainable_token_indices = {layer: list(rows) for layer in layers}
        logger.info("LoRA trains the new rows %d to %d of %s too.", rows[0], rows[-1], " and ".join(layers))
    return adapted


def lora_targets(model: PreTrainedModel, module_name: str = "auto") -> list[str]:
    """Return the full names of the linear layers (GPT-2's Conv1D included) that module_name selects."""
    layers = linear_layers(model)
    if module_name == "auto":
        return [name for name in layers if name.rsplit(".", 1)[-1] in FAMILIES[model.config.model_type].lora_targets]
    check_module_name(layers, module_name, model.config.model_type)
    return [name for name in layers if is_named(name, module_name)]


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of all layers that an adapter can be put on."""
    heads = (model.get_output_embeddings(), *(getattr(model, name, None) for name in SCALAR_HEADS))
    return [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D)) and layer not in heads]


def is_named(layer: str, module_name: str) -> bool:
    """Return True if a layer's name contains one of the parts of names."""
    return any(part.strip() in layer for part in module_name.split(",") if part.strip())


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Let the model compute inside as if there were no adapter: the reference of PPO without a second copy of the
    weights.
    """
    if has_prefix(model):
        raise ValueError("a prefix stands outside the network; heads.base_model(model) computes without peft's")
    with model.disable_adapter(), new_rows_disabled(model):
        yield


def merged_state_dict(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the weights of the plain model with the adapter added in: W + alpha/dim · B A, summed in float32, in W's dtype.

    state_dict: whole tensors named as in model.state_dict(), where the module's own are split (ZeRO-3). Returns the
    names of the plain model; the module is not changed. What a shared trunk's reward model adds is in them. Quantised
    layers become floats in the model's dtype. A model without an adapter gives its own weights, integers as they are.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    if not is_peft(model):
        return state_dict
    from peft.tuners.lora import LoraLayer

    merged = {}
    for name, tensor in with_rows_in_place(state_dict).items():
        plain = name.removeprefix(_PREFIX)
        if ".lora_" in plain or ".original_module." in plain:
            continue
        merged[plain.replace(".base_layer.", ".").replace(f".modules_to_save.{_NAME}.", ".")] = tensor
    for name, layer in model.get_base_model().named_modules():
        adapted = isinstance(layer, LoraLayer)
        base = layer.get_base_layer() if adapted else layer
        integers = isinstance(base, QuantizedLinear) and f"{name}.weight_scale" in merged
        frozen = frozen_change(base) if f"{name}.weight" in merged else None
        if not adapted and not integers and frozen is None:
            continue
        weight = merged[f"{name}.weight"]
        dtype = model.get_base_model().dtype if integers else weight.dtype
        if integers:  # floats in host memory: where the integers are, there may be no room
            weight = base.plain_weight(weight.cpu(), merged.pop(f"{name}.weight_scale").cpu(), torch.float32)
        changes = [] if frozen is None else [frozen.matrix()]
        if adapted:
            down = state_dict[f"{_PREFIX}{name}.lora_A.{_NAME}.weight"].float()
            up = state_dict[f"{_PREFIX}{name}.lora_B.{_NAME}.weight"].float()
            changes.append(layer.scaling[_NAME] * (up @ down))
        for change in changes:
            change = change.to(weight.device)
            as_stored = change.T if isinstance(base, Conv1D) or (integers and base.transposed) else change
            weight = weight.float() + as_stored
        merged[f"{name}.weight"] = weight.to(dtype)
    return merged


def save_adapter(model: nn.Module, folder: str | Path) -> bool:
    """Write the adapter alone (and the trained scalar head, and new rows) into the folder, in the format that
    PeftModel.from_pretrained opens; with new rows over the base whose embedding was enlarged.

    Returns False, and writes nothing, for a model without an adapter.
    """
    if not is_peft(model):
        return False
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, state_dict = model.peft_config[_NAME], model.state_dict()
    tensors = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    for layer in config.trainable_token_indices or ():
        tensors[f"{_PREFIX}{layer}.{PEFT_ROWS}"] = state_dict[f"{_PREFIX}{layer}.{NAME}"]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    draft = folder / "adapter_model.safetensors.tmp"
    save_file(tensors, draft, metadata={"format": "pt"})
    draft.replace(folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    share_permissions(folder, "adapter_config.json")
    return True


def save_prefix(model: nn.Module, tokenizer, template, folder: str | Path, trained: dict[str, Tensor]) -> None:
    """Write a folder with the prefix alone (and the trained scalar head), config, tokenizer and template; one process.

    trained: every trained parameter, whole, named as in model.named_parameters(). The config (ChatGLM) or peft's
    adapter_config.json names the model that the prefix belongs to; load_causal_lm and load_scalar_model open both, and
    peft opens its own format. As in save_model everything is read back before it is moved to its place. UserError if
    the folder is that model's own, whose weights would go.
    """
    network, folder = base_model(model), Path(folder)
    if Path(base_of(model)).is_dir() and Path(base_of(model)).resolve() == folder.resolve():
        raise UserError(f"--output_dir: {folder} holds the model that the prefix belongs to; give another folder.")
    network.config.architectures = [type(network).__name__]
    tensors = prefix_tensors(model, trained)
    with new_checkpoint(network, tokenizer, template, folder) as draft:
        network.config.save_pretrained(draft)
        if network.can_generate():
            network.generation_config.save_pretrained(draft)
        if is_peft(model):
            save_file(tensors, draft / "adapter_model.safetensors", metadata={"format": "pt"})
            peft_config_to_save(model).save_pretrained(draft)
            read_back = load_file(draft / "adapter_model.safetensors")
        else:
            custom_object_save(network, draft)  # the code beside the weights, as network.save_pretrained does it
            torch.save(tensors, draft / PREFIX_FILE)
            read_back = torch.load(draft / PREFIX_FILE, map_location="cpu", weights_only=True)
        if read_back.keys() != tensors.keys() or not all(torch.equal(read_back[name], tensors[name]) for name in tensors):
            raise OSError(f"{draft}: the prefix reads back differently; the disk or the file system is at fault")
