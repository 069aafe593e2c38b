"""From a checkpoint's folder to the network."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from errors import UserError
from models.adapters.prefix import OWN, PrefixPlan, add_prefix, check_prefix
from models.adapters.quantization import quantize_linears
from models.checkpoint_folder import CheckpointFolder, open_checkpoint
from models.device import rng_state, set_rng_state
from models.heads import score_name, start_head
from models.weight_files import ADAPTER_FILES, BASE_FIELD, first_line, load_pickled, tensor_names, weight_files
from models.zero3 import zero3_loading

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger("sanbu")


def load_causal_lm(
    path: str | Path | CheckpointFolder, *, dtype: torch.dtype, attn: str = "sdpa", dropout: float | None = 0.0, **options
) -> PreTrainedModel | PeftModel:
    """Return the language model of a checkpoint, for SFT, actor and reference.

    dropout: every dropout of the config, None keeps the checkpoint's. options: gradient_checkpointing=False;
    zero3_config=None, a DeepSpeed config with stage 3, splits the weights over the processes while they are read;
    tokenizer=None, one with more ids than the embedding has rows enlarges it (it never shrinks); quantization_bit=0,
    with 4 or 8 the blocks' linear layers become integers, for LoRA or P-Tuning. With integers, made so or stored so,
    zero3_config has no effect: what remains to be split is split when the engine is built.

    P-Tuning: pre_seq_len=0, with N a new prefix of N places is put before every text and all else is frozen;
    prefix_projection=False; ptuning_checkpoint=None, a folder whose saved prefix is taken instead; seed=0, of a new one.
    A folder that holds a prefix alone is opened together with the model that it names. ChatGLM's networks have prefixes
    of their own; any other model comes back inside a PeftModel.
    """
    model, missing, plan = _load(AutoModelForCausalLM, path, dtype, attn, dropout, **options)
    own = {name for name in missing if name.startswith(OWN)}
    if missing - own:
        raise UserError(
            f"model {path} lacks the weights {', '.join(sorted(missing)[:3])}; it is no causal language model."
        )
    if plan is None:
        return model
    if plan.saved is not None and plan.saved.head:
        raise UserError(f"model {path} is a reward model (a scalar head was trained with its prefix), no language model.")
    return add_prefix(model, plan, fresh=bool(own))


def load_scalar_model(
    path: str | Path | CheckpointFolder,
    *,
    dtype: torch.dtype,
    attn: str = "sdpa",
    dropout: float | None = 0.0,
    seed: int = 0,
    **options,
) -> PreTrainedModel | PeftModel:
    """Return a network with one score per position, for reward model and critic. options as in load_causal_lm.

    From a reward checkpoint the head is kept, and in the config what step 2 measured (reward_mean, reward_std). From a
    language model the head is new (heads.start_head). With a prefix, the head is trained too.
    """
    options |= {"num_labels": 1, "seed": seed}
    model, missing, plan = _load(AutoModelForSequenceClassification, path, dtype, attn, dropout, **options)
    own = {name for name in missing if name.startswith(OWN)}
    head = {name for name in missing if name.startswith(f"{score_name(model)}.")}
    if missing - own - head:
        raise UserError(f"model {path} lacks the weights {', '.join(sorted(missing)[:3])}; copy the checkpoint again.")
    if head:
        start_head(getattr(model, score_name(model)), seed)
    model.config.problem_type = "regression"
    return model if plan is None else add_prefix(model, plan, fresh=bool(own))


def _load(
    auto_class: type,
    path: str | Path | CheckpointFolder,
    dtype: torch.dtype,
    attn: str,
    dropout: float | None,
    *,
    gradient_checkpointing: bool = False,
    zero3_config: dict | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization_bit: int = 0,
    pre_seq_len: int = 0,
    prefix_projection: bool = False,
    ptuning_checkpoint: str | None = None,
    seed: int = 0,
    **config_fields,
) -> tuple[PreTrainedModel, set[str], PrefixPlan | None]:
    """Return the model in training mode, the names of the weights that the checkpoint did not have, and the prefix to give it."""
    checkpoint = open_checkpoint(path)
    bits = checkpoint.stored_bits  # weights that are missing or damaged end it here
    prefix = {"pre_seq_len": pre_seq_len, "prefix_projection": prefix_projection, "ptuning_checkpoint": ptuning_checkpoint}
    plan = checkpoint.prefix(seed=seed, **prefix)
    config = checkpoint.config(**config_fields)
    if plan is not None:
        check_prefix(plan, config, gradient_checkpointing)
        if hasattr(config, "pre_seq_len"):
            config.pre_seq_len, config.prefix_projection = plan.length, plan.projection
            config.quantization_bit = bits
    set_dropout(config, dropout)
    # Integers stay whole on every process, and so does what an adapter is merged into. In transformers 5.0 buffers were not
    # read while weights were split.
    with zero3_loading(None if quantization_bit or bits or checkpoint.adapters else zero3_config):
        model, missing = read_weights(auto_class, checkpoint, config, dtype, attn)
        if tokenizer is not None:
            fit_embeddings(model, tokenizer, seed)
    if checkpoint.adapters:
        missing -= merge_adapters(model, checkpoint)
    if quantization_bit:
        quantize_linears(model, quantization_bit)  # what the checkpoint itself quantises stays as it is
    # An Embedding with padding_idx gives that row no gradient; where pad is the end token, the end token would never be
    # learned.
    model.get_input_embeddings().padding_idx = None
    return ready_to_train(model, gradient_checkpointing), missing, plan


def read_weights(
    auto_class: type, checkpoint: CheckpointFolder, config: PretrainedConfig, dtype: torch.dtype, attn: str
) -> tuple[PreTrainedModel, set[str]]:
    """Build the network of a config with the weights of a checkpoint; also the names of those that it did not have."""
    network = auto_class._model_mapping[type(config)]
    if attn == "sdpa" and not network._supports_sdpa:
        logger.info("%s has no sdpa attention; eager is used.", network.__name__)
        attn = "eager"
    try:
        options = {"config": config, "dtype": dtype, "attn_implementation": attn, "output_loading_info": True}
        source, files = checkpoint.weights, weight_files(checkpoint.weights)
        if torch.__version__ < (2, 6) and files[0].suffix != ".safetensors":
            # transformers has such a torch read no .bin file. That of DCU is 2.4, and ChatGLM is published in them.
            source, options["state_dict"] = None, {name: one for file in files for name, one in load_pickled(file).items()}
        model, info = network.from_pretrained(source, **options)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # each field of a config has its own
        file, reason = checkpoint.weights / "config.json", f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{file}: transformers makes no network of it ({reason}); correct it, or copy the file again.") from error
    except RuntimeError as error:
        if "mismatch" not in str(error).lower():
            raise
        raise UserError(
            f"the weights of {checkpoint.path} do not have the shapes that its config.json says ({first_line(error)})."
        ) from error
    return model, set(info["missing_keys"])


def merge_adapters(model: PreTrainedModel, checkpoint: CheckpointFolder) -> set[str]:
    """Add the adapters of a checkpoint to the weights over which they were trained; returns the names of what they replaced.

    Raises UserError for an adapter that does not fit.
    """
    from peft import PeftModel, get_peft_model_state_dict

    brought = set()
    for folder in checkpoint.adapters:
        file = folder / next(name for name in ADAPTER_FILES if (folder / name).is_file())
        stored = tensor_names(file)
        try:
            with torch.random.fork_rng(devices=[]):  # peft draws what it then reads; the run's own draws stay
                adapted = PeftModel.from_pretrained(model, folder)
        except (ValueError, RuntimeError, LookupError) as error:  # by what differs: layers, shapes, ids
            raise UserError(f"{file} does not fit over {checkpoint.folder} ({first_line(error)}); correct {BASE_FIELD}.") from error
        lacking = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - stored
        if lacking:  # peft only warns
            raise UserError(f"{file} lacks {min(lacking)}, which belongs over {checkpoint.folder}; correct {BASE_FIELD}.")
        adapted.merge_and_unload()
        brought |= {name.removeprefix("base_model.model.") for name in stored}
        logger.info("%s: the adapter is merged into the weights of %s.", folder, checkpoint.folder)
    model.requires_grad_(True)
    model.name_or_path = str(checkpoint.adapters[-1].resolve())  # an adapter over this model names it as its base
    return brought


def ready_to_train(network: PreTrainedModel, gradient_checkpointing: bool) -> PreTrainedModel:
    """Return the network in training mode, as the loaders give every model."""
    if gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return network.train()


def set_dropout(config: PretrainedConfig, value: float | None) -> None:
    """Set every dropout probability of a config (dropout, attention_dropout, resid_pdrop, …); None leaves them.

    layerdrop is 0 always: with ZeRO-3, processes that skip different layers wait for each other for ever.
    """
    for name, now in config.to_dict().items():
        if "layerdrop" in name:
            setattr(config, name, 0.0)
        elif value is not None and re.search(r"drop(out)?$", name) and type(now) in (int, float):
            setattr(config, name, float(value))


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
    """Enlarge the embedding when the tokenizer has more ids than it has rows. Spare rows stay: BLOOM has them by design.

    New rows are drawn near the mean of the others, the same for a seed: PPO's actor and reference start equal. Where the
    embedding is frozen, LoRA trains them (adapters/new_rows.py).
    """
    weight = model.get_input_embeddings().weight
    rows = getattr(weight, "ds_shape", weight.shape)[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        logger.info("the embedding grows from %d to %d rows, for the tokenizer's new tokens.", rows, needed)
        card = rng_state()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(needed)
        set_rng_state(card)  # the seed is the card's too
