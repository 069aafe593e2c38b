"""Builds engines of scaled-down models and counts the bytes of their real tensors; test_memory_measured.py compares."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from models.adapters.lora import add_lora
from models.adapters.quantization import quantize_linears
from models.chatglm.registration import chatglm_config_class
from models.device import has_accelerator, peak_memory_gb, reset_peak_memory
from models.heads import TokenLogProbs, TokenScores
from training.utils.engine.build import build_engine
from training.utils.engine.configs import EngineOptions
from training.utils.engine.step import optimizer_step
from training.utils.flags.steps import SFTArguments
from training.utils.memory.footprint import Ledger
from training.utils.run.process_group import Run


def tensors() -> list[torch.Tensor]:
    """One tensor for every storage in this process."""
    found = {}
    for thing in gc.get_objects():
        try:
            if isinstance(thing, torch.Tensor) and not thing.is_meta:
                found.setdefault(thing.untyped_storage()._cdata, thing)
        except (ReferenceError, RuntimeError, NotImplementedError):
            continue
    return list(found.values())


def config_of(fields: dict[str, Any]) -> Any:
    """The config of a case; ChatGLM's two generations have one model_type."""
    if fields["model_type"] == "chatglm":
        return chatglm_config_class(fields)(**{name: value for name, value in fields.items() if name != "model_type"})
    return AutoConfig.for_model(**fields)


def measure(case: dict[str, Any], folder: Path) -> dict[str, int]:
    """Bytes that the engine holds between two optimizer steps, and the most beside them within one; of a card its peak."""
    gc.collect()
    before = {tensor.untyped_storage()._cdata for tensor in tensors()}
    # Small buckets: DeepSpeed's own, of 5e8 elements, would hide everything else of a small model.
    bucket = folder / f"bucket{os.environ.get('RANK', 0)}.json"
    bucket.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": case["bucket"]}}))
    flags = {"zero_stage": case["stage"], "offload_optimizer": case.get("offload", False), "dtype": case["dtype"]}
    flags["deepspeed_config"] = str(bucket)
    args = SFTArguments(model_name_or_path="unused", output_dir=str(folder / "out"), learning_rate=1e-3, **flags)
    run = Run.start(args)
    config = config_of(case["config"])
    auto = AutoModelForSequenceClassification if case.get("scalar") else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=run.dtype, attn_implementation=case["attn"])
    if case.get("bits"):
        quantize_linears(model, case["bits"])
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.get("lora"):
        model = add_lora(model, dim=case["lora"], alpha=1.0, module_name=case.get("names", "auto"))
    model = (TokenScores if case.get("scalar") else TokenLogProbs)(model.train())
    engine = build_engine(model, EngineOptions.of(args), run, steps=9)
    batch, length = case["shape"]
    ids = torch.arange(batch * length).view(batch, length) % (config.vocab_size - 8) + 4
    if hasattr(config, "gmask_token_id"):
        ids[:, -9], ids[:, -8] = config.gmask_token_id, config.bos_token_id
    loss_of = lambda micro: engine(micro, torch.ones_like(micro)).mean()  # noqa: E731
    ids = ids.to(run.device)
    reset_peak_memory()
    optimizer_step(engine, [ids, ids], loss_of, run)  # makes the optimizer's states
    gc.collect()
    if has_accelerator():  # backward runs in threads that a ledger does not see
        return {"peak": int(peak_memory_gb() * 1e9)}
    held = tensors()
    own = sum(tensor.untyped_storage().nbytes() for tensor in held if tensor.untyped_storage()._cdata not in before)
    ledger = Ledger(held)
    del held
    with ledger:
        optimizer_step(engine, [ids, ids], loss_of, run)
    engine.destroy()
    return {"static": own, "passing": ledger.peak}


def main() -> None:
    """Arguments: the file with the cases, and the folder for the results."""
    file, folder = map(Path, [argument for argument in sys.argv[1:] if "local_rank" not in argument][:2])
    found = [measure(case, folder) for case in json.loads(file.read_text())]
    if os.environ.get("RANK", "0") == "0":
        (folder / f"{file.stem}-found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
