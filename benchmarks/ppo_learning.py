"""How well and how fast PPO learns: gold score against KL and against time, for every --advantage and for TRL's PPO.

    python -m benchmarks.ppo_learning --trl-python ../trl/bin/python --output output/ppo_learning
    python -m benchmarks.ppo_learning --smoke --output /tmp/smoke            # seconds; shows that it runs, measures nothing

--trl-python is an interpreter with trl==1.12.0, torch and transformers; without it TRL is left out. A task's SFT and reward
model are trained once and shared by all methods and seeds. Then runs go in pairs side by side, seed by seed, ours with gae
beside TRL's, so that whatever else the machine does slows both; as many answers, the same reward model, the same prompts in the
same order (gae and TRL), the same rates and optimizer (benchmarks/ppo_learning_trl.py says what had to be set for that). Copies
of the policies are judged afterwards by one judge (benchmarks/ppo_learning_evaluate.py); their writing is not on the clock. They
stay in the output folder, 8 MB each.

results.jsonl in the output folder grows by a line a judged copy; the same command goes on where it was cut, also with more tasks,
methods or seeds. Other settings need another --output: settings.json there says with which the folder was begun.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.ppo_learning_clock import read_clock, snapshot_folder
from benchmarks.ppo_learning_report import TRL, curves, draw, final_table, summary, trl_table
from benchmarks.ppo_learning_tasks import (
    ROOT,
    TASK_FIELDS,
    TASK_SETTINGS,
    TASKS,
    Task,
    data_folder,
    read_jsonl,
    write_sentiment_data,
)
from errors import UserError, told

METHODS = ("gae", "grpo", "rloo", "reinforce++")
GROUPED = ("grpo", "rloo")  # these compare answers to the same prompt
RECIPE = ROOT / "configs/cpu/demo.yaml"


@dataclass(frozen=True)
class Budget:
    """What both sides get; rates fall on a straight line to 0, clip ranges are 0.2, lambda is 0.95."""

    rollouts: int = 12
    rollout_size: int = 64   # answers
    minibatch: int = 16
    epochs: int = 1
    answers_per_prompt: int = 4   # grpo and rloo, with that many fewer prompts
    actor_learning_rate: float = 5e-4
    critic_learning_rate: float = 1e-3
    kl_coef: float = 0.1
    adam_beta2: float = 0.95
    vf_coef: float = 0.1   # TRL's default; with Adam and no gradient clipping it matters little
    micro_batch_tokens: int = 512   # of ours, like beside like; TRL is fastest with the whole minibatch at once
    copies: int = 3   # of the policy, evenly over the rollouts

    @property
    def snapshots(self) -> list[int]:
        """After which rollouts."""
        return sorted({max(1, round(self.rollouts * part / self.copies)) for part in range(1, self.copies + 1)})


SMOKE = Budget(rollouts=2, rollout_size=8, minibatch=4, answers_per_prompt=2, copies=2)


@told
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    benchmark(parse(argv))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags. Every field of Budget is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--trl-python", type=Path, help="interpreter that has trl 1.12.0; without it TRL is left out")
    parser.add_argument("--output", type=Path, default=ROOT / "output/ppo_learning")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder of the reference data")
    parser.add_argument("--together", type=int, default=2, help="processes at a time (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (%(default)s)")
    parser.add_argument("--answers", type=int, default=4, help="answers to each held-out prompt (%(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="judge on so many held-out prompts; 0 = all")
    parser.add_argument("--images", type=Path, help="where the drawings go; default: the output folder")
    parser.add_argument("--smoke", action="store_true", help="a random model, one run, seconds")
    for name, default in asdict(Budget()).items():
        parser.add_argument(f"--{name}", type=type(default), help=f"({default})")
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    if args.trl_python and "gae" not in args.methods:
        parser.error("--trl-python: TRL gets the prompts that gae gets; have gae among --methods")
    if args.smoke:
        args.tasks, args.methods, args.seeds = ["demo"], ["gae"], args.seeds[:1]
        args.answers, args.limit, args.together = 1, args.limit or 4, 1
    given = {name: getattr(args, name) for name in asdict(Budget()) if getattr(args, name) is not None}
    args.budget = Budget(**(asdict(SMOKE if args.smoke else Budget()) | given))
    return args


def benchmark(args: argparse.Namespace) -> None:
    """Prepare the tasks, train, judge, print and draw."""
    if args.trl_python is None:
        print("TRL is left out: --trl-python names no interpreter that has trl 1.12.0.", flush=True)
    else:
        check_trl(args.trl_python)
    args.output.mkdir(parents=True, exist_ok=True)
    keep_settings(args)
    for name in args.tasks:
        (prepare_smoke if args.smoke else prepare)(TASKS[name], args.output / name, args)
    for group in groups(args):
        for seed in args.seeds:
            for name in args.tasks:
                train_and_judge(TASKS[name], seed, group, args)
                report(args, quiet=True)
    report(args)


def keep_settings(args: argparse.Namespace) -> None:
    """settings.json in the output folder, written at the first run. UserError if the folder was begun with others: its
    curves would mix two experiments, or old results would pass for those of the new flags.
    """
    file = args.output / "settings.json"
    settings = asdict(args.budget) | {"answers": args.answers, "limit": args.limit, "smoke": args.smoke} | TASK_SETTINGS
    settings |= {f"{task.name} {name}": getattr(task, name) for task in TASKS.values() for name in TASK_FIELDS}
    if file.is_file():
        try:
            begun = json.loads(file.read_text(encoding="utf-8"))
            other = [name for name in settings if begun.get(name) != settings[name]]
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file} cannot be read ({error}); name another --output.") from error
        if other:
            raise UserError(
                f"{args.output} was begun with {', '.join(f'{name} {begun.get(name)}' for name in other)}, now it is "
                f"{', '.join(str(settings[name]) for name in other)}; name another --output, or give the same settings."
            )
    elif (args.output / "results.jsonl").is_file():
        raise UserError(f"{args.output} holds results without settings.json, so of unknown settings; name another --output.")
    file.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def check_trl(python: Path) -> None:
    """Raise UserError unless the interpreter has trl 1.12."""
    ask = "import trl, transformers; print(trl.__version__)"
    try:
        found = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
        said = found.stdout.strip() if found.returncode == 0 else (found.stderr.strip().splitlines() or ["no output"])[-1]
    except OSError as error:
        said = error.strerror
    if not said.startswith("1.12."):
        raise UserError(
            f"--trl-python {python}: trl 1.12.0 is expected there, the last release but its successors' PPO is gone; found: "
            f"{said}. Make an environment with trl==1.12.0, or leave the flag out."
        )


def groups(args: argparse.Namespace) -> list[list[str]]:
    """Which methods run side by side: ours with a critic beside TRL's, the others by two."""
    methods = list(args.methods)
    first = [method for method in methods if method == "gae"] + [TRL] * (args.trl_python is not None)
    rest = [method for method in methods if method != "gae"]
    size = max(args.together, 1)
    return [
        part[place : place + size] for part in (first, rest) for place in range(0, len(part), size)
    ]


