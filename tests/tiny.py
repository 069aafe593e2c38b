"""Tiny checkpoints of every family: real config classes, random weights, a tokenizer trained on the spot."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from models.load import load_scalar_model
from models.save import save_model
from models.templates import load_template
from models.tokenizer import load_tokenizer

FAMILIES = ("opt", "bloom", "llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "glm", "glm4")
SPARE_ROWS = 8  # more embedding rows than tokens, as BLOOM and Qwen have

TEXT = [
    "Human: How do I bake bread? Assistant: Mix flour, water, salt and yeast, wait an hour, and bake it.",
    "Human: What is the capital of France? Assistant: The capital of France is Paris.",
    "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9 10 100 1000",
    "问：你好，今天天气怎么样？答：你好！今天天气很好，适合出去走走。",
    "问：怎么做面包？答：把面粉、水、盐和酵母混合，等一个小时，然后烤。",
]
# What the family's own tokenizers do: the special tokens, whether a text starts with bos, whether there is a pad token.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIALS: dict[str, dict] = {
    "opt": {"tokens": ["</s>", "<pad>"], "bos": "</s>", "eos": "</s>", "pad": "<pad>", "starts": True},
    "bloom": {"tokens": ["<unk>", "<s>", "</s>", "<pad>"], "bos": "<s>", "eos": "</s>", "pad": "<pad>"},
    "llama": {"tokens": ["<unk>", "<s>", "</s>", "<pad>"], "bos": "<s>", "eos": "</s>", "pad": "<pad>", "starts": True},
    "qwen2": {
        "tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "eos": "<|im_end|>",
        "pad": "<|endoftext|>",
        "chat": CHATML,
    },
    "gpt2": {"tokens": ["<|endoftext|>"], "bos": "<|endoftext|>", "eos": "<|endoftext|>"},
    "glm4": {
        "tokens": ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
        "eos": "<|endoftext|>",
        "pad": "<|endoftext|>",
        "chat": GLM,
    },
}
for name, like in {"mistral": "llama", "qwen3": "qwen2", "gpt_neox": "gpt2", "glm": "glm4"}.items():
    SPECIALS[name] = SPECIALS[like]


def tiny_tokenizer(family: str, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the family's special tokens; gpt2 and gpt_neox have no pad token of their own."""
    special = SPECIALS[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special["tokens"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if special.get("starts"):
        bos = special["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{role}_token": special[role] for role in ("bos", "eos", "pad") if role in special},
        additional_special_tokens=special["tokens"],
    )
    if "chat" in special:
        fast.chat_template = special["chat"]
    return fast


def tiny_config(family: str, vocab_size: int, tokenizer: PreTrainedTokenizerFast, **changes):
    """The family's config, a few thousand parameters."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    size = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "head_dim": 8,
        "rope_theta": 10000.0,
    }
    small = {"vocab_size": vocab_size, "hidden_size": 32}
    opt = small | {
        "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 256, "word_embed_proj_dim": 32,
    }  # fmt: skip
    gpt2 = {"vocab_size": vocab_size, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    neox = {name: value for name, value in size.items() if name not in ("num_key_value_heads", "head_dim")}
    rows = {
        "opt": (OPTConfig, opt),
        "bloom": (BloomConfig, small | {"n_layer": 2, "n_head": 4}),
        "llama": (LlamaConfig, size),
        "mistral": (MistralConfig, size | {"sliding_window": None}),
        "qwen2": (Qwen2Config, size | {"tie_word_embeddings": True}),
        "qwen3": (Qwen3Config, size | {"tie_word_embeddings": True}),
        "gpt2": (GPT2Config, gpt2),
        "gpt_neox": (GPTNeoXConfig, neox),
        "glm": (GlmConfig, size),
        "glm4": (Glm4Config, size),
    }
    config_class, fields = rows[family]
    return config_class(**(fields | ids | changes))


def tiny_checkpoint(folder: Path, family: str, *, seed: int = 0, vocab_size: int = 400, **changes) -> Path:
    """Write a random checkpoint of the family with its tokenizer into the folder; changes go to the config. Returns the
    folder.
    """
    tokenizer = tiny_tokenizer(family, vocab_size)
    config = tiny_config(family, len(tokenizer) + SPARE_ROWS, tokenizer, **changes)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the default start is so small that every token is equally likely; tests want differences
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_reward_model(base: Path, folder: Path, *, seed: int = 3, **figures: float) -> Path:
    """Write a reward model over a language model's folder, as step 2 saves it; figures go to its config. Returns the folder."""
    model, tokenizer = load_scalar_model(base, dtype=torch.float32, seed=seed), load_tokenizer(base)
    model.config.update(figures)
    save_model(model, tokenizer, load_template(base, tokenizer), folder)
    return folder
