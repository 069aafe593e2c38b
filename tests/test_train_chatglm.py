"""train.py takes a folder of ChatGLM through all three steps on Chinese text, and chat.py talks to the result."""

import subprocess
import sys

import pytest

from tests.launching import REPOSITORY, environment, logged
from tests.tiny_chatglm import tiny_chatglm

pytestmark = pytest.mark.scripts

SHORT = "--max_steps 4 --max_seq_len 96 --eval_iters 1 --learning_rate 1e-3 --logging_steps 1"
PPO = (
    "--max_steps 2 --max_prompt_seq_len 64 --max_answer_seq_len 8 --per_device_generation_batch_size 4 "
    "--per_device_training_batch_size 4 --eval_prompts 2"
)


def run(*words: str, given: str | None = None) -> str:
    """Start one of the two entry points; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment(), input=given, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("family", ["chatglm-6b", "chatglm2-6b"])
def test_three_steps_then_chat(family, shared_dir, tmp_path):
    base = tiny_chatglm(tmp_path / family, family, shared_dir)
    data = shared_dir / "data" / "preference_zh" / "rm_static_zh_train.jsonl.gz"
    run(
        "train.py", "--actor-model", str(base), "--reward-model", str(base), "--deployment-type", "cpu",
        "--data-path", str(data), "--output-dir", str(tmp_path / "out"),
        "--sft-flags", SHORT, "--reward-flags", SHORT, "--ppo-flags", PPO,
    )  # fmt: skip
    before, *_, after = logged(tmp_path / "out" / "actor-models" / family, "eval/perplexity")
    assert after < before
    trained = tmp_path / "out" / "step3-models" / family
    assert logged(trained, "train/kl")[0] == 0.0
    talk = ("chat.py", "--path", str(trained), "--max_new_tokens", "6", "--greedy")
    answer = run(*talk, "--prompt", "你好")
    assert answer == run(*talk, "--prompt", "你好"), "greedy answers are the same twice"
    assert len(run(*talk, given="你好\n晚上好\n").splitlines()) >= 2, "a dialogue of two turns"
