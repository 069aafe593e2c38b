"""--help of every command speaks the language of the user, and imports nothing that takes seconds."""

import argparse
import re
import subprocess
import sys
from importlib import import_module

import pytest

from errors import UserError, language_of_user
from training.utils.flags.help import help_text
from training.utils.flags.parse import MODULES

# module -> what build_parser takes. Steps and evaluations have their flags in dataclasses (tests/training/utils/flags).
COMMANDS = {
    "train": (),
    "inference.chatbot": (),
    "inference.server.__main__": (),
    "inference.worker.__main__": (None,),
    "scripts.demo.__main__": ("demo",),
    "scripts.doctor.__main__": (),
    "scripts.download_dataset": (),
    "scripts.export.__main__": (),
    "scripts.kubernetes.__main__": (),
    "scripts.kubernetes.pod": (),
    "scripts.launch.__main__": (),
    "scripts.plan.__main__": (),
    "scripts.report.__main__": (),
}
# Commands for those who change the repository, or that another command runs
OF_DEVELOPERS = (
    *("benchmarks/", "scripts/docs/", "scripts/launch/launchers.py", "scripts/preprocess_dataset.py"),
    *(f"scripts/demo/{name}.py" for name in ("make_data", "model", "smollm2_data", "smollm2_model")),
)
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture
def chinese(monkeypatch):
    for name, value in {"LC_ALL": "", "LC_MESSAGES": "", "LANG": "zh_CN.UTF-8"}.items():
        monkeypatch.setenv(name, value)
    assert language_of_user() == "zh"


def test_every_command_is_known_here(repository):
    command = ["git", "grep", "-lE", r"(CommandLine|ArgumentParser)\(", "*.py"]
    files = subprocess.check_output(command, cwd=repository, text=True)
    found = [file for file in files.split() if not file.startswith(("tests/", "findings/", *OF_DEVELOPERS))]
    known = {f"{module.replace('.', '/')}.py" for module in COMMANDS}
    assert set(found) - {"errors.py", "training/utils/flags/parse.py"} == known


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.usefixtures("chinese")
def test_every_description_and_flag_is_there_in_chinese(module):
    build = import_module(module).build_parser
    parsers = [build(*COMMANDS[module])]
    parsers += [build(command) for command in ("ask", "watch", "create-tables") if "worker" in module]
    for parser in parsers:
        assert CHINESE.search(parser.description or "命令") and "用法：" in parser.format_help()  # commands inside one have none
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
                assert all(CHINESE.search(choice.help) for choice in action._choices_actions)
            elif action.help != argparse.SUPPRESS and action.dest != "help":
                assert CHINESE.search(action.help), action.option_strings
        assert not re.search(r"show this help|^options:|^positional", parser.format_help(), re.MULTILINE)


def test_a_slip_is_told_with_the_flag_that_was_meant():
    parser = import_module("scripts.doctor.__main__").build_parser()
    with pytest.raises(UserError, match=r"^Unrecognized arguments: --recip x; did you mean --recipe\?$"):
        parser.parse_args(["--recip", "x"])
    with pytest.raises(UserError, match=r"^Unrecognized arguments: --nonsense; --help lists the flags\.$"):
        parser.parse_args(["--nonsense"])


@pytest.mark.parametrize("args_class", MODULES)
def test_steps_and_evaluations_say_in_chinese_what_they_are(args_class):
    lines = help_text(args_class, "m", "common", "zh").splitlines()
    assert CHINESE.search(lines[2]) and args_class.__doc__ not in lines


def test_help_imports_nothing_heavy(repository):
    script = f"""
import sys
from importlib import import_module
for module, words in {COMMANDS}.items():
    import_module(module).build_parser(*words).format_help()
    heavy = {{"torch", "transformers", "deepspeed", "datasets", "pyarrow", "pandas", "fastapi", "sqlalchemy"}} & sys.modules.keys()
    assert not heavy, (module, heavy)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr
