"""Run a preset of the demo: its stages, each once, then the summary and the report.

Writes sft/, reward/, ppo/, answers.jsonl, summary.json, report.html and stages.json into the output folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.report import headline, summary_rows, write_report
from steps import step_of
from training.utils.run.metrics import format_seconds, read_metrics

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("sft", "reward", "ppo")
STAGES = "stages.json"  # in the output folder: what each finished stage took; it marks the results beside it as ours
RESULTS = ("base", "data", *SECTIONS, "cache", STAGES, "answers.jsonl", "summary.json", "report.html")


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    action(again) does it and may return what to keep; again: it was begun with these settings before, and interrupted.
    settings: what it depends on beside the stages before it. done: True where its result is there, whatever the settings.
    """

    name: str
    title: str
    action: Callable[[bool], dict[str, Any] | None]
    settings: Any = None
    done: bool = False


# --- command line -----------------------------------------------------------------------------------------------------


def common_flags(recipe: Path, description: str, prompts: str) -> argparse.ArgumentParser:
    """Build a parser with the flags of every preset.

    recipe: the default, which also names the output folder. prompts: the help of --prompts.
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
    """Return how many cores this process may use; all, where the system cannot say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_checked(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags of common_flags, check their bounds, and make their paths whole."""
    args = parser.parse_args(argv)
    if args.threads < 1 or args.seed < 0 or args.prompts < 0:
        parser.error("--threads must be 1 or more, --seed and --prompts 0 or more")
    # The steps run in the root of the repository, where the recipe's data paths lead; the user may stand elsewhere.
    args.output, args.config = args.output.resolve(), args.config.resolve()
    return args


def run_command_line(run: Callable[[], Any]) -> None:
    """Run it as a command: one sentence and exit code 2 for a UserError; a signal ends the running step as well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves subprocess.run, which then ends the step as well
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # the step got the same signal and has ended
        raise SystemExit(130) from None


# --- stages -----------------------------------------------------------------------------------------------------------


def run_step(title: str, command: Sequence[object], output: Path, **environment: str) -> None:
    """Run ``python -m command`` with its output on the terminal. Raise SystemExit if it fails."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {"SANBU_CACHE": str(output / "cache")} | os.environ | quiet | environment
    code = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, env=environment, check=False).returncode
    if code < 0:
        killed = " (often: not enough memory)" if code == -signal.SIGKILL else ""
        print(f"error: {title} was ended by {signal.Signals(-code).name}{killed}.", file=sys.stderr, flush=True)
        raise SystemExit(128 - code)
    if code:
        print(f"error: {title} failed with exit code {code}; its reason stands above.", file=sys.stderr, flush=True)
        raise SystemExit(code)


def training_stage(section: str, args: argparse.Namespace, flags: Sequence[object], settings: Any = None) -> Stage:
    """Return the stage that trains one section of the recipe, further flags given. Its checkpoints go once it is done."""
    folder, title = args.output / section, headline(section)
    command = [step_of(section).module, "--config", args.config, "--output_dir", folder, *flags, "--seed", args.seed]

    def train(again: bool) -> None:
        if again and any(folder.glob("checkpoints/step-*")):
            run_step(title, [*command, "--resume"], args.output)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            run_step(title, command, args.output)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    return Stage(section, title, train, settings)


def models_of_steps(output: Path) -> dict[str, list[object]]:
    """Return the flags that give each step the models of the stages before it."""
    base, sft, reward = (output / name for name in ("base", "sft", "reward"))
    return {
        "sft": ["--model_name_or_path", base],
        "reward": ["--model_name_or_path", sft],
        "ppo": ["--actor_model_name_or_path", sft, "--critic_model_name_or_path", reward],
    }


class Progress:
    """The stages of a run and what each took, kept in a file so that finished ones are not done again.

    A stage has the key of all settings so far, its own and those of the stages before it: with another recipe for step 3 only
    step 3 and what follows is done again.
    """

    def __init__(self, output: Path, settings: str, fresh: bool = False) -> None:
        """Open or make the output folder, empty of earlier results if fresh.

        Raises UserError if it holds results of something else, or cannot be written.
        """
        self.file, self.key = output / STAGES, settings
        found = [output / name for name in RESULTS if (output / name).exists()]
        # .sanbu_demo marked the folders of earlier versions.
        if found and not self.file.is_file() and not (output / ".sanbu_demo").is_file():
            raise UserError(f"--output {output} holds {found[0].name}, which the demo did not make; name another folder.")
        self.content: dict[str, Any] = {"took": {}, "begun": {}}
        try:
            output.mkdir(parents=True, exist_ok=True)
            for path in found if fresh else []:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if self.file.is_file():
                self.content = json.loads(self.file.read_text(encoding="utf-8"))
            self._save()
        except ValueError as error:
            raise UserError(f"{self.file} is damaged ({error}); remove the folder {output}, or name another.") from error
        except OSError as error:
            raise UserError(f"--output {output} cannot be written ({error.strerror}); name another folder.") from error

    @property
    def took(self) -> dict[str, dict[str, Any]]:
        """Stage -> its key, "seconds" and "cpu_seconds" of all attempts, and what its action returned."""
        return self.content["took"]

    def run(self, stage: Stage) -> None:
        """Do a stage unless it was done before with these settings."""
        text = json.dumps([self.key, stage.name, stage.settings], sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if stage.done or self.took.get(stage.name, {}).get("key") == self.key:
            print(f"\n{stage.title}: done before", flush=True)
            return
        print(f"\n{stage.title}", flush=True)
        again = self.content["begun"].get("key") == self.key
        spent = self.content["begun"] if again else {"key": self.key, "seconds": 0.0, "cpu_seconds": 0.0}
        self.content["begun"] = spent
        self.took.pop(stage.name, None)
        self._save()
        clock, cpu = time.monotonic(), cpu_seconds()
        try:
            result = stage.action(again) or {}
        finally:  # also of an attempt that is interrupted
            spent["seconds"] += time.monotonic() - clock
            spent["cpu_seconds"] += cpu_seconds() - cpu
            self._save()
        self.took[stage.name] = spent | result
        self.content["begun"] = {}
        self._save()

    def _save(self) -> None:
        draft = self.file.with_suffix(".tmp")
        draft.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.file)


def cpu_seconds() -> float:
    """Return user and system time of this process and of all that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# --- the whole run ----------------------------------------------------------------------------------------------------


def run_stages(
    args: argparse.Namespace, preset: str, progress: Progress, stages: Sequence[Stage], chat_flags: str = ""
) -> dict[str, Any]:
    """Run the stages, the last of which measures; write summary and report, and return the summary.

    chat_flags: of chat.py, for the model to hear what it was trained on.
    """
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read by torch here and in the steps, once it is imported
    for stage in stages:
        progress.run(stage)
    output, took = args.output, progress.took
    summary = summarise(output, preset, took, args.seed)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    write_report(output, output / "report.html")
    print_summary(summary, output, chat_flags)
    return summary


def read_done(output: Path, section: str) -> dict[str, Any]:
    """Return what a finished step says of itself: its flags and peak memory."""
    return json.loads((output / section / "sanbu_done.json").read_text(encoding="utf-8"))


def summarise(output: Path, preset: str, took: dict[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    """Return the content of summary.json."""
    perplexities = read_metrics(output / "sft" / "metrics.jsonl", "eval/perplexity")
    peaks = [read_done(output, section)["peak_memory_gb"] for section in SECTIONS]
    summary = {
        "preset": preset,
        "sft": {"perplexity_before": perplexities[0][1], "perplexity_after": perplexities[-1][1]},
        "reward": {"accuracy": read_metrics(output / "reward" / "metrics.jsonl", "eval/accuracy")[-1][1]},
        "ppo": took["measure"]["metrics"],
        "peak_memory_gb": max(took["measure"]["peak_memory_gb"], *peaks),
        "seed": seed,
    }
    for unit in ("seconds", "cpu_seconds"):
        summary[unit] = {name: round(stage[unit], 1) for name, stage in took.items()}
        summary[unit]["total"] = round(sum(stage[unit] for stage in took.values()), 1)
    return summary


def print_summary(summary: dict[str, Any], output: Path, chat_flags: str = "") -> None:
    """Print the table of the summary, and what to do next."""
    rows = [("", "before", "after", "target"), *summary_rows(summary)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    print()
    for name, before, after, target in rows:
        print(f"{name:<{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}  {target}".rstrip())
    shown = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    print(f"\nWrote {shown}/report.html and {shown}/summary.json in {format_seconds(summary['seconds']['total'])}.")
    python = ".venv/bin/python" if Path(sys.prefix) == ROOT / ".venv" else "python"
    print(f"Chat with the result:  {python} chat.py --path {shown}/ppo/actor {chat_flags}".rstrip(), flush=True)
