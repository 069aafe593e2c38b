"""The demo: a small model from a random start through SFT, reward model and PPO, measured on held-out prompts.

    python -m scripts.demo [--seed 1234] [--output output/demo] [--threads 2]
    python -m scripts.demo --ppo_flags "--ppo_epochs 4 --generation_batches 2" --pad_is_eos

Writes base/, sft/, reward/, ppo/, answers.jsonl, summary.json and report.html into the output folder. A second run
starts afresh.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.demo.score import demo_score
from scripts.report import TITLES, summary_rows, write_report
from training.utils.run.metrics import format_seconds, read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs/cpu/demo.yaml"
HELD_OUT_PROMPTS = ROOT / "data/demo/prompts_heldout.jsonl"
MARK = ".sanbu_demo"  # in an output folder whose results are ours to remove
RESULTS = ("base", "sft", "reward", "ppo", "cache", "answers.jsonl", "summary.json", "report.html")
BATCH = 60  # prompts answered at once when the demo is measured


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. Exit code 2 for wrong input, else that of the step that failed."""
    args = parse(argv)
    run_command_line(lambda: run_demo(args))


def run_command_line(run: Callable[[], Any]) -> None:
    """Run it as a command: one sentence and exit code 2 for a UserError; a signal ends the step in work as well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves subprocess.run, which then ends the step as well
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # the step got the same signal and has ended
        raise SystemExit(130) from None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of the demo."""
    parser = common_flags(RECIPE, __doc__, "measure on so many held-out prompts; 0 = all")
    parser.add_argument("--ppo_flags", type=shlex.split, default=[], metavar="FLAGS", help='further flags of step 3, as one text')
    parser.add_argument("--pad_is_eos", action="store_true", help="pad with the end token, as many checkpoints do")
    return parse_checked(parser, argv)


