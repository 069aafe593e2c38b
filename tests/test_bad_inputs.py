"""Every wrong input of bad_inputs.yaml ends its command with one sentence and exit code 2, in less than 3 seconds."""

import gc
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import yaml

from models.load import load_scalar_model
from models.save import save_model
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.launching import FORKS, environment, write_pairs
from tests.tiny import tiny_checkpoint

CONTENT = yaml.safe_load(Path(__file__).with_name("bad_inputs.yaml").read_text(encoding="utf-8"))
FLAGS = {"data": "--data_path", "model": "--model_name_or_path", "config": "--config"}
FLAGS |= {("model", "ppo"): "--actor_model_name_or_path", ("config", "doctor"): "--recipe"}
FLAGS |= {("model", name): "--path" for name in ("chat", "server", "worker", "export")}
POSITIONAL = {("model", "plan"): "base", ("config", "launch"): "cpu/demo"}  # the word that a file takes the place of


@dataclass
class Case:
    """One wrong input. says: an expression for the sentence."""

    command: str
    module: str
    words: list[str]
    env: dict[str, str]
    says: str
    wrong: str

    def __str__(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.env.items()), self.command, self.wrong])


def cases() -> list[Case]:
    """Return all entries of the file: each command with each of its wrong words."""
    found = []
    for row in CONTENT["cases"]:
        kind = next((kind for kind in ("with", *FLAGS) if kind in row), "with")
        for command in row["of"]:
            module, *words = shlex.split(CONTENT["commands"][command])
            for wrong in row.get(kind, [""]):
                place = POSITIONAL.get((kind, command))
                flag = FLAGS.get((kind, command), FLAGS.get(kind))
                more = shlex.split(wrong) if kind == "with" else [] if place else [flag, wrong]
                whole = [wrong if word == place else word for word in words] + more
                says = row["says"].replace("{}", re.escape(wrong.lstrip("-").split()[0] if wrong.strip() else flag or ""))
                found.append(Case(command, module, whole, row.get("env", {}), says, wrong))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files, configs and models that the cases name."""
    folder = tmp_path_factory.mktemp("inputs")
    base = tiny_checkpoint(folder / "base", "llama")
    tokenizer = load_tokenizer(base)
    save_model(load_scalar_model(base, dtype=torch.float32, seed=3), tokenizer, load_template(base, tokenizer), folder / "reward")
    write_pairs(folder / "pairs.jsonl", 60)
    for name, content in CONTENT["files"].items():
        if isinstance(content, list):
            content = "".join(part if isinstance(part, str) else part[0] * part[1] for part in content)
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = json.loads((base / "config.json").read_text())
    for name, changes in CONTENT["configs"].items():
        shutil.copytree(base, folder / name)
        (folder / name / "config.json").write_text(json.dumps(config | changes))
    return folder


def run_all(todo: list[dict], folder: Path, output: Path) -> None:
    """Run cases one after the other, each in a fork of this process; write [exit code, CPU seconds, stderr] of each."""
    module = todo[0]["module"]
    importlib.import_module(module)  # once for all forks, which run it anew
    sys.modules.pop(module)
    gc.freeze()  # what is imported is never looked through again
    for case in todo:
        child = os.fork()
        if not child:
            try:
                signal.alarm(20)
                for stream, name in ((1, "out"), (2, "error")):
                    os.dup2(os.open(output.with_name(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
                os.environ.clear()
                os.environ.update(environment(HOME=str(folder), SANBU_CACHE=str(folder / "cache")) | case["env"])
                os.chdir(folder)
                sys.argv = [case["module"], *case["words"]]
                runpy.run_module(case["module"], run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 1
            else:
                code = 0
            sys.stderr.flush()
            os._exit(code)
        _, status, used = os.wait4(child, 0)
        text = output.with_name("error").read_text(errors="replace")
        end = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, text]
        with output.open("a") as file:
            file.write(json.dumps(end) + "\n")


@pytest.mark.parametrize("command", CONTENT["commands"])
def test_one_sentence_and_exit_code_2(folder, tmp_path, command):
    todo = [case for case in cases() if case.command == command]
    process = FORKS.Process(target=run_all, args=([asdict(case) for case in todo], folder, tmp_path / "ends.jsonl"))
    process.start()
    process.join()
    wrong = []
    for case, (code, seconds, text) in zip(todo, map(json.loads, (tmp_path / "ends.jsonl").read_text().splitlines()), strict=True):
        lines = [line for line in text.splitlines() if re.match(r"(.*: )?error: ", line)]
        told = len(lines) == 1 or (command == "check" and lines)  # one for each problem of a manifest
        right = code == 2 and told and "Traceback" not in text and seconds < 3
        if not right or not re.search(case.says, lines[0]):
            wrong.append(f"{case}: exit {code}, {seconds:.1f} s, {(lines or [text[-300:]])[-1]}")
    print(len(todo), "inputs")
    assert not wrong, "\n".join(wrong)
