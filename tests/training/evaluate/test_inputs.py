"""A wrong model or data path of an evaluation, and of chat.py, is told before torch is imported."""

import json
import subprocess
import sys

import pytest

from tests.launching import REPOSITORY, environment

pytestmark = pytest.mark.fast
START = "import runpy, sys; sys.modules['torch'] = None; sys.argv.pop(0); runpy.run_module(sys.argv[0], None, '__main__', True)"
NO_MODEL = "error: model folder output/missing does not exist; train first"
MISSING = ["--model_name_or_path", "output/missing"]


@pytest.mark.parametrize(
    ("module", "flags", "sentence"),
    [
        ("chat", ["--path", "output/missing"], NO_MODEL),
        ("training.evaluate.reward_scores", MISSING, NO_MODEL),
        ("scripts.evaluate", [*MISSING, "--data_path", "x", "--output_dir", "x"], NO_MODEL),
        ("training.evaluate.side_by_side", [f"{MISSING[0]}_{name}={MISSING[1]}" for name in ("baseline", "finetune")], NO_MODEL),
        ("training.evaluate.reward_scores", ["--data_path", "missing.jsonl"], "error: --data_path missing.jsonl: no such file"),
    ],
)
def test_a_wrong_path_needs_no_torch(module, flags, sentence, tmp_path):
    if flags[0] == "--data_path":
        config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        flags = [MISSING[0], str(tmp_path), *flags]
    command = [sys.executable, "-c", START, module, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=REPOSITORY)
    assert done.returncode == 2 and done.stderr.startswith(sentence) and done.stderr.count("\n") == 1, done.stderr
