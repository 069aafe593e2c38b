"""What a flag's metadata must hold: a Chinese meaning, a range, freedom on resume."""

import re
from dataclasses import fields

import pytest

from errors import UserError
from training.utils.flags.common import Range
from training.utils.flags.former import FOREIGN, NOT_YET, RETIRED, former_flags
from training.utils.flags.parse import parse
from training.utils.flags.steps import (
    STEPS,
    DPOArguments,
    EvaluateArguments,
    PPOArguments,
    PromptEvalArguments,
    RewardEvalArguments,
    SFTArguments,
)

pytestmark = pytest.mark.fast
CLASSES = (*STEPS, PromptEvalArguments, EvaluateArguments, RewardEvalArguments)


@pytest.mark.parametrize("args_class", CLASSES)
def test_every_flag_has_a_chinese_meaning(args_class):
    without = [one.name for one in fields(args_class) if not re.search(r"[\u4e00-\u9fff]", one.metadata["zh"])]
    assert not without
    assert any(one.metadata["common"] for one in fields(args_class))


@pytest.mark.parametrize("row", (*RETIRED, *NOT_YET), ids=lambda row: row.names[0])
def test_every_former_flag_has_a_chinese_sentence_or_is_replaced_by_a_flag(row):
    assert re.search(r"[\u4e00-\u9fff]", row.zh) or re.fullmatch(r"--\w+( \S+)?", row.now)


@pytest.mark.parametrize("names", FOREIGN)
def test_a_flag_of_another_system_has_a_name_here_and_is_no_flag_of_every_step(names):
    flags = [{one.name for one in fields(args_class)} for args_class in STEPS]
    assert all(any(ours in known for known in flags) for ours in FOREIGN[names].split())
    for name in names.split():
        taken = [name in known or name in former_flags(one.section) for one, known in zip(STEPS, flags, strict=True)]
        assert not all(taken)


@pytest.mark.parametrize(
    ("args_class", "flag", "told"),
    [
        (SFTArguments, "--max_train_steps", "step 1 (SFT); here it is --max_steps, of which --help all says what it takes."),
        (PPOArguments, "--lora-target", "step 3 (PPO); here it is --actor_lora_module_name, of"),
        (DPOArguments, "--fp16", "DPO; here it is --dtype, of"),
        (SFTArguments, "--report_to", "step 1 (SFT); here it is --enable_tensorboard, of"),
        (SFTArguments, "--init_kl_coef", "step 1 (SFT); --help all lists all flags."),
        (PPOArguments, "--template", "step 3 (PPO); --help all lists all flags."),
    ],
)
def test_a_flag_of_another_system_is_told_by_its_name_here_or_by_none(args_class, flag, told):
    with pytest.raises(UserError, match=re.escape(f"--{flag[2:].replace('-', '_')} is not a flag of {told}")):
        parse(args_class, [flag, "1"])


@pytest.mark.parametrize("args_class", STEPS)
def test_a_resumed_run_may_be_longer_but_not_learn_faster(args_class):
    free = {one.name for one in fields(args_class) if one.metadata["resume"] == "free"}
    assert {"max_steps", "num_train_epochs", "output_dir", "save_steps", "resume"} <= free
    assert not free & {"seed", "learning_rate", "actor_learning_rate", "data_path", "lora_dim"}


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        ({"least": 1}, (1, 2), (0, -1)),
        ({"above": 0}, (0.1,), (0, -1)),
        ({"least": 0, "below": 1}, (0, 0.9), (1, -0.1)),
        ({"above": 0, "most": 1}, (0.1, 1), (0, 1.1)),
        ({}, (-1, 0, 1e9), ()),
    ],
)
def test_ranges(limits, inside, outside):
    within = Range("wrong", **limits)
    assert all(within.holds(value) for value in inside)
    assert not any(within.holds(value) for value in (*outside, float("nan")))


@pytest.mark.parametrize("args_class", CLASSES)
def test_help(args_class, monkeypatch, capsys):
    """--help shows the common flags, --help all each of them, in the language of the user."""
    for name, value in {"LC_ALL": "", "LC_MESSAGES": "", "LANG": "en_US.UTF-8"}.items():
        monkeypatch.setenv(name, value)
    shown = {}
    for language in ("en_US.UTF-8", "zh_CN.UTF-8"):
        monkeypatch.setenv("LANG", language)
        for words in (["--help"], ["--help", "all"]):
            with pytest.raises(SystemExit) as ended:
                parse(args_class, words)
            assert not ended.value.code
            shown[language[:2], len(words)] = capsys.readouterr().out
    for one in fields(args_class):
        assert all((f"  --{one.name} " in shown[language, 1]) == one.metadata["common"] for language in ("en", "zh"))
        assert all(f"  --{one.name} " in shown[language, 2] for language in ("en", "zh"))
        assert one.metadata["zh"] in shown["zh", 2]
    assert shown["en", 1].index("First:") < shown["en", 1].index("Common:") and "Others:" not in shown["en", 1]
    with pytest.raises(UserError, match="--help all"):
        parse(args_class, ["--help", "everything"])
