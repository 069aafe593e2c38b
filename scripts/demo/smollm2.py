"""The preset smollm2: SmolLM2-135M-Instruct through SFT, reward model and PPO towards friendly answers, on a CPU.

    bash scripts/quickstart.sh --preset smollm2 [--seed 1234] [--output output/smollm2] [--threads 2]

Writes base/ (the converted checkpoint), data/, sft/, reward/, ppo/, answers.jsonl, summary.json and report.html. An
interrupted run goes on where it was with the same command; with a changed recipe it begins at the first step that differs.
docs/smollm2.md tells what it does and what came out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from errors import UserError
from scripts.demo.__main__ import ROOT, common_flags, measure, parse_checked, print_summary, run_command_line, run_step
from scripts.demo.smollm2_model import check_packages
from scripts.demo.smollm2_prompts import SYSTEM
from scripts.demo.smollm2_score import vader_score
from scripts.report import TITLES, write_report
from training.utils.run.metrics import format_seconds, read_metrics

RECIPE = ROOT / "configs/cpu/smollm2.yaml"
STAGES = "stages.json"  # in the output folder: what each finished stage took
RESULTS = ("base", "data", "sft", "reward", "ppo", "cache", "answers.jsonl", "summary.json", "report.html")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. Exit code 2 for wrong input, else that of the step that failed."""
    args = parse(argv)
    run_command_line(lambda: run_preset(args))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of the preset."""
    return parse_checked(common_flags(RECIPE, __doc__, "use and measure only so many prompts; 0 = all"), argv)


def run_preset(args: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, write summary and report. Returns the summary."""
    check_packages()
    recipe = read_recipe(args.config)
    output = args.output
    stages = Stages(output, f"seed {args.seed}, prompts {args.prompts}, {data_code()}")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    base, data, sft, reward, ppo = (output / name for name in ("base", "data", "sft", "reward", "ppo"))
    drawn = ["--seed", args.seed, "--limit", args.prompts]

    def module(title: str, *command: object) -> Callable[[bool], None]:
        def action(again: bool) -> None:
            run_step(title, command, output)

        return action

    def step(number: int, name: str, file: str, *flags: object) -> Callable[[bool], None]:
        command = [f"training.step{number}_{name}.main", "--config", args.config, "--output_dir", output / name]
        command += [*flags, "--data_path", data / file, "--seed", args.seed]

        def action(again: bool) -> None:
            run_step(TITLES[name], [*command, *fresh_or_resumed(output / name, again)], output)

        return action

    title = "The pretrained model, from GGUF to safetensors"
    # config.json is written last: the folder is whole then, and no setting changes it.
    done = (base / "config.json").is_file()
    stages.run("convert", title, module(title, "scripts.demo.smollm2_model", base), done=done)
    title = "Answers of the pretrained model, to imitate"
    stages.run("sft data", title, module(title, "scripts.demo.smollm2_data", "sft", base, data, *drawn))
    stages.run("sft", TITLES["sft"], step(1, "sft", "sft.jsonl", "--model_name_or_path", base), recipe["sft"])
    title = "Answers of the SFT model, in pairs by their gold score"
    stages.run("pairs", title, module(title, "scripts.demo.smollm2_data", "pairs", sft, data, *drawn))
    stages.run(
        "reward", TITLES["reward"], step(2, "reward", "pairs.jsonl", "--model_name_or_path", sft), recipe["reward"]
    )
    models = ["--actor_model_name_or_path", sft, "--critic_model_name_or_path", reward]
    stages.run("ppo", TITLES["ppo"], step(3, "ppo", "ppo.jsonl", *models), recipe["ppo"])
    shutil.rmtree(ppo / "checkpoints", ignore_errors=True)
    stages.run("measure", "Answers to held-out prompts, before and after PPO", lambda again: measure_preset(args))

    summary = summarise(args, stages)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    write_report(output, output / "report.html")
    print_summary(summary, output, f'--system "{SYSTEM}"')
    return summary


def read_recipe(file: Path) -> dict[str, Any]:
    """The sections sft, reward and ppo of the recipe. UserError if it cannot be read or lacks one."""
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        return {name: recipe[name] for name in ("sft", "reward", "ppo")}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"--config {file} is no recipe with the sections sft, reward and ppo ({type(error).__name__}: {reason}); "
            f"start from a copy of {RECIPE.relative_to(ROOT)}."
        ) from error


def data_code() -> str:
    """A digest of the scripts that make the data."""
    content = b"".join((ROOT / f"scripts/smollm2_{name}.py").read_bytes() for name in ("prompts", "data", "score"))
    return hashlib.sha256(content).hexdigest()


def fresh_or_resumed(folder: Path, again: bool) -> list[str]:
    """--resume where this very step was interrupted and left a checkpoint; else half-written and older results go."""
    if again and any(folder.glob("checkpoints/step-*")):
        return ["--resume"]
    shutil.rmtree(folder, ignore_errors=True)
    return []


