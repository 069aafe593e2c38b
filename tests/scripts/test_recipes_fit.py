"""Every recipe fits the machines of its platform with room to spare, as the memory plan counts; what has no recipe does not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from errors import UserError
from models.device import DTYPES
from scripts.docs import memory_table
from scripts.launch.platforms import load_platforms, platform_named
from scripts.plan.known import config_of
from scripts.plan.section import plan_section, platform_machine
from steps import SECTIONS
from tests.scripts.recipes import RECIPES, REPOSITORY
from training.utils.flags.recipe import Recipe
from training.utils.memory import fit
from training.utils.memory.arithmetic import GIB, Peak
from training.utils.memory.footprint import Footprint

FOOTPRINTS: dict[tuple, Footprint] = {}  # recipes share most of them


class AtMost(Footprint):
    """A footprint that looks at one row and counts each further one the same, and scores all tokens of the row.

    More than the truth, in a fraction of the time. The first token's logits alone (keep=1) stay as they are.
    """

    def training(self, batch, length, keep=None):
        return times(super().training(1, length), batch)

    def forward(self, batch, length, keep=None):
        return times(super().forward(1, length, keep if keep == 1 else None), batch)


def times(one: Peak, batch: int) -> Peak:
    return Peak(one.activations * batch, one.logits * batch)


def bound(config, **options) -> Footprint:
    """Return the same footprint for networks of the same sizes; bf16 has the bytes of fp16."""
    if options["dtype"] == DTYPES["bf16"]:
        options["dtype"] = DTYPES["fp16"]
    sizes = {name: value for name, value in config.to_dict().items() if isinstance(value, int) and not name.endswith("_token_id")}
    sizes.pop("seq_length", None)  # ChatGLM2 and 3 differ in it alone
    key = (config.model_type, str(sorted(sizes.items())), str(sorted(options.items(), key=str)))
    if key not in FOOTPRINTS:
        FOOTPRINTS[key] = AtMost(config, **options)
    return FOOTPRINTS[key]


@pytest.mark.parametrize("platform", load_platforms())
def test_every_section_of_every_recipe_fits(platform, monkeypatch):
    machine = platform_machine(platform_named(platform))
    for path in (path for path in RECIPES if path.parent.name == platform and path.stem != "demo"):
        recipe = Recipe.read(str(REPOSITORY / path))
        each = recipe.launch.get("processes") or machine.per_node
        here = replace(machine, devices=machine.devices // machine.per_node * each, per_node=each)
        for section in SECTIONS:
            monkeypatch.setattr(fit, "NETWORKS", {})
            monkeypatch.setattr(fit, "Footprint", bound)
            found = plan_section(recipe, section, platform_named(platform), machine=here).plan
            if found.verdict != "fits":
                monkeypatch.setattr(fit, "NETWORKS", {})
                monkeypatch.setattr(fit, "Footprint", Footprint)
                found = plan_section(recipe, section, platform_named(platform), machine=here).plan
            card, host = found.on_card / GIB, found.on_host / GIB
            assert found.verdict == "fits", f"{path} {section}: {card:.1f} GiB a card, {host:.0f} on the host, {found.moment}"


def test_one_row_bounds_more():
    config, options = config_of("llama-2-7b"), {"dtype": DTYPES["bf16"], "lora_dim": 64}
    for keep in (None, 256):
        most, exact = (kind(config, **options).training(6, 512, keep).total for kind in (AtMost, Footprint))
        assert exact <= most <= 1.5 * exact


def test_the_largest_model_has_no_recipe_where_it_does_not_fit():
    recipe = Recipe.read(str(REPOSITORY / "configs/single_node/opt-66b.yaml"))
    machines = [platform_machine(platform_named(name)) for name in ("single_gpu", "dcu_z100l", "ascend_910")]
    found = plan_section(recipe, "ppo", platform_named("single_node"), machine=machines[0])
    assert "does not fit" in found.refusal
    assert not any(found.memory.plan_as_run(found.plan.setting, machine).fits for machine in machines)


def test_a_folder_that_is_written_counts_as_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.read(str(REPOSITORY / "configs/single_gpu/opt-13b.yaml"))
    folder = recipe.output("sft")
    assert recipe.model_of(folder) == "facebook/opt-13b"
    (tmp_path / folder).mkdir(parents=True)
    assert recipe.model_of(folder) == folder


def test_memory_tables_of_the_pages(tmp_path, monkeypatch, capsys):
    sizes = SimpleNamespace(plan=SimpleNamespace(on_card=1.25 * GIB, on_host=40.4 * GIB))
    computed = {"known": {"sft": sizes, "ppo": sizes}, "unknown": {"sft": UserError("x")}}
    monkeypatch.setattr(memory_table, "computed", lambda _: computed)
    page = tmp_path / "page_zh.md"
    page.write_text("<!-- memory:begin dcu_z100l -->\nold\n<!-- memory:end -->\n<!-- memory:begin cpu -->\n<!-- memory:end -->\n")
    assert memory_table.main(["--check", str(page)]) == 1
    assert memory_table.main(["--write", str(page)]) == 0
    rows = [line for line in page.read_text().splitlines() if line.startswith("| known")]
    assert rows == ["| known | 1.2 / 40 | – | 1.2 / 40 | – |", "| known | 40.4 | – | 40.4 | – |"]
    assert "unknown" not in page.read_text()
    assert memory_table.main(["--check", str(page)]) == 0
    page.write_text("no table")
    for path in (page, tmp_path / "absent.md"):
        assert memory_table.main(["--check", str(path)]) == 2
    said = capsys.readouterr().err
    assert "memory:begin" in said and "absent.md: No such file or directory; name an existing Markdown file" in said
