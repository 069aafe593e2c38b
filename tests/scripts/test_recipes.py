"""The recipes of configs/: every section is read by its step's own parser, says what its platform needs and names the
models of the steps before it; what their comments count is so.
"""

import re
from functools import lru_cache

import pytest
import yaml

from scripts.docs import recipes_table
from scripts.launch.platforms import load_platforms, platform_named
from tests.scripts.recipes import MODELS, RECIPES, REPOSITORY, name_of
from training.utils.flags.parse import parse
from training.utils.flags.steps import STEPS

PUBLISHED = [path for path in RECIPES if path.stem != "demo"]
recipes = pytest.mark.parametrize("path", RECIPES, ids=name_of)
published = pytest.mark.parametrize("path", PUBLISHED, ids=name_of)


def content(path):
    return yaml.safe_load((REPOSITORY / path).read_text(encoding="utf-8"))


@lru_cache
def parsed(path):
    """The arguments of all steps that a recipe gives, by section."""
    return {step.section: parse(step, ["--config", str(REPOSITORY / path)]) for step in STEPS}


def processes(path) -> int:
    platform = platform_named(path.parent.name)
    return platform.nodes * (content(path)["launch"].get("processes") or platform.devices)


def test_every_platform_and_every_model_has_recipes():
    by_platform = {name: {path.stem for path in PUBLISHED if path.parent.name == name} for name in load_platforms()}
    assert all(models and models <= set(MODELS) for models in by_platform.values())
    assert by_platform["multi_node"] == by_platform["single_node"] == set(MODELS)
    for name in ("single_gpu", "dcu_z100l", "ascend_910"):   # test_recipes_fit.py says why
        assert by_platform[name] == set(MODELS) - {"opt-66b"}, name
    assert by_platform["cpu"] == {"opt-1.3b", "bloom-1b1", "qwen2.5-1.5b"}


@recipes
def test_every_section_is_read_by_its_step(path):
    """Unknown keys, values out of range and flags that contradict each other are errors there."""
    found = content(path)
    assert list(found) == ["launch", "sft", "reward", "ppo", "dpo"]
    assert found["launch"]["platform"] == path.parent.name
    platform = platform_named(path.parent.name)
    for section, args in parsed(path).items():
        assert args.dtype == platform.dtype, section
        assert args.attn_implementation in ("auto", platform.attention), section
        assert args.gradient_accumulation_steps == found[section].get("gradient_accumulation_steps", 1)


@recipes
def test_steps_start_from_what_the_steps_before_write(path):
    args = parsed(path)
    sft, reward, ppo, dpo = (args[section] for section in ("sft", "reward", "ppo", "dpo"))
    assert len({one.output_dir for one in args.values()}) == 4
    assert ppo.actor_model_name_or_path == dpo.model_name_or_path == sft.output_dir
    assert ppo.critic_model_name_or_path == reward.output_dir
    assert len({one.data_split for one in args.values()} - {"1,0,0", "0,1,0", "0,0,1"}) <= 1   # shares, or a file for each step


@published
def test_models_share_a_tokenizer(path):
    args = parsed(path)
    assert args["sft"].model_name_or_path == MODELS[path.stem]
    shared = args["ppo"].memory_mode == "shared"   # the reward model is an adapter over the SFT model
    small = path.stem.startswith("opt-") and not shared
    assert args["reward"].model_name_or_path == ("facebook/opt-350m" if small else args["sft"].output_dir)
    assert not shared or args["reward"].lora_dim
    assert {args[section].output_dir for section in args} == {f"output/{path.stem}/{section}" for section in args}


@published
def test_batches_divide(path):
    """No process without work, no rollout with a rest that is a smaller minibatch."""
    args, count = parsed(path), processes(path)
    for section in ("sft", "reward", "dpo"):
        one = args[section]
        assert one.global_batch_size % (one.per_device_train_batch_size * count) == 0, section
    ppo = args["ppo"]
    rollout = ppo.per_device_generation_batch_size * ppo.generation_batches * count
    minibatch = ppo.per_device_training_batch_size * ppo.gradient_accumulation_steps * count
    assert rollout % minibatch == 0
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    said = re.findall(r"= (\d+) (prompts a rollout|answers a minibatch)", text)
    expected = {"prompts a rollout": rollout, "answers a minibatch": minibatch}
    assert said and all(int(number) == expected[what] for number, what in said)
    steps = {"one optimizer step": 1} | {f"{number} optimizer steps": number for number in range(2, 20)}
    (counted,) = re.findall(r"minibatch: (.+) a rollout", text)
    assert steps[counted] == rollout // minibatch


@published
def test_adapters_cover_what_the_optimizer_has_no_room_for(path):
    """Learning rates stand beside the weights that they move; nothing is offloaded that does not exist."""
    for section, args in parsed(path).items():
        flags = content(path)[section]
        for prefix in ("actor_", "critic_") if section == "ppo" else ("",):
            adapted = bool(getattr(args, f"{prefix}lora_dim"))
            assert (f"{prefix}lora_learning_rate" in flags) == adapted, (section, prefix)
            head = adapted and (section == "reward" or prefix == "critic_")   # the score head is no adapter
            assert (f"{prefix}learning_rate" in flags) == (not adapted or head), (section, prefix)


@recipes
def test_a_recipe_reads_well(path):
    lines = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 100
    assert max(map(len, lines)) <= 130
    assert all(line == line.rstrip() for line in lines)
    named = re.findall(r"(?:bash|--config) ((?:training|configs)/\S+)", "\n".join(lines))
    assert named and all((REPOSITORY / one).is_file() for one in named), named


@pytest.mark.parametrize("name", ["en/recipes.md", "zh/recipes.md"])
def test_the_table_of_recipes_is_current(repository, name):
    assert recipes_table.main(["--check", str(repository / "docs" / name)]) == 0
