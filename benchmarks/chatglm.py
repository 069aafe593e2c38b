"""Measure a ChatGLM of the published size with random weights: LoRA fine-tuning and generation, tokens/s and peak memory.

    python -m benchmarks.chatglm --generation chatglm-6b --shared ../shared --dtypes fp16 bf16 --output output/chatglm-bench
    python -m benchmarks.chatglm --generation chatglm2-6b --shared ../shared --scale 0.01 --dtypes fp32 --steps 2   # smoke

--shared: the folder with golden/<generation>/{official,tokenizer}. --scale shrinks width and depth for a smoke run.
Each figure comes from a process of its own. The table belongs into benchmarks/RESULTS.md.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.runs import as_flags, print_table, speed_and_memory

SHARD_BYTES = 2 << 30


def sizes(official: dict, scale: float) -> dict:
    """Return the fields of a smaller config: width, inner width and depth shrink, heads keep their number."""
    if scale == 1.0:
        return {}
    heads = official["num_attention_heads"]
    width = max(1, round(official["hidden_size"] * scale**0.5 / (4 * heads))) * 4 * heads
    inner = "inner_hidden_size" if "inner_hidden_size" in official else "ffn_hidden_size"
    small = {"hidden_size": width, inner: width * official[inner] // official["hidden_size"] // 2 * 2, "num_layers": 4}
    return small | ({"kv_channels": width // heads} if "kv_channels" in official else {})


def write_checkpoint(folder: Path, generation: str, shared: Path, scale: float) -> int:
    """Write random float16 weights in safetensors shards, tensor by tensor; return the number of parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    import models  # noqa: F401  (registers the networks)

    source = shared / "golden" / generation
    official = json.loads((source / "official" / "config.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(official | sizes(official, scale)))
    vocabulary = (shared / "golden" / "chatglm2-6b" if generation == "chatglm3-6b" else source) / "tokenizer"
    for file in [*vocabulary.iterdir(), *(source / "tokenizer").iterdir()]:
        (folder / file.name).write_bytes(file.read_bytes())
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).named_parameters())
    torch.manual_seed(0)
    shard, weight_map = {}, {}
    for number, (name, parameter) in enumerate(parameters.items(), 1):
        if parameter.dim() > 1:
            shard[name] = torch.empty(parameter.shape, dtype=torch.float16).normal_(0.0, 0.02)
        else:
            shard[name] = torch.full(parameter.shape, float(name.endswith("weight")), dtype=torch.float16)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES or number == len(parameters):
            save_file(shard, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, f"model-{number:05d}.safetensors")
            shard = {}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(parameter.numel() for parameter in parameters.values())


def fine_tune(folder: Path, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """Run LoRA steps of step 1 over texts of one length; return median tokens/s after two warm-up steps, peak memory."""
    data, output = args.output / "texts.jsonl", args.output / f"sft-{dtype}"
    rows = ({"prompt": f"问题{number}", "response": "好" * 4 * args.length} for number in range(args.batch * args.steps * 2))
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    flags = {"model_name_or_path": folder, "data_path": data, "data_split": "1,0,0", "output_dir": output, "dtype": dtype}
    flags |= {"lora_dim": 8, "gradient_checkpointing": True, "max_seq_len": args.length, "eval_fraction": 0}
    flags |= {"per_device_train_batch_size": args.batch, "max_steps": args.steps, "logging_steps": 1}
    subprocess.run([sys.executable, "-m", "training.step1_sft.main", *as_flags(flags)], check=True)
    return speed_and_memory(output, warm_up=2)


def generate_tokens(folder: Path, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """Answer a batch of prompts greedily at full length; return new tokens/s, median of three, and peak memory."""
    from inference.engine import generate_many
    from models.checkpoint_folder import open_checkpoint
    from models.device import peak_memory_gb
    from training.evaluate.common import load_for_evaluation

    loaded = load_for_evaluation(open_checkpoint(folder), dtype, "auto")
    prompts = loaded.template.encode_prompts(loaded.tokenizer, [[{"role": "user", "content": "好" * args.length}]])
    settings = {"max_new_tokens": args.new_tokens, "stop_token_ids": (), "pad_token_id": loaded.tokenizer.pad_token_id}
    speeds = []
    for _ in range(4):
        started = time.perf_counter()
        answers = generate_many(loaded.model, prompts * args.batch, max_batch=args.batch, greedy=True, **settings)
        speeds.append(int(answers.lengths.sum()) / (time.perf_counter() - started))  # reading lengths waits for the device
    return {"tokens_per_second": statistics.median(speeds[1:]), "peak_memory_gb": peak_memory_gb()}


def rows(folder: Path, args: argparse.Namespace) -> Iterator[list[object]]:
    """Measure each dtype; yield the rows of the table."""
    for dtype in args.dtypes:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            tasks = {
                "SFT, LoRA 8": fine_tune(folder, dtype, args),
                f"generation, {args.new_tokens} tokens": pool.submit(generate_tokens, folder, dtype, args).result(),
            }
        for task, row in tasks.items():
            yield [task, dtype, f"{row['tokens_per_second']:.0f}", f"{row['peak_memory_gb']:.2f}"]


def main() -> None:
    """Write the checkpoint, measure each dtype in processes of their own, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generation", choices=["chatglm-6b", "chatglm2-6b", "chatglm3-6b"], default="chatglm-6b")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "bf16"])
    for name, default in (("batch", 4), ("length", 512), ("steps", 6), ("new_tokens", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=Path("output/chatglm-bench"))
    args = parser.parse_args()
    folder = args.output / args.generation
    parameters = write_checkpoint(folder, args.generation, args.shared, args.scale)
    print(f"{args.generation}, {parameters:,} parameters, batch {args.batch} x {args.length} tokens\n")
    print_table(["task", "dtype", "tokens/s", "peak GB"], rows(folder, args))


if __name__ == "__main__":
    main()