def run_side_by_side(commands: Sequence[tuple[Sequence[object], Path]], args: argparse.Namespace) -> None:
    """Run (command, log file) at the same time. Raises UserError with the end of the log of the first that fails."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        "SANBU_CACHE": str(args.output / "cache"),
    }  # fmt: skip
    running = []
    for command, log in commands:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as file:
            given = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": subprocess.STDOUT}
            child = subprocess.Popen(list(map(str, command)), **given)
        running.append((child, log))
    codes = [child.wait() for child, _ in running]
    for code, (_, log) in zip(codes, running, strict=True):
        if code:
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{log}: exit code {code}, {last!r}.")


def prepare(task: Task, folder: Path, args: argparse.Namespace) -> None:
    """The task's data, SFT and reward model, unless they are there already."""
    data = data_folder(task, folder)
    if task.name == "sentiment" and not (data / "prompts_heldout.jsonl").is_file():
        write_sentiment_data(data, args.shared)
    python = [sys.executable, "-m"]
    if not (folder / "base/config.json").is_file():
        base = ["scripts.demo.model", folder / "base", "--seed", 1234, "--data_dir", data]
        run_side_by_side([([*python, *base], folder / "base.log")], args)
    common = ["--config", RECIPE, "--seed", 1234]
    if not (folder / "sft/sanbu_done.json").is_file():
        sft = ["--model_name_or_path", folder / "base", "--data_path", data / "sft_train.jsonl"]
        sft += ["--output_dir", folder / "sft", "--num_train_epochs", task.sft_epochs]
        run_side_by_side([([*python, "training.step1_sft.main", *common, *sft], folder / "sft.log")], args)
    if not (data / "pairs_train.jsonl").is_file():
        pairs = ["benchmarks.ppo_learning_tasks", data, folder / "sft"]
        run_side_by_side([([*python, *pairs], folder / "pairs.log")], args)
    if not (folder / "reward/sanbu_done.json").is_file():
        reward = ["--model_name_or_path", folder / "sft", "--data_path", data / "pairs_train.jsonl"]
        reward += ["--output_dir", folder / "reward", "--num_train_epochs", task.reward_epochs]
        run_side_by_side([([*python, "training.step2_reward.main", *common, *reward], folder / "reward.log")], args)


