"""The families of networks that Sanbu trains; a new family of transformers is a row here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family of networks. lora_targets: the linear layers that LoRA adapts. positions: where positions come from a table of
    fixed length, its name in config.json and its length where that says nothing.
    """

    lora_targets: tuple[str, ...]
    positions: tuple[str, int] | None = None


_GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED_GATE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
_FUSED_QKV = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
FAMILIES = {
    "opt": Family(("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), ("max_position_embeddings", 2048)),
    "bloom": Family(_FUSED_QKV),
    "llama": Family(_GATED),
    "mistral": Family(_GATED),
    "qwen2": Family(_GATED),
    "qwen3": Family(_GATED),
    "gpt2": Family(("c_attn", "c_proj", "c_fc"), ("n_positions", 1024)),
    "gpt_neox": Family(_FUSED_QKV),
    "chatglm": Family(("query_key_value",)),
    "glm": Family(_FUSED_GATE),
    "glm4": Family(_FUSED_GATE),
}
