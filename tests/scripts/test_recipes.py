"""Every section of a recipe is read by its own step, fits its platform and names the models of the steps before it."""

import re

import pytest

from errors import UserError
from scripts.docs import recipes_table
from scripts.launch.platforms import load_platforms, platform_named
from steps import SECTIONS, STEPS
from tests.scripts.recipes import MODELS, RECIPES, REPOSITORY, name_of
from training.utils.flags.parse import parse
from training.utils.flags.recipe import load_recipe, recipe_file, recipes_of

pytestmark = pytest.mark.fast
PUBLISHED = [path for path in RECIPES if path.stem != "demo"]
FILES = sorted({recipe_file(REPOSITORY / path)[0] for path in RECIPES})


def parsed(path):
    """The arguments of all steps that a recipe gives, by section."""
    return {step.section: parse(step.arguments_class, ["--config", str(REPOSITORY / path)]) for step in STEPS}


def test_every_platform_and_every_model_has_recipes():
    by_platform = {name: {path.stem for path in PUBLISHED if path.parent.name == name} for name in load_platforms()}
    assert by_platform["multi_node"] == by_platform["single_node"] == set(MODELS)
    for name in ("single_gpu", "dcu_z100l", "ascend_910"):  # test_recipes_fit.py says why
        assert by_platform[name] == set(MODELS) - {"opt-66b"}, name
    assert by_platform["cpu"] == {"opt-1.3b", "bloom-1b1", "qwen2.5-1.5b"}
    assert len(PUBLISHED) == 55


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_section_is_read_by_its_step(path):
    """Unknown keys, values out of range and flags that contradict each other are errors there."""
    found, args = load_recipe(str(REPOSITORY / path)), parsed(path)
    assert list(found) == ["launch", *SECTIONS]
    assert found["launch"]["platform"] == path.parent.name
    platform = platform_named(path.parent.name)
    for section, one in args.items():
        assert one.dtype == platform.dtype, section
        assert one.attn_implementation in ("auto", platform.attention), section
        assert one.gradient_accumulation_steps == found[section].get("gradient_accumulation_steps", 1)
    sft, reward, ppo, dpo = (args[section] for section in ("sft", "reward", "ppo", "dpo"))
    assert len({one.output_dir for one in args.values()}) == 4
    assert ppo.actor_model_name_or_path == dpo.model_name_or_path == sft.output_dir
    assert ppo.critic_model_name_or_path == reward.output_dir
    shares = {one.data_split for one in args.values()} - {"1,0,0", "0,1,0", "0,0,1"}
    assert len(shares) <= 1  # shares, or a file for each step
    if path.stem in MODELS:
        check_models(path.stem, args)
        check_batches(path, args)
        check_learning_rates(found, args)


def check_models(name, args):
    """Models share a tokenizer."""
    assert args["sft"].model_name_or_path == MODELS[name]
    shared = args["ppo"].memory_mode == "shared"  # the reward model is an adapter over the SFT model
    small = name.startswith("opt-") and not shared
    assert args["reward"].model_name_or_path == ("facebook/opt-350m" if small else args["sft"].output_dir)
    assert not shared or args["reward"].lora_dim
    assert {args[section].output_dir for section in args} == {f"output/{name}/{section}" for section in args}


def check_batches(path, args):
    """No process is without work, and no rollout leaves a smaller minibatch; the comments count right."""
    platform = platform_named(path.parent.name)
    count = platform.nodes * platform.devices
    for section in ("sft", "reward", "dpo"):
        one = args[section]
        assert one.global_batch_size % (one.per_device_train_batch_size * count) == 0, section
    ppo = args["ppo"]
    rollout = ppo.per_device_generation_batch_size * ppo.generation_batches * count
    minibatch = ppo.per_device_training_batch_size * ppo.gradient_accumulation_steps * count
    assert rollout % minibatch == 0
    text = text_for(path)
    expected = {"prompts a rollout": rollout, "answers a minibatch": minibatch}
    counted = re.findall(r"(?:= |are |and )(\d+) (prompts a rollout|answers a minibatch)", text)
    assert counted and all(int(number) == expected[what] for number, what in counted)


def text_for(path) -> str:
    """The part of the file that counts a platform's rollouts: its block, or the comment above its alias."""
    text = recipe_file(REPOSITORY / path)[0].read_text(encoding="utf-8")
    shared, _, blocks = text.partition("\nplatforms:\n")
    for block in re.split(r"\n\n", blocks):
        if re.search(rf"^  {re.escape(path.parent.name)}:", block, re.MULTILINE):
            lines = block.splitlines()
            alias = re.fullmatch(r"  \w+: \*(\w+)", lines[-1])
            counted = re.sub(r"\n  # ", " ", block)
            if re.search(r"\d (prompts a rollout|answers a minibatch)", counted):
                return counted
            return text_for(path.parent.parent / alias[1] / path.name) if alias else shared
    raise AssertionError(path)


def check_learning_rates(found, args):
    """Learning rates stand beside the weights that they move."""
    for section, one in args.items():
        for prefix in ("actor_", "critic_") if section == "ppo" else ("",):
            adapted = bool(getattr(one, f"{prefix}lora_dim"))
            assert (f"{prefix}lora_learning_rate" in found[section]) == adapted, (section, prefix)
            head = adapted and (section == "reward" or prefix == "critic_")  # the score head is no adapter
            assert (f"{prefix}learning_rate" in found[section]) == (not adapted or head), (section, prefix)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_reads_well(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and max(map(len, lines)) <= 132
    assert all(line == line.rstrip() for line in lines)
    named = re.findall(r"(?:bash|--config) ((?:training|configs)/[\w./-]+)", "\n".join(lines))
    assert named and all((REPOSITORY / one).is_file() or recipe_file(REPOSITORY / one) for one in named), named


def test_a_platform_changes_the_shared_sections(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("sft: {max_seq_len: 8, seed: 1}\nplatforms:\n  cpu:\n    sft: {seed: 2}\n    dpo: {beta: 1}\n  node: {}\n")
    (tmp_path / "node").mkdir()
    found = load_recipe(str(tmp_path / "cpu/mine.yaml"))
    assert found == {"launch": {"platform": "cpu"}, "sft": {"max_seq_len": 8, "seed": 2}, "dpo": {"beta": 1}}
    assert load_recipe(str(tmp_path / "node/mine.yaml"))["sft"]["seed"] == 1
    assert recipes_of(tmp_path, "cpu") == [tmp_path / "cpu/mine.yaml"]
    (tmp_path / "node/mine.yaml").write_text("sft: {seed: 3}\n")  # a file of one's own wins
    assert load_recipe(str(tmp_path / "node/mine.yaml")) == {"sft": {"seed": 3}}
    for path, words in (
        ("mine.yaml", r"serves the platforms cpu, node; name one of them in the path: --config \S+cpu/mine.yaml"),
        ("gpu/mine.yaml", "No such file"),
    ):
        with pytest.raises(UserError, match=words):
            load_recipe(str(tmp_path / path))
    file.write_text("sft: {}\nplatforms:\n  cpu:\n    stf: {seed: 2}\n")
    with pytest.raises(UserError, match=r"platforms, cpu: no section stf; did you mean sft\?"):
        load_recipe(str(tmp_path / "cpu/mine.yaml"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_table_of_recipes_is_current(repository, language):
    assert recipes_table.main(["--check", str(repository / "docs" / language / "recipes.md")]) == 0
