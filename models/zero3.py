"""Weights that DeepSpeed's ZeRO-3 splits over the processes: loaded split, and whole for a moment."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def zero3_loading(config: dict | None) -> Iterator[None]:
    """Let transformers load models, inside the block, split over the processes by this DeepSpeed config; None: plainly."""
    if config is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    keep = HfDeepSpeedConfig(config)  # transformers holds only a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Make the parameters whole inside on every process, and what process 0 writes counts; no effect without ZeRO-3."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield
