"""train.py takes a folder of ChatGLM through all three steps on Chinese text, and chat.py talks to the result."""

import io
import sys

import pytest

import train
from inference import chatbot
from tests.launching import logged
from tests.tiny_chatglm import tiny_chatglm

pytestmark = pytest.mark.scripts

SHORT = "--max_steps 4 --max_seq_len 96 --eval_iters 1 --learning_rate 1e-3 --logging_steps 1"
PPO = (
    "--max_steps 2 --max_prompt_seq_len 64 --max_answer_seq_len 8 --per_device_generation_batch_size 4 "
    "--per_device_training_batch_size 4 --eval_prompts 2"
)


def test_three_steps_then_chat(forked, shared_dir, tmp_path, monkeypatch, capsys):
    base = tiny_chatglm(tmp_path / "chatglm-6b", "chatglm-6b", shared_dir)
    data = shared_dir / "data" / "preference_zh" / "rm_static_zh_train.jsonl.gz"
    words = ["--actor-model", str(base), "--reward-model", str(base), "--deployment-type", "cpu", "--data-path", str(data)]
    words += ["--sft-flags", SHORT, "--reward-flags", SHORT, "--ppo-flags", PPO, "--output-dir", str(tmp_path / "out")]
    assert train.main(words) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert train.main(words) == 0 and capsys.readouterr().out.count("is done: ") == 3  # what a run writes down is what is asked
    before, *_, after = logged(tmp_path / "out" / "actor-models" / "chatglm-6b", "eval/perplexity")
    assert after < before
    trained = tmp_path / "out" / "step3-models" / "chatglm-6b"
    assert logged(trained, "train/kl")[0] == 0.0

    def talk(*more: str, given: str = "") -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        assert chatbot.main(["--path", str(trained), "--max_new_tokens", "6", "--greedy", *more]) == 0
        return capsys.readouterr().out

    answer = talk("--prompt", "你好")
    assert answer == talk("--prompt", "你好"), "greedy answers are the same twice"
    assert len(talk(given="你好\n晚上好\n").splitlines()) >= 2, "a dialogue of two turns"
