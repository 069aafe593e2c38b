"""Run the stages of a preset, each once, then write the summary and the report.

The output folder gets sft/, reward/, ppo/, answers.jsonl, summary.json, report.html and stages.json.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.launch.checks import step_arguments
from scripts.report.page import write_report
from scripts.report.results import cost_rows, result_rows
from scripts.report.runs import StepRun, find_runs
from steps import step_of
from training.utils.flags.recipe import Recipe
from training.utils.run.metrics import format_seconds, read_metrics

ROOT = Path(__file__).resolve().parents[2]
# section of the recipe -> flags of its models and the folders in the output that they come from
MODELS = {
    "sft": {"--model_name_or_path": "base"},
    "reward": {"--model_name_or_path": "sft"},
    "ppo": {"--actor_model_name_or_path": "sft", "--critic_model_name_or_path": "reward"},
}
SECTIONS = tuple(MODELS)
STAGES = "stages.json"  # in the output folder: a record of each stage; it marks the results beside it as ours
RESULTS = ("base", "data", *SECTIONS, "cache", STAGES, "answers.jsonl", "summary.json", "report.html")


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    action(again) does it and may return what to keep; again: it was begun with these settings before, and interrupted.
    settings: what it depends on beside the stages before it.
    """

    name: str
    title: str
    action: Callable[[bool], dict[str, Any] | None]
    settings: Any = None


