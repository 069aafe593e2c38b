"""Every recipe fits the machines of its platform with room to spare, as the memory plan counts; what has no recipe does not."""

from pathlib import Path

import pytest

from models.device import DTYPES
from scripts.launch.platforms import Platform, platform_named
from scripts.plan.__main__ import build_parser, config_of, source_of, step_arguments
from tests.scripts.recipes import RECIPES, REPOSITORY, name_of
from training.utils.flags.parse import parse
from training.utils.flags.recipe import load_recipe
from training.utils.flags.steps import STEPS
from training.utils.memory import fit as planning
from training.utils.memory.arithmetic import GIB, Machine, Plan
from training.utils.memory.footprint import Footprint, Peak

FOOTPRINTS: dict[tuple, Footprint] = {}   # recipes share most of them


class AtMost(Footprint):
    """A footprint that looks at one row, and takes each further one for as much: more than the truth, in a fraction of the time."""

    def training(self, batch, length, keep=None):
        return times(super().training(1, length, keep), batch)

    def forward(self, batch, length, keep=None):
        return times(super().forward(1, length, keep), batch)


def times(one: Peak, batch: int) -> Peak:
    return Peak(one.activations * batch, one.logits * batch)


def bound(config, **options) -> Footprint:
    """The same footprint for the same network."""
    key = (config.to_json_string(), str(sorted(options.items(), key=str)))
    return FOOTPRINTS.setdefault(key, AtMost(config, **options))


def machine_of(platform: Platform, launch: dict) -> Machine:
    each, card = launch.get("processes") or platform.devices, platform.accelerator != "cpu"
    return Machine(
        platform.nodes * each, each, card * platform.device_memory_gib * GIB, platform.host_memory_gib * GIB, accelerator=card
    )


def memory_of(path: Path, arguments: type) -> planning.StepMemory:
    """What a step of a recipe needs; the folders that its other steps write stand for what these start from."""
    recipe = load_recipe(str(REPOSITORY / path))
    start = {recipe[step]["output_dir"]: recipe[step]["model_name_or_path"] for step in ("sft", "reward")}
    args = parse(arguments, ["--config", str(REPOSITORY / path)])
    models = dict(getattr(args, "models", {})) or {"model": args.model_name_or_path}
    for role in models:
        while models[role] in start:
            models[role] = start[models[role]]
    configs = {role: config_of(model) for role, model in models.items()}
    return planning.StepMemory(args, configs, dtype=DTYPES[args.dtype], attn=args.attn_implementation)


def planned(path: Path, arguments: type, platform: str) -> Plan:
    launch = load_recipe(str(REPOSITORY / path))["launch"]
    memory = memory_of(path, arguments)
    return memory.plan(memory.setting, machine_of(platform_named(platform), launch))


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "demo"], ids=name_of)
def test_every_step_fits(path, monkeypatch):
    for arguments in STEPS:
        monkeypatch.setattr(planning, "Footprint", bound)
        found = planned(path, arguments, path.parent.name)
        if found.verdict != "fits":
            monkeypatch.setattr(planning, "Footprint", Footprint)
            found = planned(path, arguments, path.parent.name)
        card, host = found.on_card / GIB, found.on_host / GIB
        assert found.verdict == "fits", f"{arguments.section}: {card:.1f} GiB a card, {host:.0f} on the host, {found.moment}"


def test_one_row_bounds_more():
    config, options = config_of("llama-2-7b"), {"dtype": DTYPES["bf16"], "lora_dim": 64}
    for keep in (None, 256):
        most, exact = (kind(config, **options).training(6, 512, keep).total for kind in (AtMost, Footprint))
        assert exact <= most <= 1.5 * exact


@pytest.mark.parametrize("platform", ["single_gpu", "dcu_z100l", "ascend_910"])
def test_the_largest_model_has_no_recipe_where_it_does_not_fit(platform, monkeypatch):
    monkeypatch.setattr(planning, "Footprint", bound)
    ppo = next(arguments for arguments in STEPS if arguments.section == "ppo")
    assert planned(Path("configs/single_node/opt-66b.yaml"), ppo, "single_node").fits
    monkeypatch.setattr(planning, "Footprint", Footprint)
    assert not planned(Path("configs/single_node/opt-66b.yaml"), ppo, platform).fits


def test_the_plan_knows_what_folders_that_are_still_to_be_written_come_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = build_parser().parse_args(["--config", str(REPOSITORY / "configs/single_gpu/opt-13b.yaml"), "--step", "3"])
    options.model = None
    args = step_arguments(options, [])
    found = [source_of(model, options.written) for model in args.models.values()]
    assert found == ["facebook/opt-13b", "facebook/opt-350m"]
    (tmp_path / args.actor_model_name_or_path).mkdir(parents=True)
    assert source_of(args.actor_model_name_or_path, options.written) == args.actor_model_name_or_path
