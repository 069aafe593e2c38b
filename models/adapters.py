"""LoRA through peft: which layers, what is trained, the model without it (the reference), saved alone and merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from errors import UserError
from models.factory import FAMILIES

_NAME = "default"  # peft can hold several adapters; we use one


def add_lora(
    model: PreTrainedModel, dim: int, alpha: float, dropout: float = 0.0, module_name: str = "auto"
) -> PeftModel:
    """Put LoRA (Hu et al. 2021, arXiv 2106.09685) into the model: W x + alpha/dim · B A x, B = 0 at the start.

    module_name: "auto" for all linear layers of attention and MLP, or parts of module names separated by commas; a
    layer is adapted when its name contains one of them ("decoder.layers.", "q_proj,v_proj"). The output matrix and the
    scalar head never are. Trained are the adapter and, if the model has one, the scalar head; all else is frozen. The
    adapter has the model's dtype: DeepSpeed, which casts whole modules, keeps float32 masters of what is trained.
    UserError if no layer matches.
    """
    names = lora_targets(model, module_name)
    scalar = hasattr(model, "score")
    config = LoraConfig(
        r=dim,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # published adapters list short names; they say the same for "auto"
        target_modules=list(FAMILIES[model.config.model_type].lora_targets) if module_name == "auto" else names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        modules_to_save=["score"] if scalar else None,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def lora_targets(model: PreTrainedModel, module_name: str = "auto") -> list[str]:
    """The full names of the linear layers (GPT-2's Conv1D included) that module_name selects."""
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    layers = [
        name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D)) and layer not in heads
    ]
    if module_name == "auto":
        return [name for name in layers if name.rsplit(".", 1)[-1] in FAMILIES[model.config.model_type].lora_targets]
    parts = [part.strip() for part in module_name.split(",") if part.strip()]
    chosen = [name for name in layers if any(part in name for part in parts)]
    if not chosen:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise UserError(
            f"--lora_module_name {module_name} matches no linear layer of this {model.config.model_type} model; "
            f"its layers are named like {layers[0]}, the kinds are {', '.join(kinds)}. Use part of a name, or auto."
        )
    return chosen


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as if there were no adapter: the reference of PPO without a second copy of the
    weights.
    """
    with model.disable_adapter():
        yield


def merged_state_dict(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of the plain model with the adapter added in: W + alpha/dim · B A, summed in float32, in W's dtype.

    state_dict: whole tensors named as in model.state_dict(), where the module's own are split (ZeRO-3). Returns the
    names of the plain model; the module is not changed. A model without an adapter gives its own weights.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    if not isinstance(model, PeftModel):
        return state_dict
    prefix = "base_model.model."
    merged = {}
    for name, tensor in state_dict.items():
        plain = name.removeprefix(prefix)
        if ".lora_" in plain or ".original_module." in plain:
            continue
        merged[plain.replace(".base_layer.", ".").replace(f".modules_to_save.{_NAME}.", ".")] = tensor
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            down = state_dict[f"{prefix}{name}.lora_A.{_NAME}.weight"].float()
            up = state_dict[f"{prefix}{name}.lora_B.{_NAME}.weight"].float()
            change = layer.scaling[_NAME] * (up @ down)
            weight = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (weight.float() + (change.T if layer.fan_in_fan_out else change)).to(
                weight.dtype
            )
    return merged


def save_adapter(model: nn.Module, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> bool:
    """Write the adapter alone (and the trained scalar head) into the folder, in the format that
    PeftModel.from_pretrained opens.

    state_dict as in merged_state_dict. Returns False, and writes nothing, for a model without an adapter.
    """
    if not isinstance(model, PeftModel):
        return False
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    draft = folder / "adapter_model.safetensors.tmp"
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft, metadata={"format": "pt"}
    )
    draft.replace(folder / "adapter_model.safetensors")
    model.peft_config[_NAME].save_pretrained(folder)
    return True