def common_flags(recipe: Path, description: str, prompts: str) -> argparse.ArgumentParser:
    """A parser with the flags of every run through the three steps. recipe: the default, which also names the output folder;
    prompts: what --prompts does.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, folder = parser.add_argument, f"output/{recipe.stem}"
    add("--seed", type=int, default=1234, help="random seed of all steps (%(default)s)")
    add("--output", type=Path, default=ROOT / folder, help=f"where results go ({folder})")
    add("--threads", type=int, default=usable_cores(), help="CPU threads (%(default)s)")
    add("--config", type=Path, default=recipe, help=f"recipe of the steps ({recipe.relative_to(ROOT)})")
    add("--prompts", type=int, default=0, help=prompts)
    return parser


def usable_cores() -> int:
    """How many cores this process may use; all, where the system cannot say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_checked(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of common_flags within their bounds, with whole paths."""
    args = parser.parse_args(argv)
    if args.threads < 1 or args.seed < 0 or args.prompts < 0:
        parser.error("--threads must be 1 or more, --seed and --prompts 0 or more")
    # The steps run in the root of the repository, where the recipe's data paths lead; the user may stand elsewhere.
    args.output, args.config = args.output.resolve(), args.config.resolve()
    return args


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, write summary and report. Returns the summary."""
    started = time.monotonic()
    output = args.output
    start_afresh(output)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read by torch here and in the steps, once it is imported

    # Random weights are written on the CPU; saying so keeps DeepSpeed from announcing what it looked for.
    command = ["scripts.demo.model", output / "base", "--seed", args.seed, *["--pad_is_eos"] * args.pad_is_eos]
    run_step("The base model", command, output, DS_ACCELERATOR="cpu")
    models = {
        "sft": ["--model_name_or_path", output / "base"],
        "reward": ["--model_name_or_path", output / "sft"],
        "ppo": ["--actor_model_name_or_path", output / "sft", "--critic_model_name_or_path", output / "reward"],
    }
    models["ppo"] += args.ppo_flags
    seconds = {}
    for number, (name, flags) in enumerate(models.items(), 1):
        print(f"\n{TITLES[name]}", flush=True)
        command = [f"training.step{number}_{name}.main", "--config", args.config, "--output_dir", output / name]
        seconds[name] = run_step(TITLES[name], [*command, *flags, "--seed", args.seed], output)

    print("\nAnswers to held-out prompts, by the SFT model and by the model after PPO", flush=True)
    done = {name: json.loads((output / name / "sanbu_done.json").read_text(encoding="utf-8")) for name in models}
    longest = done["ppo"]["flags"]["max_answer_seq_len"]
    figures, own_peak = measure(output, args.seed, args.prompts, longest, HELD_OUT_PROMPTS, demo_score)
    perplexities = read_metrics(output / "sft" / "metrics.jsonl", "eval/perplexity")
    summary = {
        "sft": {"perplexity_before": perplexities[0][1], "perplexity_after": perplexities[-1][1]},
        "reward": {"accuracy": read_metrics(output / "reward" / "metrics.jsonl", "eval/accuracy")[-1][1]},
        "ppo": figures,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_memory_gb": max(own_peak, *(step["peak_memory_gb"] for step in done.values())),
        "seed": args.seed,
    }
    summary["seconds"]["total"] = round(time.monotonic() - started, 1)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    write_report(output, output / "report.html")
    print_summary(summary, output)
    return summary


def start_afresh(output: Path) -> None:
    """Make the output folder, or remove the results of an earlier demo from it.

    Raises UserError if it holds results that the demo did not make, or cannot be written.
    """
    found = [output / name for name in RESULTS if (output / name).exists()]
    if found and not (output / MARK).is_file():
        raise UserError(f"--output {output} holds {found[0].name}, which the demo did not make; name another folder.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARK).touch()
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); name another folder.") from error


def run_step(title: str, command: Sequence[object], output: Path, **environment: str) -> float:
    """Run ``python -m command`` with its output on the terminal; returns its seconds. Ends the demo if it fails."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {"SANBU_CACHE": str(output / "cache")} | os.environ | quiet | environment
    clock = time.monotonic()
    code = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, env=environment, check=False).returncode
    if code < 0:
        killed = " (often: not enough memory)" if code == -signal.SIGKILL else ""
        print(f"error: {title} was ended by {signal.Signals(-code).name}{killed}.", file=sys.stderr, flush=True)
        raise SystemExit(128 - code)
    if code:
        print(f"error: {title} failed with exit code {code}; its reason stands above.", file=sys.stderr, flush=True)
        raise SystemExit(code)
    return time.monotonic() - clock


def measure(
    output: Path, seed: int, limit: int, longest: int, prompts: Path, gold: Callable[[Any, str], float]
) -> tuple[dict[str, float], float]:
    """Sample answers at temperature 1 from the SFT model and from the actor, with the same random numbers; score them.

    limit: number of prompts, 0 = all. longest: tokens of an answer. prompts: the file they are in. gold: score of
    (messages, answer). Writes answers.jsonl. Returns the section ppo of the summary - kl is the mean over the actor's
    answers of sum_t log p_actor(t) - log p_sft(t), in nats - and the peak memory of this process in GB.
    """
    import torch

    from models.device import detect_platform, peak_memory_gb, set_device
    from models.heads import TokenLogProbs
    from models.load import load_causal_lm, load_tokenizer
    from models.templates import load_template
    from training.utils.data.sources import load_records
    from training.utils.run.process_group import quiet_libraries

    quiet_libraries()
    device = set_device(detect_platform(), 0)
    tokenizer = load_tokenizer(output / "sft")
    template = load_template(output / "sft", tokenizer)
    dialogues = load_records(str(prompts), cache_dir=str(output / "cache"))["train"]["messages"]
    dialogues = list(dialogues)[: limit or None]
    folders = {"before": output / "sft", "after": output / "ppo" / "actor"}
    models = {
        when: TokenLogProbs(load_causal_lm(folder, dtype=torch.float32)).to(device).eval()
        for when, folder in folders.items()
    }
    answers: dict[str, list[dict[str, Any]]] = {when: [] for when in models}
    for start in range(0, len(dialogues), BATCH):
        chunk = dialogues[start : start + BATCH]
        seeds = [seed + start + row for row in range(len(chunk))]
        for when, model in models.items():
            reference = models["before"] if when == "after" else None
            answers[when] += answer(model, reference, chunk, seeds, tokenizer, template, longest)

    with (output / "answers.jsonl").open("w", encoding="utf-8") as file:
        for messages, before, after in zip(dialogues, answers["before"], answers["after"], strict=True):
            prompt = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
            for found in (before, after):
                found["gold"] = gold(messages, found["text"])
            row = {"prompt": prompt, "before": before["text"], "after": after["text"]}
            row |= {"gold_before": before["gold"], "gold_after": after["gold"]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def mean(when: str, name: str) -> float:
        return sum(found[name] for found in answers[when]) / len(dialogues)

    figures = {
        "gold_score_before": mean("before", "gold"), "gold_score_after": mean("after", "gold"),
        "length_before": mean("before", "length"), "length_after": mean("after", "length"),
        "eos_rate": mean("after", "ended"), "kl": mean("after", "kl"),
    }  # fmt: skip
    return figures, round(peak_memory_gb(), 3)


def answer(model, reference, dialogues, seeds: list[int], tokenizer, template, longest: int) -> list[dict[str, Any]]:
    """One sampled answer to each dialogue: text, tokens (end token included), their number, ended, kl (0 without
    a reference).

    model, reference: TokenLogProbs.
    """
    import torch

    from inference.engine import generate
    from training.step3_ppo.experience import Experience
    from training.utils.data.batching import pad_left

    device = next(model.parameters()).device
    prompts = [template.encode_prompt(tokenizer, messages) for messages in dialogues]
    ids, mask = pad_left(prompts, tokenizer.pad_token_id)
    ids, mask = ids.to(device), mask.to(device)
    found = generate(
        model.model, ids, mask, max_new_tokens=longest, stop_token_ids=template.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id, temperature=1.0, top_p=1.0, top_k=0, row_seeds=seeds,
    )  # fmt: skip
    rows = Experience.from_generation(ids, mask, found, torch.arange(len(prompts)), tokenizer.pad_token_id)
    kl = torch.zeros(len(prompts))
    if reference is not None:
        width = rows.action_mask.shape[1]
        with torch.no_grad():
            here, there = (one(rows.input_ids, rows.attention_mask, keep=width) for one in (model, reference))
        kl = (here - there).where(rows.action_mask, 0.0).sum(1)
    answers = []
    for row, length in enumerate(found.lengths.tolist()):
        tokens = found.sequences[row, :length].tolist()
        text = template.decode_answer(tokenizer, tokens)
        answers.append(
            {"text": text, "tokens": tokens, "length": length, "ended": bool(found.ended[row]), "kl": float(kl[row])}
        )
    return answers


def print_summary(summary: dict[str, Any], output: Path, chat_flags: str = "") -> None:
    """The table of the summary, and what to do next. chat_flags: of chat.py, for the model to hear what it was trained on."""
    rows = [("", "before", "after", "hoped for"), *summary_rows(summary)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print()
    for name, before, after, hoped in rows:
        print(f"{name:<{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}  {hoped}".rstrip())
    shown = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    print(f"\nWrote {shown}/report.html and {shown}/summary.json in {format_seconds(summary['seconds']['total'])}.")
    python = ".venv/bin/python" if Path(sys.prefix) == ROOT / ".venv" else "python"
    print(f"Chat with the result:  {python} chat.py --path {shown}/ppo/actor {chat_flags}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