class Stages:
    """The stages of a run and what each took, kept in a file so that finished ones are not done again.

    A stage has the key of all settings so far, its own and those of the stages before it: with another recipe for step 3 only
    step 3 and what follows is done again.
    """

    def __init__(self, output: Path, settings: str) -> None:
        """Open or make the output folder. Raises UserError if it holds results of something else, or cannot be written."""
        self.file, self.key = output / STAGES, settings
        found = [output / name for name in RESULTS if (output / name).exists()]
        if found and not self.file.is_file():
            raise UserError(f"--output {output} holds {found[0].name}, which the preset did not make; name another folder.")
        self.content = {"took": {}, "begun": {}}
        try:
            output.mkdir(parents=True, exist_ok=True)
            if self.file.is_file():
                self.content = json.loads(self.file.read_text(encoding="utf-8"))
            self._save()
        except ValueError as error:
            raise UserError(f"{self.file} is damaged ({error}); remove the folder {output}, or name another.") from error
        except OSError as error:
            raise UserError(f"--output {output} cannot be written ({error.strerror}); name another folder.") from error

    @property
    def took(self) -> dict[str, dict[str, Any]]:
        """Stage -> its key, "seconds" and "cpu_seconds" of all attempts, and results of its own."""
        return self.content["took"]

    def run(
        self, name: str, title: str, action: Callable[[bool], Any], settings: Any = None, done: bool | None = None
    ) -> None:
        """Do a stage unless it is done; where done does not say so, that is: done before with these settings. The action gets
        whether it was begun so before and interrupted; what it returns, a dictionary or None, is kept.
        """
        text = json.dumps([self.key, name, settings], sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if done is None:
            done = self.took.get(name, {}).get("key") == self.key
        if done:
            print(f"\n{title}: done before", flush=True)
            return
        print(f"\n{title}", flush=True)
        again = self.content["begun"].get("key") == self.key
        spent = self.content["begun"] if again else {"key": self.key, "seconds": 0.0, "cpu_seconds": 0.0}
        self.content["begun"] = spent
        self.took.pop(name, None)
        self._save()
        clock, cpu = time.monotonic(), cpu_seconds()
        try:
            result = action(again) or {}
        finally:  # also of an attempt that is interrupted
            spent["seconds"] += time.monotonic() - clock
            spent["cpu_seconds"] += cpu_seconds() - cpu
            self._save()
        self.took[name] = spent | result
        self.content["begun"] = {}
        self._save()

    def _save(self) -> None:
        draft = self.file.with_suffix(".tmp")
        draft.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.file)


def cpu_seconds() -> float:
    """User and system time of this process and of all that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure_preset(args: argparse.Namespace) -> dict[str, Any]:
    """Gold scores on held-out prompts: of the pretrained model, the SFT model and the actor. Kept with the stage."""
    from scripts.demo.smollm2_data import sample
    from scripts.demo.smollm2_prompts import prompts_of

    output = args.output
    done = json.loads((output / "ppo" / "sanbu_done.json").read_text(encoding="utf-8"))
    longest = done["flags"]["max_answer_seq_len"]
    held_out = output / "data" / "heldout.jsonl"
    figures, peak = measure(
        output, args.seed, args.prompts, longest, held_out, lambda messages, answer: vader_score(answer)
    )
    answers = sample(output / "base", prompts_of("heldout")[: args.prompts or None], 1, args.seed)
    figures["gold_score_pretrained"] = sum(vader_score(text) for text, _ in answers) / len(answers)
    return {"figures": figures, "peak_memory_gb": peak}


def summarise(args: argparse.Namespace, stages: Stages) -> dict[str, Any]:
    """The content of summary.json; as the demo's, with CPU seconds."""
    output, took = args.output, stages.took
    perplexities = read_metrics(output / "sft" / "metrics.jsonl", "eval/perplexity")
    peaks = [json.loads((output / name / "sanbu_done.json").read_text(encoding="utf-8"))["peak_memory_gb"]
             for name in ("sft", "reward", "ppo")]  # fmt: skip
    summary = {
        "preset": "smollm2",
        "sft": {"perplexity_before": perplexities[0][1], "perplexity_after": perplexities[-1][1]},
        "reward": {"accuracy": read_metrics(output / "reward" / "metrics.jsonl", "eval/accuracy")[-1][1]},
        "ppo": took["measure"]["figures"],
        "peak_memory_gb": max(took["measure"]["peak_memory_gb"], *peaks),
        "seed": args.seed,
    }
    for unit in ("seconds", "cpu_seconds"):
        summary[unit] = {name: round(stage[unit], 1) for name, stage in took.items()}
        summary[unit]["total"] = round(sum(stage[unit] for stage in took.values()), 1)
    print(f"\nProcessor time of all stages: {format_seconds(summary['cpu_seconds']['total'])}", flush=True)
    return summary


if __name__ == "__main__":
    main()