def prepare_smoke(task: Task, folder: Path, args: argparse.Namespace) -> None:
    """Random weights in place of both models: what they say means nothing."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from scripts.demo.model import write_base_model

    if (folder / "reward/config.json").is_file():
        return
    write_base_model(folder / "sft", data_dir=data_folder(task, folder))
    torch.manual_seed(0)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "sft", num_labels=1)
    reward.save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(folder / "sft").save_pretrained(folder / "reward")


def flags_of_ours(task: Task, method: str, seed: int, run: Path, args: argparse.Namespace) -> list[str]:
    """Step 3's command line."""
    budget, folder = args.budget, args.output / task.name
    answers = budget.answers_per_prompt if method in GROUPED else 1
    flags = {
        "actor_model_name_or_path": folder / "sft", "critic_model_name_or_path": folder / "reward", "output_dir": run / "step3",
        "data_path": data_folder(task, folder) / "prompts_train.jsonl", "data_split": "0,0,1", "dtype": "fp32",
        "max_prompt_seq_len": 64, "max_answer_seq_len": task.answer_tokens, "max_steps": budget.rollouts,
        "per_device_generation_batch_size": budget.rollout_size // answers, "num_return_sequences": answers,
        "per_device_training_batch_size": budget.minibatch, "max_tokens_per_device": budget.micro_batch_tokens,
        "ppo_epochs": budget.epochs, "advantage": method,
        "actor_learning_rate": budget.actor_learning_rate, "critic_learning_rate": budget.critic_learning_rate,
        "lr_scheduler_type": "linear", "num_warmup_steps": 0, "adam_beta2": budget.adam_beta2, "kl_coef": budget.kl_coef,
        "eval_prompts": 0, "save_steps": 0, "seed": seed,
    }  # fmt: skip
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def command(task: Task, method: str, seed: int, run: Path, args: argparse.Namespace) -> list[object]:
    """The training as a command; its settings lie beside its results."""
    folder = args.output / task.name
    settings: dict[str, Any] = {"output": str(run), "snapshots": args.budget.snapshots, "seed": seed}
    if method in ("gae", TRL):
        settings["prompts"] = str(prompts_file(task, seed, args))
    if method == TRL:
        reward = json.loads((folder / "reward/config.json").read_text(encoding="utf-8"))
        settings |= asdict(args.budget) | {
            "sft": str(folder / "sft"), "reward": str(folder / "reward"), "max_answer_seq_len": task.answer_tokens,
            "reward_mean": reward.get("reward_mean", 0.0), "reward_std": max(reward.get("reward_std", 1.0), 1e-6),
        }  # fmt: skip
        start = [args.trl_python, "-m", "benchmarks.ppo_learning_trl"]
    else:
        settings["flags"] = flags_of_ours(task, method, seed, run, args)
        start = [sys.executable, "-m", "benchmarks.ppo_learning_ours"]
    return [*start, write_settings(run, settings)]


