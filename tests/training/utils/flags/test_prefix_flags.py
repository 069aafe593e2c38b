"""The flags of P-Tuning in all steps."""

import pytest

from tests.training.utils.flags.test_arguments import NEEDED
from training.utils.flags.parse import parse
from training.utils.flags.steps import PPOArguments, RewardArguments, SFTArguments

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("args_class", "role"), [(SFTArguments, ""), (RewardArguments, ""), (PPOArguments, "actor")])
def test_the_plain_names_are_the_models_and_in_step_3_the_actors(args_class, role, tmp_path):
    off = {"pre_seq_len": 0, "prefix_projection": False, "ptuning_checkpoint": None}
    assert parse(args_class, NEEDED[args_class]).prefix_options(role) == off
    argv = ["--pre_seq_len", "8", "--prefix_projection", "--ptuning_checkpoint", str(tmp_path)]
    args = parse(args_class, NEEDED[args_class] + argv)
    assert args.prefix_options(role) == {"pre_seq_len": 8, "prefix_projection": True, "ptuning_checkpoint": str(tmp_path)}
    if role:
        assert args.prefix_options("critic") == off


def test_a_rate_for_whole_weights_is_said_once(caplog):
    argv = [*NEEDED[SFTArguments], "--pre_seq_len", "8"]
    parse(SFTArguments, argv)
    assert sum("--learning_rate is at its default" in line for line in caplog.messages) == 1
    caplog.clear()
    parse(SFTArguments, [*argv, "--learning_rate", "2e-2"])
    assert not caplog.records
