"""How well and how fast PPO learns on the demo's task: every --advantage, and TRL's PPO.

    python -m benchmarks.ppo_learning --trl-python ../trl/bin/python --output output/ppo_learning
    python -m benchmarks.ppo_learning --smoke --output output/smoke            # seconds; shows that it runs, measures nothing

--trl-python is an interpreter with trl==1.12.0, torch and transformers; without it TRL is left out. The demo's SFT and reward
model are trained once and shared by all methods and seeds. gae and TRL run side by side, so that whatever else the machine does
slows both, with the same prompts in the same order, the same rates and optimizer. One judge answers held-out prompts with every
policy. Training without imports and loading is on the clock. Writes results.jsonl, a line a run, and prints a table.

TRL is set other than by its defaults as follows, because:
- float32, no gradient checkpointing, fused AdamW, one forward for the whole rollout: the fastest that TRL has on a CPU;
- gradient_accumulation_steps 1, for with more of them TRL takes fewer optimizer steps than num_mini_batches says;
- an optimizer with two groups, so that policy and critic learn with the same rates as ours, on the same straight line down;
- our prompts in our order, in place of TRL's own shuffle;
- scores (and values) in units of the reward model's spread, which ours subtracts and divides by: TRL has no such option.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.runs import as_flags, print_table
from errors import UserError, told

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = ROOT / "data/demo/prompts_heldout.jsonl"
METHODS = ("gae", "grpo", "rloo", "reinforce++")
GROUPED = ("grpo", "rloo")  # these compare answers to the same prompt
TRL = "trl"
ANSWER_TOKENS = 24
JUDGE_SEED = 10**9
HEAD = ("seed", "method", "gold after ± SE", "KL, nats", "ended", "tokens", "CPU seconds", "of TRL's")


@dataclass(frozen=True)
class Budget:
    """Settings of both sides; rates fall on a straight line to 0, clip ranges are 0.2, lambda is 0.95."""

    rollouts: int = 12
    rollout_size: int = 64  # answers
    minibatch: int = 16
    epochs: int = 1
    answers_per_prompt: int = 4  # grpo and rloo, with that many fewer prompts
    actor_learning_rate: float = 5e-4
    critic_learning_rate: float = 1e-3
    kl_coef: float = 0.1
    adam_beta2: float = 0.95
    vf_coef: float = 0.1  # TRL's default; with Adam and no gradient clipping it matters little
    micro_batch_tokens: int = 512  # of ours, like beside like; TRL is fastest with the whole minibatch at once


SMOKE = Budget(rollouts=2, rollout_size=8, minibatch=4, answers_per_prompt=2)


# --- one training, in a process of its own --------------------------------------------------------------------------------


def train_ours(settings: dict[str, Any]) -> None:
    """Run step 3, the loop that users run; time is counted from the first rollout to the end of the last update."""
    from training.step3_ppo import main as step3
    from training.utils.flags.parse import parse
    from training.utils.flags.steps import PPOArguments

    clock: list[tuple[float, float]] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            clock.append(now())
            result = method(*given)
            clock.append(now())
            return result

        return call

    trainer = step3.DeepSpeedPPOTrainer
    trainer.generate_experience, trainer.train_rlhf = timed(trainer.generate_experience), timed(trainer.train_rlhf)
    step3.main(parse(PPOArguments, settings["flags"]))
    write_time(settings, clock[0], clock[-1])


def now() -> tuple[float, float]:
    """Return seconds, and seconds of CPU of this process with all its threads."""
    return time.perf_counter(), time.process_time()


def write_time(settings: dict[str, Any], start: tuple[float, float], end: tuple[float, float]) -> None:
    """Write time.json into the run's folder."""
    seconds, cpu = (after - before for before, after in zip(start, end, strict=True))
    (Path(settings["output"]) / "time.json").write_text(json.dumps({"seconds": seconds, "cpu_seconds": cpu}))


