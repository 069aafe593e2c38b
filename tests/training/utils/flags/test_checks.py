"""What has an effect, or stands in most recipes, is no contradiction."""

from pathlib import Path

import pytest

from scripts.launch.platforms import load_platforms
from tests.training.utils.flags.test_arguments import NEEDED
from training.utils.flags.parse import parse
from training.utils.flags.recipe import load_recipe, recipes_of
from training.utils.flags.steps import DPOArguments, PPOArguments, RewardArguments, SFTArguments


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


@pytest.mark.parametrize(
    ("args_class", "words", "told"),
    [
        (SFTArguments, "--learning_rate 1e-3 --lora_dim 8",
         "--learning_rate 0.001 has no effect with --lora_dim: adapters are trained at --lora_learning_rate; give that, or drop"),
        (DPOArguments, "--learning_rate 1e-3 --lora_dim 8", "--learning_rate 0.001 has no effect with --lora_dim"),
        (PPOArguments, "--actor_learning_rate 1e-3 --actor_lora_dim 8", "--actor_learning_rate 0.001 has no effect with"),
        (PPOArguments, "--advantage rloo --num_return_sequences 2 --critic_learning_rate 1e-3",
         "--critic_learning_rate 0.001 has no effect without --advantage gae; give that"),
        (SFTArguments, "--lora_module_name q_proj", "--lora_module_name q_proj has no effect without --lora_dim"),
        (PPOArguments, "--actor_lora_dim 8 --critic_lora_module_name q_proj", "--critic_lora_module_name q_proj has no effect"),
        (SFTArguments, "--learning_rate 1e-4 --lora_dim 8", None),   # the very rate of the adapters
        (SFTArguments, "--learning_rate 1e-3 --lora_dim 8 --lora_learning_rate 2e-4", None),   # as DeepSpeed-Chat's launchers
        (SFTArguments, "--learning_rate 1e-3", None),
        (RewardArguments, "--learning_rate 1e-3 --lora_dim 8", None),   # of the score head
        (PPOArguments, "--critic_learning_rate 1e-3 --critic_lora_dim 8", None),
    ],
)  # fmt: skip
def test_who_types_a_flag_without_effect_is_told(args_class, words, told, caplog):
    parse(args_class, NEEDED[args_class] + words.split())
    assert told is None or told in caplog.text
    assert bool(told) == ("no effect" in caplog.text)


def test_recipes_may_have_a_rate_for_runs_without_adapters(tmp_path, caplog):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1.0e-3\nlora_dim: 8\n")
    parse(SFTArguments, [*NEEDED[SFTArguments], "--config", str(recipe)])
    assert "no effect" not in caplog.text
