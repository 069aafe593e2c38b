"""configs/platforms.yaml: complete, in agreement with models/device.py, and told without torch."""

import subprocess
import sys

import pytest

from errors import UserError
from models.device import PLATFORMS, chip_dtypes
from scripts.launch import platforms
from scripts.launch.platforms import load_platforms, platform_named, variable_reasons
from training.utils.flags.parse import flag_names
from training.utils.flags.steps import SFTArguments

pytestmark = pytest.mark.fast
# platform -> what models/device.py calls this kind of machine, and its chip
KINDS = {
    "cpu": ("cpu", "cpu"),
    **dict.fromkeys(("single_gpu", "single_node", "multi_node"), ("cuda", "sm80")),
    "dcu_z100l": ("dcu", "gfx906"),
    "ascend_910": ("npu", "Ascend910A"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_platform_agrees_with_the_device_layer(name):
    platform, (kind, chip) = platform_named(name), KINDS[name]
    assert (platform.accelerator, platform.backend) == (PLATFORMS[kind].torch_device, PLATFORMS[kind].backend)
    assert platform.dtype == chip_dtypes(chip)[0], "the best that the chip trains in"
    assert platform.attention == ("eager" if kind in ("dcu", "npu") else "sdpa")
    assert platform.env["DS_ACCELERATOR"] == platform.accelerator
    assert platform.nodes * platform.devices == {"multi_node": 16, "cpu": 1, "single_gpu": 1}.get(name, 8)
    assert (platform.deployment == "multi_node") == (platform.nodes > 1)
    assert all(isinstance(value, str) for value in (platform.env | platform.env_several_nodes).values())


def test_every_variable_has_its_reason_and_none_chooses_devices():
    """Which devices are used is the user's choice; a fixed one was a trap of earlier scripts."""
    assert set(load_platforms()) == set(KINDS)
    for platform in load_platforms().values():
        for name in platform.env | platform.env_several_nodes:
            assert len(variable_reasons()[name]) > 10 and "VISIBLE" not in name


def test_an_unknown_platform_is_told_what_exists():
    with pytest.raises(UserError, match=r"'dcu' is no platform.*there are cpu, single_gpu.*ascend_910\.$"):
        platform_named("dcu")
    with pytest.raises(UserError, match=r"did you mean dcu_z100l\?"):
        platform_named("dcu_z100")


def test_a_misspelt_key_is_found(monkeypatch):
    content = platforms._read() | {"mine": platforms._read()["cpu"] | {"titel": "x"}}
    monkeypatch.setattr(platforms, "_read", lambda: content)
    with pytest.raises(UserError, match=r"mine: keys that are missing or unknown: titel"):
        load_platforms()


def test_launcher_flags_are_no_flags_of_a_step():
    """Else one of the two could not be given."""
    from scripts.launch.__main__ import build_parser

    ours = {option[2:].replace("-", "_") for option in build_parser().flags if option.startswith("--")}
    assert not (ours - {"help"}) & flag_names(SFTArguments)


def test_reading_and_planning_need_no_torch(repository):
    program = "import sys, train, scripts.launch.launchers; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=repository).returncode == 0