def train_trl(settings: dict[str, Any]) -> None:
    """Train with TRL's PPOTrainer. Runs under an interpreter that has trl and of ours only what is imported above."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch
    from datasets import Dataset
    from torch import nn
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Normalised(nn.Module):
        """A score head whose scores have mean 0 and spread 1, by the statistics that step 2 stored."""

        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return (self.head(hidden) - settings["reward_mean"]) / settings["reward_std"]

    class Clock(TrainerCallback):
        def on_train_begin(self, *given, **more) -> None:
            self.start = now()

    rows = [row for rollout in settings["prompts"] for row in rollout]
    budget = Budget(**settings["budget"])
    size, minibatches = budget.rollout_size, budget.rollout_size // budget.minibatch
    tokenizer = AutoTokenizer.from_pretrained(settings["sft"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(settings["sft"], dtype=torch.float32) for _ in range(2))
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(settings["reward"], num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    for model in (reward, critic):
        model.score = Normalised(model.score)
    rates = {policy: budget.actor_learning_rate, critic: budget.critic_learning_rate}
    groups = [{"params": list(model.parameters()), "lr": rate} for model, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, budget.adam_beta2), eps=1e-8, weight_decay=0.0, fused=True)
    # TRL moves the rates once a rollout, ours at every optimizer step: the mean of ours over the rollout.
    steps = budget.epochs * minibatches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: max(0.0, 1 - (update * steps + (steps - 1) / 2) / (budget.rollouts * steps))
    )
    on_a_cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    config = PPOConfig(
        output_dir=settings["output"],
        seed=settings["seed"],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1,
        num_mini_batches=minibatches,
        num_ppo_epochs=budget.epochs,
        total_episodes=size * budget.rollouts,
        response_length=ANSWER_TOKENS,
        local_rollout_forward_batch_size=size,
        temperature=1.0,
        kl_coef=budget.kl_coef,
        vf_coef=budget.vf_coef,
        missing_eos_penalty=1.0,
        stop_token="eos",
        **on_a_cpu | {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "num_sample_generations": 0},
    )
    clock = Clock()
    dataset = Dataset.from_dict({"input_ids": rows})
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(min(8, len(dataset)))),
        optimizers=(optimizer, schedule),
        callbacks=[clock],
    )
    trainer.dataloader = DataLoader(dataset, batch_size=size, shuffle=False, collate_fn=trainer.data_collator)
    trainer.train()
    write_time(settings, clock.start, now())
    trainer.model.policy.save_pretrained(Path(settings["output"]) / "step3/actor")


# --- the judge ------------------------------------------------------------------------------------------------------------


def judge(sft: Path, actor: Path, answers: int, limit: int) -> dict[str, float]:
    """Return means over sampled answers to each held-out prompt: gold, kl (nats), length (tokens), ended; gold's standard error.

    The random numbers are the same for every policy. limit: number of prompts, 0 = all.
    """
    from scripts.demo.measure import mean, sample_answers
    from scripts.demo.score import demo_score
    from training.utils.data.records import load_records

    prompts = list(load_records(str(HELD_OUT), cache_dir=str(sft.with_name("cache")))["train"]["messages"])[: limit or None]
    dialogues = [prompt for _ in range(answers) for prompt in prompts]
    _, rows = sample_answers((sft, actor), dialogues, JUDGE_SEED, ANSWER_TOKENS)
    gold = [demo_score(dialogue, row["text"]) for dialogue, row in zip(dialogues, rows, strict=True)]
    error = statistics.stdev(gold) / len(gold) ** 0.5 if len(gold) > 1 else 0.0
    return {"gold": statistics.fmean(gold), "gold_se": error} | {name: mean(rows, name) for name in ("kl", "length", "ended")}


# --- all trainings --------------------------------------------------------------------------------------------------------


@told
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse(argv)
    if args.run:
        settings = json.loads(args.run.read_text(encoding="utf-8"))
        (train_trl if settings["method"] == TRL else train_ours)(settings)
        return 0
    if args.trl_python is None:
        print("TRL is left out: --trl-python names no interpreter that has trl 1.12.0.", flush=True)
    else:
        check_trl(args.trl_python)
    if (args.output / "results.jsonl").is_file():
        raise UserError(f"--output {args.output} holds the results of an earlier run; name another folder.")
    args.output.mkdir(parents=True, exist_ok=True)
    (prepare_smoke if args.smoke else prepare)(args)
    points: list[dict[str, Any]] = []
    for group in groups(args):
        for seed in args.seeds:
            points += train_and_judge(seed, group, args)
    (args.output / "report.md").write_text(print_table(HEAD, table(points)), encoding="utf-8")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags. Every field of Budget is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--trl-python", type=Path, help="interpreter that has trl 1.12.0; without it TRL is left out")
    parser.add_argument("--output", type=Path, default=ROOT / "output/ppo_learning")
    parser.add_argument("--together", type=int, default=2, help="processes at a time (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (%(default)s)")
    parser.add_argument("--answers", type=int, default=4, help="answers to each held-out prompt (%(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="judge on so many held-out prompts; 0 = all")
    parser.add_argument("--smoke", action="store_true", help="random models, one run, seconds")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # the settings of one training, in its own process
    for name, default in asdict(Budget()).items():
        parser.add_argument(f"--{name}", type=type(default), help=f"({default})")
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    if args.smoke:
        args.methods, args.seeds, args.answers, args.limit = ["gae"], args.seeds[:1], 1, args.limit or 4
    given = {name: getattr(args, name) for name in asdict(Budget()) if getattr(args, name) is not None}
    args.budget = Budget(**(asdict(SMOKE if args.smoke else Budget()) | given))
    return args


def check_trl(python: Path) -> None:
    """Raise UserError unless the interpreter has trl 1.12."""
    try:
        command = [python, "-c", "import trl, transformers; print(trl.__version__)"]
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        version = str(error)
    if not version.startswith("1.12."):
        raise UserError(f"--trl-python {python}: trl 1.12.0 is expected, the last that has PPO, not {version}; install it there.")


def groups(args: argparse.Namespace) -> list[list[str]]:
    """Return which methods run side by side: ours with a critic beside TRL's, the others by --together."""
    first = [method for method in args.methods if method == "gae"] + [TRL] * (args.trl_python is not None)
    rest = [method for method in args.methods if method != "gae"]
    return [part[at : at + args.together] for part in (first, rest) for at in range(0, len(part), args.together)]


