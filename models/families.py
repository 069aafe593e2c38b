"""The families of networks that Sanbu trains; a new family of transformers is a row here."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family of networks. block: how its blocks are named, {} for their number. linear: the linear layers in one of them.
    not_adapted: kinds of these that LoRA leaves alone. positions: where positions come from a table of fixed length, its name in
    config.json and its length where that says nothing.
    """

    block: str
    linear: tuple[str, ...]
    positions: tuple[str, int] | None = None
    not_adapted: tuple[str, ...] = ()

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Return the kinds of linear layers that LoRA adapts."""
        kinds = dict.fromkeys(name.rsplit(".", 1)[-1] for name in self.linear)
        return tuple(kind for kind in kinds if kind not in self.not_adapted)


def _layers(attention: str, names: str, mlp: str, more: str) -> tuple[str, ...]:
    return tuple(f"{part}{name}" for part, listed in ((attention, names), (mlp, more)) for name in listed.split())


_GATED = _layers("self_attn.", "q_proj k_proj v_proj o_proj", "mlp.", "gate_proj up_proj down_proj")
_FUSED_GATE = _layers("self_attn.", "q_proj k_proj v_proj o_proj", "mlp.", "gate_up_proj down_proj")
_FUSED_QKV = _layers("attention.", "query_key_value dense", "mlp.", "dense_h_to_4h dense_4h_to_h")
_FUSED_QKV_SELF = _layers("self_attention.", "query_key_value dense", "mlp.", "dense_h_to_4h dense_4h_to_h")
_OPT = _layers("self_attn.", "q_proj k_proj v_proj out_proj", "", "fc1 fc2")
_QKV_ALONE = ("dense", "dense_h_to_4h", "dense_4h_to_h")
FAMILIES = {
    "opt": Family("model.decoder.layers.{}.", _OPT, ("max_position_embeddings", 2048)),
    "bloom": Family("transformer.h.{}.", _FUSED_QKV_SELF),
    "llama": Family("model.layers.{}.", _GATED),
    "mistral": Family("model.layers.{}.", _GATED),
    "qwen2": Family("model.layers.{}.", _GATED),
    "qwen3": Family("model.layers.{}.", _GATED),
    "gpt2": Family("transformer.h.{}.", _layers("attn.", "c_attn c_proj", "mlp.", "c_fc c_proj"), ("n_positions", 1024)),
    "gpt_neox": Family("gpt_neox.layers.{}.", _FUSED_QKV),
    "chatglm": Family("transformer.encoder.layers.{}.", _FUSED_QKV_SELF, not_adapted=_QKV_ALONE),
    "glm": Family("model.layers.{}.", _FUSED_GATE),
    "glm4": Family("model.layers.{}.", _FUSED_GATE),
}
_CHATGLM_6B = Family("transformer.layers.{}.", _FUSED_QKV)  # of model_type chatglm too


def linear_names(config: dict[str, Any]) -> list[str]:
    """Return the names of all linear layers but the heads, from the content of a config.json: LoRA can be put on these.

    [] where it does not say how many blocks there are.
    """
    family = _CHATGLM_6B if "inner_hidden_size" in config else FAMILIES[config["model_type"]]
    blocks = next((config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config), 0)
    names = [family.block.format(number) + layer for number in range(blocks) for layer in family.linear]
    narrow = config.get("word_embed_proj_dim", config.get("hidden_size")) != config.get("hidden_size")  # OPT-350m
    return [*names, "model.decoder.project_in", "model.decoder.project_out"] if names and narrow else names
