"""A model as one GGUF file (ggml's docs/gguf.md): weights, sizes, tokenizer and chat template. Names come from the package gguf.

llama.cpp has one network for each architecture and takes its details for granted: a model that differs in one is refused.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from errors import UserError, refuse
from models.checkpoint_folder import CheckpointFolder
from scripts.export.vocabulary import add_vocabulary, modelfile

# By model_type: the architecture's name in gguf.MODEL_ARCH. ChatGLM-6B has the type of ChatGLM2 and another network.
ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gpt2": "GPT2",
    "bloom": "BLOOM",
    "chatglm": "CHATGLM",
}
# What llama.cpp takes for granted, by the field's name in config.json.
GRANTED = {
    "hidden_act": "silu",
    "activation_function": "gelu_new",
    "sliding_window": None,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
}
FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
TENSOR_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check_gguf(checkpoint: CheckpointFolder, scores: bool) -> None:
    """Raise UserError if the package is missing, or if GGUF has no place for the model."""
    refuse(scores, f"{checkpoint.path} is a reward model, and a GGUF of one opens nowhere; export it as safetensors.")
    config = checkpoint.config()
    first = config.model_type == "chatglm" and getattr(config, "position_encoding_2d", False)
    if first or config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{checkpoint.path}: llama.cpp has no network for {'ChatGLM-6B' if first else config.model_type}, so there is no "
            f"GGUF of it; {', '.join(ARCHITECTURES)} (2 and 3) have one. Export it as safetensors."
        )
    for name, value in GRANTED.items():
        found = getattr(config, name, value)
        refuse(
            found != value,
            f"{checkpoint.path}: {name} is {found!r}, and llama.cpp computes with {value!r}; export it as safetensors.",
        )
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("--format gguf needs the package gguf; pip install -r requirements-serve.txt") from error


def write_gguf(
    network: Any,
    state_dict: dict[str, Tensor],
    tokenizer: Any,
    template: Any,
    folder: Path,
    dtype: torch.dtype,
    pre_tokenizer: str,
) -> Path:
    """Write model.gguf and Ollama's Modelfile into the folder; return the file. Matrices have the dtype, vectors float32.

    state_dict: float weights, named as in network.state_dict(). pre_tokenizer: as vocabulary.name_pre_tokenizer gives it.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quant_shape_to_byte_shape, quantize

    arch = MODEL_ARCH[ARCHITECTURES[network.config.model_type]]
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".draft"
    writer = GGUFWriter(draft, MODEL_ARCH_NAMES[arch])
    writer.add_name(folder.resolve().name)
    writer.add_file_type(LlamaFileType[FILE_TYPES[dtype]])
    add_sizes(writer, network)
    try:
        add_vocabulary(writer, tokenizer, template, network.config.vocab_size, pre_tokenizer)
        tensors = []
        for name, tensor in named_tensors(network, state_dict, arch):
            # Kernels of ggml want vectors, and GPT-2's table of positions, in float32.
            wide = tensor.dim() == 1 or name.startswith("position_embd")
            kind = GGMLQuantizationType["F32" if wide else TENSOR_TYPES[dtype]]
            tensors.append((tensor, kind))
            shape = quant_shape_to_byte_shape(tensor.shape, kind)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in tensors:  # one at a time: a second copy of all weights may not fit
            writer.write_tensor_data(quantize(tensor.float().contiguous().numpy(), kind))
        writer.close()
        (folder / "Modelfile").write_text(modelfile(tokenizer, template), encoding="utf-8")
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft.rename(folder / "model.gguf")


def add_sizes(writer: Any, network: Any) -> None:
    """Write the numbers of config.json under GGUF's names. UserError for rotary positions that llama.cpp cannot compute."""
    config = network.config
    heads, kind = config.num_attention_heads, config.model_type
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    # BLOOM's positions have no end; it was trained on 2048
    writer.add_context_length(getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", 2048))
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    if kind in ("gpt2", "bloom"):
        writer.add_head_count_kv(heads)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    chatglm = kind == "chatglm"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_head_count_kv(config.num_groups if chatglm else config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.layernorm_epsilon if chatglm else config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim // 2 if chatglm else head_dim)  # ChatGLM2 rotates half of each head
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    known = ("default", "linear", "llama3") if kind in ("llama", "mistral") else ("default",)
    rotation = rope.get("rope_type", "default")
    refuse(
        rotation not in known,
        f"rope_type {rotation!r} of this {kind} model is not written as GGUF; export safetensors.",
    )


def named_tensors(network: Any, state_dict: dict[str, Tensor], arch: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield GGUF's name of each weight and the weight in the order of rows that llama.cpp computes with; tied ones once."""
    from gguf import get_tensor_name_map

    config = network.config
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    transposed = {f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, Conv1D)}
    for name, tensor in state_dict.items():
        if network.all_tied_weights_keys.get(name) in state_dict or name.endswith("inv_freq"):
            continue
        layer, part = name.split(".")[-2:]
        if name in transposed:
            tensor = tensor.T
        elif layer in ("q_proj", "k_proj") and arch.name == "LLAMA":
            tensor = pairs_together(tensor, config.head_dim)
        elif layer == "query_key_value" and arch.name == "BLOOM":
            tensor = queries_first(tensor, config.n_head)
        plain = name.removesuffix(f".{part}")
        known = names.get_name(plain) or names.get_name(plain.removeprefix("transformer."))
        refuse(known is None, f"the weight {name} has no place in a GGUF of this architecture; export as safetensors.")
        yield f"{known}.{part}", tensor.cpu()
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
        rope = network.model.rotary_emb  # LLaMA 3.1's slower rotation, as one factor a frequency
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        yield "rope_freqs.weight", config.rope_parameters["rope_theta"] ** -half / rope.inv_freq.float().cpu()


def pairs_together(weight: Tensor, head_dim: int) -> Tensor:
    """Return the rows of LLaMA's queries or keys with those side by side that are rotated together.

    weight: [heads * head_dim, ...]. transformers rotates row i of a head with row i + head_dim / 2, llama.cpp row 2 i with 2 i + 1.
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def queries_first(weight: Tensor, heads: int) -> Tensor:
    """Return BLOOM's fused rows with all queries first, then all keys, then all values.

    weight: [heads * 3 * head_dim, ...], query, key and value of each head side by side.
    """
    return weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).reshape(weight.shape)
