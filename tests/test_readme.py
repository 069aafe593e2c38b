"""What the READMEs tell people to type is accepted, and their tables say what the parsers say."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import train
from scripts.docs import flags_table
from scripts.launch.__main__ import prepare
from tests.launching import environment, start
from tests.tiny import tiny_checkpoint
from training.utils.flags.parse import parse
from training.utils.flags.steps import PPOArguments, RewardArguments, SFTArguments

READMES = ["README.md", "README_zh.md"]
CLASSES = {"step1_sft": SFTArguments, "step2_reward": RewardArguments, "step3_ppo": PPOArguments}


def commands(repository: Path, name: str) -> list[list[str]]:
    """The indented command lines of a README, continued lines joined."""
    text = (repository / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^    ((?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    known = ("bash", "python", "deepspeed", "pip")
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks if block.split(" ", 1)[0] in known]


def test_both_readmes_say_the_same_commands(repository):
    english, chinese = (commands(repository, name) for name in READMES)
    assert english == chinese and len(english) >= 8


def test_every_step_command_parses(repository):
    found = [command for command in commands(repository, "README.md") if "scripts.launch" in command]
    assert len(found) == 3
    for command in found:
        launch, _ = prepare([*command[command.index("scripts.launch") + 1 :], "--dry-run"], {})
        module, *flags = launch.command[launch.command.index("--module") + 1 :]
        args = parse(CLASSES[module.split(".")[1]], flags)
        assert args.output_dir.startswith("output/")


def test_named_files_and_scripts_exist(repository):
    for command in commands(repository, "README.md"):
        if command[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(command[2]), command
        elif command[0] in ("bash", "python"):
            assert (repository / command[1]).is_file(), command
    for name in READMES:
        text = (repository / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (repository / link).exists(), f"{name} links to {link}"


def test_train_py_accepts_its_commands(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    found = [c for c in commands(repository, "README.md") if c[:2] == ["python", "train.py"]]
    assert len(found) == 2
    base = tiny_checkpoint(tmp_path / "base", "llama", max_position_embeddings=2048)
    for command in found:
        words = [word.replace("/models/chatglm2-6b", str(base)) for word in command[2:]]
        assert train.main([*words, "--dry-run"]) in (0, None)
        shown = capsys.readouterr().out
        for module in ("step1_sft", "step2_reward", "step3_ppo"):
            assert f"training.{module}.main" in shown


def test_the_loop_is_that_of_step_2(repository):
    for name in READMES:
        (loop,) = re.findall(r"```python\n(.*?)```", (repository / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        assert loop in (repository / "training/step2_reward/main.py").read_text(encoding="utf-8")
        assert len((repository / name).read_text(encoding="utf-8").splitlines()) <= 150


def test_commands_of_tools_run(repository, tmp_path):
    """The tools' commands as they stand; rendering goes into another folder."""
    found = [command for command in commands(repository, "README.md") if command[:2] == ["python", "-m"] or "--dry-run" in command]
    found = [command for command in found if "scripts.launch" not in command]  # those train
    assert len(found) == 4
    for command in found:
        words = [str(tmp_path / word) if word == "k8s" else word for word in command]
        if words[0] == "python":
            ended = start(words[2], words[3:])
        else:
            surroundings = {name: value for name, value in environment().items() if name != "DS_ACCELERATOR"}
            ended = subprocess.run(words, cwd=repository, env=surroundings, capture_output=True, text=True, timeout=300)
        # the doctor may have something to say about this machine
        assert ended.returncode in ((0, 1, 2) if "scripts.doctor" in command else (0,)), ended.stderr
        assert ended.stdout.strip() and "Traceback" not in ended.stderr
    assert list((tmp_path / "k8s").glob("*.yaml"))


def test_the_table_of_flags_is_current(repository):
    pages = [str(repository / "docs" / name) for name in ("flags.md", "flags_zh.md")]
    assert flags_table.main(["--check", *pages]) in (0, None)
