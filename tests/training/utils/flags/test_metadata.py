"""What a flag's metadata must hold: a Chinese meaning, a range, freedom on resume."""

import re
from dataclasses import fields

import pytest

from training.utils.flags.common import Range
from training.utils.flags.steps import STEPS, EvaluateArguments, PromptEvalArguments, RewardEvalArguments

pytestmark = pytest.mark.fast
CLASSES = (*STEPS, PromptEvalArguments, EvaluateArguments, RewardEvalArguments)


@pytest.mark.parametrize("args_class", CLASSES)
def test_every_flag_has_a_chinese_meaning(args_class):
    without = [one.name for one in fields(args_class) if not re.search(r"[\u4e00-\u9fff]", one.metadata["zh"])]
    assert not without
    assert any(one.metadata["common"] for one in fields(args_class))


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
