"""`import models` tells transformers about ChatGLM, costs next to nothing, and comes before or after transformers."""

import subprocess
import sys

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