def run_step(title: str, command: Sequence[object], output: Path, **environment: str) -> None:
    """Run ``python -m command`` with its output on the terminal. Raise SystemExit if it fails."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {"SANBU_CACHE": str(output / "cache")} | os.environ | quiet | environment
    code = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, env=environment, check=False).returncode
    if code == 0:
        return
    reason = f"failed with exit code {code}; its reason stands above"
    if code < 0:
        killed = " (often: not enough memory)" if code == -signal.SIGKILL else ""
        reason = f"was ended by {signal.Signals(-code).name}{killed}"
    print(f"error: {title} {reason}.", file=sys.stderr, flush=True)
    raise SystemExit(code if code > 0 else 128 - code)


def script_stage(
    name: str, title: str, args: Namespace, *command: object, settings: Any = None, **environment: str
) -> Stage:
    """Return the stage that runs ``python -m command``."""
    return Stage(name, title, lambda again: run_step(title, command, args.output, **environment), settings)


def training_stage(section: str, args: Namespace, *flags: object, settings: Any = None) -> Stage:
    """Return the stage that trains one section of the recipe on the models of the stages before it.

    flags: further ones. Its checkpoints go once it is done.
    """
    folder = args.output / section
    title = StepRun(section, folder).title("en")
    command = [step_of(section).module, "--config", args.config, "--output_dir", folder, *flags, "--seed", args.seed]
    for flag, source in MODELS[section].items():
        command += [flag, args.output / source]
    step_arguments(step_of(section), [str(word) for word in command[1:]])  # a wrong flag of step 3 is told before step 1

    def train(again: bool) -> None:
        resume = again and any(folder.glob("checkpoints/step-*"))
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        run_step(title, [*command, *["--resume"] * resume], args.output)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    return Stage(section, title, train, settings)


def read_recipe(file: Path) -> dict[str, Any]:
    """Return the sections sft, reward and ppo of the recipe. Raise UserError if it cannot be read or lacks one."""
    sections = Recipe.read(str(file)).sections
    missing = [section for section in SECTIONS if section not in sections]
    if missing:
        raise UserError(f"--config {file}: no section {missing[0]}; start from a copy of configs/cpu/smollm2.yaml.")
    return {section: sections[section] for section in SECTIONS}


def open_output(output: Path, fresh: bool) -> dict[str, dict[str, Any]]:
    """Make the output folder, empty of earlier results if fresh, and return the records of its stages.

    Raises UserError if it holds results of something else, or cannot be written.
    """
    present = [output / name for name in RESULTS if (output / name).exists()]
    # .sanbu_demo marked the folders of earlier versions.
    if present and not any((output / mark).is_file() for mark in (STAGES, ".sanbu_demo")):
        raise UserError(f"--output {output} holds {present[0].name}, which the demo did not make; name another folder.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for path in present if fresh else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        records = json.loads((output / STAGES).read_text(encoding="utf-8")) if (output / STAGES).is_file() else {}
        write_records(output, records)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); name another folder.") from error
    return records


def write_records(output: Path, records: dict[str, dict[str, Any]]) -> None:
    """Write stages.json, whole or not at all."""
    draft = output / f"{STAGES}.tmp"
    draft.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    draft.replace(output / STAGES)


def run_stages(output: Path, stages: Sequence[Stage], fresh: bool) -> dict[str, dict[str, Any]]:
    """Do the stages that were not done before with these settings; return their records by name.

    A record holds the seconds and cpu_seconds of all attempts, what the action returned, and the key of all settings so far,
    the stage's own and those of the stages before it: with another recipe for step 3 only step 3 and what follows is done again.
    """
    records, key = open_output(output, fresh), ""
    for stage in stages:
        settings = json.dumps([key, stage.name, stage.settings], sort_keys=True, default=str)
        key = hashlib.sha256(settings.encode()).hexdigest()[:16]
        record = records.get(stage.name, {})
        again = record.get("key") == key
        if again and record["done"]:
            print(f"\n{stage.title}: done before", flush=True)
            continue
        print(f"\n{stage.title}", flush=True)
        if not again:
            record = {"key": key, "done": False, "seconds": 0.0, "cpu_seconds": 0.0}
        records[stage.name] = record
        write_records(output, records)
        clock, cpu = time.monotonic(), cpu_seconds()
        try:
            record |= stage.action(again) or {}
            record["done"] = True
        finally:  # also of an attempt that is interrupted
            record["seconds"] += time.monotonic() - clock
            record["cpu_seconds"] += cpu_seconds() - cpu
            write_records(output, records)
    return {stage.name: records[stage.name] for stage in stages}


def cpu_seconds() -> float:
    """Return user and system time of this process and of all that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def finish(args: Namespace, preset: str, records: dict[str, dict[str, Any]], chat_flags: str = "") -> dict[str, Any]:
    """Write summary and report, print the table and what to do next; return the summary. chat_flags: of chat.py."""
    output = args.output
    summary = summarise(output, preset, records, args.seed)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    runs = find_runs(output)
    write_report(output, runs, output / "report.html")
    rows = [("", "before", "after", "target"), *result_rows(runs, "en", summary), *cost_rows(summary, "en")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for name, before, after, target in rows:
        print(f"{name:<{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}  {target}".rstrip())
    shown = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    print(f"\nWrote {shown}/report.html and {shown}/summary.json in {format_seconds(summary['seconds']['total'])}.")
    python = ".venv/bin/python" if Path(sys.prefix) == ROOT / ".venv" else "python"
    print(f"Chat with the result:  {python} chat.py --path {shown}/ppo/actor {chat_flags}".rstrip(), flush=True)
    return summary


def read_done(output: Path, section: str) -> dict[str, Any]:
    """Return the flags and the peak memory of a finished step."""
    return json.loads((output / section / "sanbu_done.json").read_text(encoding="utf-8"))


def summarise(output: Path, preset: str, records: dict[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    """Return the content of summary.json."""
    perplexities = read_metrics(output / "sft" / "metrics.jsonl", "eval/perplexity")
    peaks = [read_done(output, section)["peak_memory_gb"] for section in SECTIONS]
    summary = {
        "preset": preset,
        "sft": {"perplexity_before": perplexities[0][1], "perplexity_after": perplexities[-1][1]},
        "reward": {"accuracy": read_metrics(output / "reward" / "metrics.jsonl", "eval/accuracy")[-1][1]},
        "ppo": records["measure"]["metrics"],
        "peak_memory_gb": max(records["measure"]["peak_memory_gb"], *peaks),
        "seed": seed,
    }
    for unit in ("seconds", "cpu_seconds"):
        summary[unit] = {name: round(record[unit], 1) for name, record in records.items()}
        summary[unit]["total"] = round(sum(record[unit] for record in records.values()), 1)
    return summary
