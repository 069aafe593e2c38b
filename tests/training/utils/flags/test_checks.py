"""What has an effect, or stands in most recipes, is no contradiction."""

from pathlib import Path

import pytest

from scripts.launch.platforms import load_platforms
from tests.training.utils.flags.test_arguments import NEEDED
from training.utils.flags.parse import parse
from training.utils.flags.recipe import load_recipe, recipes_of
from training.utils.flags.steps import PPOArguments


@pytest.mark.parametrize(
    "words",
    [
        ["--lr_scheduler_type", "constant"],   # its default of 10 warm-up steps was not asked for
        ["--unsup_coef", "0"],
        ["--advantage", "reinforce++", "--critic_zero_stage", "3", "--gamma", "0.9"],   # the reward model's; rewards to come
        ["--advantage", "reinforce++", "--critic_lora_dim", "8", "--critic_gradient_checkpointing"],   # as recipes have them
        ["--kl_target", "6", "--kl_horizon", "50"],
    ],
)
def test_what_has_an_effect_or_stands_in_most_recipes_is_accepted(words):
    parse(PPOArguments, NEEDED[PPOArguments] + words)


@pytest.mark.parametrize("advantage", ["grpo", "reinforce++"])
def test_every_recipe_goes_with_an_advantage_that_has_no_critic(advantage):
    """As the README says: no flag of a recipe has to be taken back first."""
    tried = 0
    for path in (path for platform in load_platforms() for path in recipes_of(Path("configs"), platform)):
        if "ppo" in load_recipe(str(path)):
            parse(PPOArguments, ["--config", str(path), "--advantage", advantage, "--num_return_sequences", "4"])
            tried += 1
    assert tried > 20