def run_side_by_side(commands: Sequence[tuple[Sequence[object], Path]], args: argparse.Namespace) -> None:
    """Run (command, log file) at the same time. Raise UserError with the end of the log of the first that fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    running = []
    for command, log in commands:
        with log.open("w", encoding="utf-8") as file:
            words = list(map(str, command))
            running.append((subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT), log))
    codes = [child.wait() for child, _ in running]
    for code, (_, log) in zip(codes, running, strict=True):
        if code:
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{log}: exit code {code}, {last!r}.")


def prepare(args: argparse.Namespace) -> None:
    """Train the demo's SFT and reward model, unless they are there already."""
    from scripts.demo import __main__ as demo
    from scripts.demo.pipeline import run_stages

    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    stages = demo.demo_stages(demo.parse(["--output", str(args.output), "--threads", str(args.threads)]))
    run_stages(args.output, [stage for stage in stages if stage.name in ("base", "sft", "reward")], fresh=False)


def prepare_smoke(args: argparse.Namespace) -> None:
    """Write random weights in place of both models: what they say means nothing."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from scripts.demo.model import write_base_model

    write_base_model(args.output / "sft", data_dir=HELD_OUT.parent)
    torch.manual_seed(0)
    reward = AutoModelForSequenceClassification.from_pretrained(args.output / "sft", num_labels=1)
    reward.save_pretrained(args.output / "reward")
    AutoTokenizer.from_pretrained(args.output / "sft").save_pretrained(args.output / "reward")


def flags_of_ours(method: str, seed: int, run: Path, args: argparse.Namespace) -> list[str]:
    """Return step 3's command line: the demo's recipe with another budget."""
    budget = args.budget
    answers = budget.answers_per_prompt if method in GROUPED else 1
    flags = {
        "config": ROOT / "configs/cpu/demo.yaml",
        "actor_model_name_or_path": args.output / "sft",
        "critic_model_name_or_path": args.output / "reward",
        "output_dir": run / "step3",
        "cache_dir": args.output / "cache",
        "max_steps": budget.rollouts,
        "per_device_generation_batch_size": budget.rollout_size // answers,
        "num_return_sequences": answers,
        "per_device_training_batch_size": budget.minibatch,
        "max_tokens_per_device": budget.micro_batch_tokens,
        "ppo_epochs": budget.epochs,
        "advantage": method,
        "actor_learning_rate": budget.actor_learning_rate,
        "critic_learning_rate": budget.critic_learning_rate,
        "lr_scheduler_type": "linear",
        "num_warmup_steps": 0,
        "adam_beta2": budget.adam_beta2,
        "kl_coef": budget.kl_coef,
        "eval_prompts": 0,
        "seed": seed,
    }
    return as_flags(flags)


def prompts_of_ours(flags: list[str]) -> list[list[list[int]]]:
    """Return the prompts that step 3 will take with these flags: [rollout][row] -> token ids."""
    from models.load import load_tokenizer
    from models.templates import load_template
    from training.step3_ppo.rollout import PromptBatches
    from training.utils.data.prepare import prepare_phase
    from training.utils.flags.parse import parse
    from training.utils.flags.steps import PPOArguments

    args = parse(PPOArguments, flags)
    tokenizer = load_tokenizer(args.models["actor"])
    data = prepare_phase(args, 3, tokenizer, load_template(args.models["actor"], tokenizer)).train
    alone = SimpleNamespace(rank=0, world_size=1, device="cpu", sizes={})
    return [
        [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        for _, batch in PromptBatches(data, alone, args, tokenizer.pad_token_id).after(0)
    ]


def command(method: str, seed: int, run: Path, args: argparse.Namespace) -> list[object]:
    """Return one training as a command; its settings lie in its folder, which is emptied first."""
    settings: dict[str, Any] = {"method": method, "seed": seed, "output": str(run)}
    if method == TRL:
        sft, reward = args.output / "sft", args.output / "reward"
        stored = json.loads((reward / "config.json").read_text(encoding="utf-8"))
        settings |= {"sft": str(sft), "reward": str(reward), "budget": asdict(args.budget)}
        settings |= {"reward_mean": stored.get("reward_mean", 0.0), "reward_std": max(stored.get("reward_std", 1.0), 1e-6)}
        settings["prompts"] = prompts_of_ours(flags_of_ours("gae", seed, run, args))
    else:
        settings["flags"] = flags_of_ours(method, seed, run, args)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (run / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return [args.trl_python if method == TRL else sys.executable, "-m", "benchmarks.ppo_learning", "--run", run / "settings.json"]


def train_and_judge(seed: int, methods: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the methods side by side, then judge their policies; return a row of results.jsonl for each."""
    runs = {method: args.output / f"{method}-{seed}" for method in methods}
    run_side_by_side([(command(method, seed, run, args), Path(f"{run}.log")) for method, run in runs.items()], args)
    points = []
    for method, run in runs.items():
        times = json.loads((run / "time.json").read_text(encoding="utf-8"))
        judged = judge(args.output / "sft", run / "step3/actor", args.answers, args.limit)
        points.append({"method": method, "seed": seed} | times | judged)
        with (args.output / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(points[-1]) + "\n")
    return points


def table(points: Sequence[dict[str, Any]]) -> list[list[object]]:
    """Return the rows of the table, as HEAD names them; "of TRL's" is the share of TRL's CPU seconds with the same seed."""
    theirs = {point["seed"]: point["cpu_seconds"] for point in points if point["method"] == TRL}
    rows = []
    for point in sorted(points, key=lambda point: (point["seed"], point["method"])):
        compared = point["method"] != TRL and point["seed"] in theirs
        share = f"{point['cpu_seconds'] / theirs[point['seed']]:.2f}" if compared else ""
        gold = f"{point['gold']:.3f} ± {point['gold_se']:.3f}"
        metrics = (f"{point['kl']:.2f}", f"{point['ended']:.3f}", f"{point['length']:.1f}", f"{point['cpu_seconds']:.1f}")
        rows.append([point["seed"], point["method"], gold, *metrics, share])
    return rows


if __name__ == "__main__":
    sys.exit(main())