def write_settings(run: Path, settings: dict[str, Any]) -> Path:
    """settings.json in the run's folder, which is emptied first."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (run / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return run / "settings.json"


def prompts_file(task: Task, seed: int, args: argparse.Namespace) -> Path:
    """The prompts of every rollout of ours with gae, in order; TRL gets the same. The run of gae writes it."""
    budget = args.budget
    return args.output / task.name / f"prompts-{budget.rollouts}x{budget.rollout_size}-{seed}.json"


def train_and_judge(task: Task, seed: int, group: Sequence[str], args: argparse.Namespace) -> None:
    """Run a group side by side, then judge its copies, again side by side; what is in results.jsonl is not done again."""
    results = args.output / "results.jsonl"
    done = {(p["task"], p["method"], p["seed"], p["rollout"]) for p in (read_jsonl(results) if results.is_file() else [])}
    wanted = [m for m in group if not all((task.name, m, seed, r) in done for r in args.budget.snapshots)]
    runs = {method: args.output / task.name / f"{method}-{seed}" for method in wanted}
    print(f"{task.name}, seed {seed}: {', '.join(wanted) or 'nothing to do'}", flush=True)
    run_side_by_side([(command(task, method, seed, run, args), run / "log.txt") for method, run in runs.items()], args)
    start = {"task": task.name, "method": "sft", "seed": 0, "rollout": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    folders = {} if (task.name, "sft", 0, 0) in done else {args.output / task.name / "sft": start}
    for method, run in runs.items():
        clock = read_clock(run)
        for rollout in args.budget.snapshots:
            point = {"task": task.name, "method": method, "seed": seed} | clock[rollout]
            folders[snapshot_folder(run, rollout)] = point
    shares = [list(folders)[place :: args.together] for place in range(args.together)]
    logs = [args.output / task.name / f"judged-{place}.jsonl" for place in range(args.together)]
    judges = [(judge_command(task, share, args), log) for share, log in zip(shares, logs, strict=True) if share]
    run_side_by_side(judges, args)
    judged = {folder: found for log in logs if log.is_file() for folder, found in judgements(log).items()}
    for folder, point in folders.items():
        point |= judged[str(folder)]
        append(results, point)
        print(
            f"  {point['method']:11s} rollout {point['rollout']:3d}  gold {point['gold']:.3f}  KL {point['kl']:6.2f}  "
            f"{point['seconds']:6.1f} s  CPU {point['cpu_seconds']:6.1f} s", flush=True,
        )  # fmt: skip


def judge_command(task: Task, folders: Sequence[Path], args: argparse.Namespace) -> list[object]:
    """The judge over saved policies."""
    folder = args.output / task.name
    judge = [sys.executable, "-m", "benchmarks.ppo_learning_evaluate", "--task", task.name, "--sft", folder / "sft"]
    judge += ["--prompts", data_folder(task, folder) / "prompts_heldout.jsonl", "--limit", args.limit]
    return [*judge, "--answers", args.answers, *folders]


def judgements(log: Path) -> dict[str, dict[str, Any]]:
    """The judge's lines in its log, by the folders they are about."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith('{"folder"')]
    return {line.pop("folder"): line for line in lines}


def append(results: Path, point: dict[str, Any]) -> None:
    """One line more."""
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(point, ensure_ascii=False) + "\n")


def report(args: argparse.Namespace, quiet: bool = False) -> None:
    """report.md and the drawings from what is in results.jsonl; printed too unless quiet."""
    found = curves(read_jsonl(args.output / "results.jsonl"))
    parts = [final_table(found), trl_table(found), summary(found)]
    text = "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"
    (args.output / "report.md").write_text(text, encoding="utf-8")
    if not quiet:
        print(text)
        for file in draw(found, args.images or args.output):
            print(f"wrote {file}")


if __name__ == "__main__":
    sys.exit(main())
