"""The doors between the rooms, read from the source: who may import whom, and who may speak to a card."""

import ast
from pathlib import Path

import pytest

# room -> the rooms of ours that it may import, besides itself (shared/DESIGN.md, "Doors open one way")
DOORS = {
    "models": set(),
    "inference": {"models"},
    "training.utils": {"models"},
    "training.utils.data": {"models"},
    "training.utils.memory": {"models", "training.utils.flags"},
    "training.utils.run": {"models", *(f"training.utils.{room}" for room in ("flags", "data", "memory"))},
    "training.utils.engine": {"models", *(f"training.utils.{room}" for room in ("flags", "data", "memory", "run"))},
    "training.step1_sft": {"models", "inference", "training.utils"},
    "training.step2_reward": {"models", "inference", "training.utils"},
    "training.step2_dpo": {"models", "inference", "training.utils"},
    "training.step3_ppo": {"models", "inference", "training.utils"},
    "training.evaluate": {"models", "inference", "training.utils"},
    "scripts": {"models", "inference", "training"},
}
ROOMS = ("models", "inference", "training", "scripts")


def files(repository: Path, room: str) -> list[Path]:
    return sorted(repository.joinpath(*room.split(".")).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Full names of all imported modules. A relative import may name a neighbour only: the same room."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"line {node.lineno}: name the room in full"
            if node.level == 0:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


@pytest.mark.parametrize("room", DOORS)
def test_a_room_imports_only_through_its_doors(repository, room):
    open_doors = DOORS[room] | {room}
    for file in files(repository, room):
        for name in imported(ast.parse(file.read_text(encoding="utf-8"))):
            if name.split(".")[0] in ROOMS and name != "training":
                assert any(is_inside(name, door) for door in open_doors), f"{file}: {room} must not import {name}"


def card_calls(tree: ast.AST) -> list[int]:
    """Lines that name torch.cuda or torch.npu, or call .cuda() or .npu()."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "npu"):
            lines.append(node.lineno)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if any(is_inside(name, "torch.cuda") or name.split(".")[0] == "torch_npu" for name in names):
                lines.append(node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda:"):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("room", ROOMS)
def test_only_device_py_speaks_to_a_card(repository, room):
    for file in files(repository, room):
        if file != repository / "models" / "device.py":
            assert not card_calls(ast.parse(file.read_text(encoding="utf-8"))), f"{file}: use models/device.py"


def test_the_search_finds_what_it_should():
    for line in ("torch.cuda.synchronize()", "x.cuda()", "import torch.cuda", "import torch_npu", "d = 'cuda:0'"):
        assert card_calls(ast.parse(line)) == [1]
    assert imported(ast.parse("from models.heads import x\nimport a.b")) == {"models.heads", "models.heads.x", "a.b"}


def test_no_path_edits(repository):
    for room in ROOMS:
        for file in files(repository, room):
            assert "sys.path" not in file.read_text(encoding="utf-8"), file


def test_files_stay_readable(repository):
    for room in (*ROOMS, "tests"):
        for file in files(repository, room):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 500, f"{file} is longer than 500 lines"
