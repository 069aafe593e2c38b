"""Find the steps in an output folder and read what they wrote. Nothing in those files can stop it: what is damaged is left out
and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from errors import UserError
from json_text import parse_json
from scripts.report.words import STEP_TITLES, word
from steps import METHODS, SECTIONS, STEPS, step_of
from training.utils.run.environment import DONE
from training.utils.run.metrics import is_finite, points_of, read_lines

WRITTEN = ("metrics.jsonl", DONE, "training.log")  # any of them says: a step was here
# section -> flags and metrics that only this step has, or has before the sections behind it
SIGNS = {
    "ppo": ("actor_model_name_or_path", "actor_loss", "kl"),
    "dpo": ("beta", "margin"),
    "reward": ("center_rewards_coefficient", "accuracy"),
    "sft": ("loss_on", "perplexity"),
}


@dataclass(frozen=True)
class StepRun:
    """What one step has written so far.

    section: of steps.py, None if it cannot be told. metrics: the records of metrics.jsonl. done: sanbu_done.json, {} if the
    step has not ended. left_out: (name of the sentence, file, count) for what could not be read.
    """

    section: str | None
    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    done: dict[str, Any] = field(default_factory=dict)
    left_out: list[tuple[str, Path, int]] = field(default_factory=list)

    @property
    def there(self) -> bool:
        """Whether the step has been started."""
        return was_here(self.folder)

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of a step that is done."""
        flags = self.done.get("flags")
        return flags if isinstance(flags, dict) else {}

    @property
    def last_step(self) -> int:
        """The last optimizer step (rollout in step 3) in the metrics; 0 without any."""
        return max((record["step"] for record in self.metrics if is_finite(record.get("step"))), default=0)

    @property
    def held_out(self) -> bool:
        """Whether the step has measured something on held-out data; earlier versions did not say on what."""
        evaluated = [record for record in self.metrics if any(name.startswith("eval/") for name in record)]
        return any(record.get("eval/measured_on") != "training" for record in evaluated)

    def title(self, language: str) -> str:
        """Return "Step 2: reward model", "DPO"; the folder's name where the step cannot be told."""
        if self.section is None:
            return self.folder.name
        step = step_of(self.section)
        name = STEP_TITLES[self.section] if language == "zh" else step.title
        return word("step_number", language, number=step.number, title=name) if step.choice.isdigit() else name

    def curve(self, name: str) -> dict[str, list[tuple[int, float]]]:
        """Return the (step, value) pairs of one metric under "train" and "eval", as far as the step logged them."""
        return {part: points for part in ("train", "eval") if (points := points_of(self.metrics, f"{part}/{name}"))}


def was_here(folder: Path) -> bool:
    """Tell whether a step has written into a folder."""
    return any((folder / name).is_file() for name in WRITTEN)


def find_runs(folder: Path) -> list[StepRun]:
    """Return the step in a folder; else those in the folders in it, also as train.py nests them, with those still to come.

    Raises UserError if there is none.
    """
    if was_here(folder):
        return [read_run(folder)]
    nested = [path for step in STEPS for path in folder.glob(f"{step.folder}/*")]
    runs = [read_run(path) for path in sorted([*folder.glob("*"), *nested]) if was_here(path)]
    if not runs:
        raise UserError(
            f"--run {folder}: no step of a training run in it (no metrics.jsonl); name the --output-dir of train.py, or the "
            "--output_dir of a step."
        )
    present = {run.section for run in runs if run.folder in nested or run.folder.name == run.section}
    method = METHODS["dpo" if "dpo" in present and not present & {"reward", "ppo"} else "ppo"]
    runs += [StepRun(section, folder / section) for section in method if present and section not in present]
    return sorted(runs, key=lambda run: SECTIONS.index(run.section) if run.section else len(SECTIONS))


def read_run(folder: Path, section: str | None = None) -> StepRun:
    """Return what a step wrote into its folder. section: found out unless given."""
    left_out, metrics, done = [], [], {}
    if (file := folder / "metrics.jsonl").is_file():
        metrics, cut = read_lines(file)
        values = [record.get("step") for record in metrics]
        values += [
            value for record in metrics for name, value in record.items() if "/" in name and not isinstance(value, str)
        ]
        left_out += [("cut_lines", file, cut), ("odd_values", file, sum(not is_finite(value) for value in values))]
    if (file := folder / DONE).is_file():
        try:
            done = parse_json(file.read_bytes())
        except ValueError:
            done = None
        if not isinstance(done, dict):
            done = {}
            left_out.append(("odd_done", file, 1))
    run = StepRun(section, folder, metrics, done, [one for one in left_out if one[2]])
    return run if section else replace(run, section=section_of(run))


def section_of(run: StepRun) -> str | None:
    """Return which step wrote a folder: by where it stands, else by its flags and metrics; None if nothing tells."""
    by_folder = {step.folder: step.section for step in STEPS}
    if (parent := run.folder.resolve().parent.name) in by_folder:
        return by_folder[parent]
    if run.folder.name in SECTIONS:
        return run.folder.name
    known = {*run.flags, *(name.split("/")[-1] for record in run.metrics for name in record)}
    return next((section for section, signs in SIGNS.items() if known.intersection(signs)), None)


def sentences(runs: Sequence[StepRun], language: str) -> list[str]:
    """Return what is not on the page and why: steps that are not there, what could not be read."""
    absent = [word("absent_step", language, step=run.title(language)) for run in runs if not run.there]
    return absent + [word(name, language, file=file, count=count) for run in runs for name, file, count in run.left_out]
