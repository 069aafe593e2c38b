"""Flags that contradict each other or a file, or that would change nothing, are refused; the rest is not."""

from pathlib import Path

import pytest

from errors import UserError
from scripts.launch.platforms import load_platforms
from tests.training.utils.flags.test_arguments import NEEDED
from training.utils.flags.parse import parse
from training.utils.flags.recipe import load_recipe, recipes_of
from training.utils.flags.steps import PPOArguments, SFTArguments


@pytest.mark.parametrize(
    ("args_class", "words", "sentence"),
    [
        (SFTArguments, ["--lora_dim", "8", "--lora_alpha", "0"], "--lora_alpha 0 multiplies the adapters by 0"),
        (PPOArguments, ["--critic_lora_dim", "8", "--critic_lora_alpha", "0"], "--critic_lora_alpha 0 multiplies"),
        (SFTArguments, ["--lr_scheduler_type", "constant", "--num_warmup_steps", "5"],
         "--num_warmup_steps has no effect with --lr_scheduler_type constant; take constant_with_warmup"),
        (PPOArguments, ["--lr_scheduler_type", "constant", "--num_warmup_steps", "5"], "--num_warmup_steps has no effect"),
        (PPOArguments, ["--unsup_coef", "1"], "--unsup_coef has no effect without --unsupervised_dataset_name"),
        (PPOArguments, ["--kl_horizon", "50"], "--kl_horizon has no effect without --kl_target"),
        *((PPOArguments, ["--advantage", "reinforce++", *words], f"{words[0]} has no effect without --advantage gae")
          for words in (["--lam", "0.9"], ["--cliprange_value", "0.1"], ["--critic_dropout", "0.1"])),
        (SFTArguments, ["--deepspeed_config", "STAGE_3"], "STAGE_3: \"stage\" 3 contradicts --zero_stage 0"),
        (PPOArguments, ["--deepspeed_config", "STAGE_3", "--actor_zero_stage", "3"],
         "STAGE_3: \"stage\" 3 contradicts --critic_zero_stage 0"),
        (SFTArguments, ["--deepspeed_config", "FP16", "--dtype", "bf16"], "FP16: the section \"fp16\" is switched on, and"),
    ],
)  # fmt: skip
def test_flags_without_effect_are_told_in_one_sentence(args_class, words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("STAGE_3").write_text('{"zero_optimization": {"stage": 3}}')
    Path("FP16").write_text('{"fp16": {"enabled": true}}')
    with pytest.raises(UserError) as caught:
        parse(args_class, NEEDED[args_class] + words)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


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
