"""How much memory do the four models of PPO take, with --memory_mode separate and shared?

    python -m benchmarks.shared_trunk [--width 1024] [--layers 8] [--vocabulary 16000] [--rank 16]

Writes a random LLaMA and a reward model over it (LoRA, merged, with its adapter) in a temporary folder, builds step 3's
models in a fresh process for each mode, and prints what that process held at its peak while it built them, what it holds
afterwards, and what the tensors of all models add up to, each storage counted once. Linux only: the figures of the
process come from /proc/self/status. Exit code 1 if shared takes more than 1.15 models and the adapters.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.loading_memory import Peak, held

LIMIT = 1.15
MODES = ("separate", "shared")


def write_models(folder: Path, width: int, layers: int, vocabulary: int, rank: int) -> None:
    """An actor and a reward model trained from it, float32."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from models.adapters.lora import add_lora, merged_state_dict, save_adapter
    from models.heads import base_model
    from models.load import load_scalar_model
    from models.save import save_model
    from models.templates import load_template

    tokens = ["<s>", "</s>", *(f"w{number}" for number in range(98))]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "actor")
    tokenizer.save_pretrained(folder / "actor")
    model = add_lora(load_scalar_model(folder / "actor", dtype=torch.float32), rank, 2 * rank)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    base_model(model).config.update({"reward_mean": 0.0, "reward_std": 1.0})
    template = load_template(folder / "actor", tokenizer)
    save_model(model, tokenizer, template, folder / "reward", merged_state_dict(model))
    save_adapter(model, folder / "reward" / "adapter")


def measure(folder: Path, mode: str, rank: int) -> dict[str, float]:
    """Build the models of step 3 in this process and look."""
    from models.load import load_tokenizer
    from training.step3_ppo.rlhf_engine import DeepSpeedRLHFEngine
    from training.utils.flags.parse import parse
    from training.utils.flags.steps import PPOArguments
    from training.utils.run.process_group import Run

    args = parse(PPOArguments, [
        "--actor_model_name_or_path", str(folder / "actor"), "--critic_model_name_or_path", str(folder / "reward"),
        "--memory_mode", mode, "--actor_lora_dim", str(rank), "--critic_lora_dim", str(rank), "--dtype", "fp32",
        "--data_path", "unused.jsonl", "--output_dir", str(folder / mode),
    ])  # fmt: skip
    tokenizer = load_tokenizer(args.actor_model_name_or_path)
    run = Run.start(args)
    import deepspeed  # noqa: F401  (its import is not what is measured)
    import peft  # noqa: F401

    before = held()
    with Peak() as peak:
        engine = DeepSpeedRLHFEngine(args.actor_model_name_or_path, args.critic_model_name_or_path, tokenizer, 10, args, run)
        networks = [engine.ref, engine.reward, engine.actor.module, engine.critic.module]
        tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
        for tensor in tensors:   # pages of a mapped file count when they are read
            tensor.detach().view(-1)[:: 4096 // tensor.element_size()].sum()
    gc.collect()
    own, files = (now - then for now, then in zip(held(), before, strict=True))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    small = {
        id(tensor): tensor.nbytes
        for network in networks
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
        if tensor.requires_grad or "frozen_" in name
    }
    model = sum(parameter.nbytes for parameter in engine.ref.parameters())
    return {
        "model": model, "adapters": sum(small.values()), "tensors": sum(storages.values()),
        "peak": peak.total, "held": own + files,
    }  # fmt: skip


def main() -> None:
    """Both modes, a table, and whether the limit holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 1024), ("layers", 8), ("vocabulary", 16000), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("folder", "mode"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode == "write":
        write_models(Path(args.folder), args.width, args.layers, args.vocabulary, args.rank)
        return
    if args.mode:
        print(json.dumps(measure(Path(args.folder), args.mode, args.rank)))
        return
    with tempfile.TemporaryDirectory() as name:
        sizes = [f"--{name}={getattr(args, name)}" for name in ("width", "layers", "vocabulary", "rank")]
        argv = [sys.executable, "-m", "benchmarks.shared_trunk", "--folder", name, *sizes]
        subprocess.run([*argv, "--mode", "write"], check=True, stdout=subprocess.DEVNULL)
        found = {}
        print("| mode | one model, MB | adapters and heads, MB | all tensors / model | process at its peak / model | afterwards |")
        print("|---|---|---|---|---|---|")
        for mode in MODES:
            done = subprocess.run([*argv, "--mode", mode], check=True, stdout=subprocess.PIPE, text=True)
            one = found[mode] = json.loads(done.stdout.splitlines()[-1])
            parts = [f"{one[name] / one['model']:.2f}" for name in ("tensors", "peak", "held")]
            print(f"| {mode} | {one['model'] / 1e6:.0f} | {one['adapters'] / 1e6:.1f} | {' | '.join(parts)} |", flush=True)
    shared = found["shared"]
    sys.exit(shared["tensors"] > LIMIT * shared["model"] + shared["adapters"])


if __name__ == "__main__":
    main()
