"""`import models` tells transformers about ChatGLM, costs next to nothing, and comes before or after transformers."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

from tests.tiny_chatglm import tiny_chatglm

PROGRAM = """
import sys
import models
print(*(name for name in ("torch", "transformers") if name in sys.modules))
from transformers import AutoModelForCausalLM, AutoTokenizer
print(type(AutoTokenizer.from_pretrained(sys.argv[1])).__module__)
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
"""


def test_imported_before_transformers(shared_dir, repository, tmp_path):
    folder = tiny_chatglm(tmp_path / "chatglm3", "chatglm3-6b", shared_dir)
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    lines = ["", "models.chatglm.tokenization_chatglm2", "models.chatglm.modeling_chatglm2"]
    assert result.stdout.splitlines() == lines, result.stderr


@pytest.mark.parametrize(
    "name",
    ["configuration_chatglm", *(f"{kind}_chatglm{n}" for kind in ("modeling", "tokenization") for n in ("", "2"))],
)
def test_what_a_save_copies_needs_nothing_else_of_ours(repository, name):
    """transformers 5.0 copies what a file itself imports, and not what these files import in turn."""
    file = repository / "models" / "chatglm" / f"{name}.py"
    beside = [Path(other) for other in get_relative_import_files(file)]
    assert {other.stem for other in beside} == set(get_relative_imports(file))
    packages = {package for one in (file, *beside) for package in get_imports(one)}
    assert packages - set(sys.stdlib_module_names) <= {"numpy", "sentencepiece", "torch", "transformers"}
