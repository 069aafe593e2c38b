"""The ADGEN scripts start as they stand: small flags behind them, a tiny model, a CPU, some other current folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import environment, logged
from tests.tiny import tiny_checkpoint
from tests.tiny_chatglm import tiny_chatglm

STEP1 = Path("training/step1_sft")
TRAINING = ["run_ptuning_chatglm2-6b.sh", "run_ptuning_chatglm-6b.sh", "run_finetune_chatglm2-6b.sh"]
SCRIPTS = [
    "scripts/preprocess_dataset.sh", *(f"{STEP1}/training_scripts/{name}" for name in TRAINING),
    f"{STEP1}/evaluation_scripts/evaluate_finetune_chatglm2-6b.sh",
]  # fmt: skip


@pytest.fixture
def shell(repository, tmp_path):
    """Runs a script of ours in a folder with ADGEN data; returns what it printed, both streams."""
    data = tmp_path / "AdvertiseGen"
    data.mkdir()
    rows = [{"content": f"类型#裙*颜色#{number}", "summary": f"第{number}条裙子"} for number in range(16)]
    for name, some in (("train.json", rows[4:]), ("dev.json", rows[:4])):
        (data / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"   # python and deepspeed of this environment
    env = environment(PATH=path, SANBU_CACHE=str(tmp_path / "cache"), NUM_GPUS="1")
    del env["PYTHONPATH"]

    def run(script: str, *words: str) -> str:
        done = subprocess.run(
            ["bash", str(repository / script), *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    return run


@pytest.mark.scripts
def test_preprocess_finetune_evaluate(shell, tmp_path):
    tiny_checkpoint(tmp_path / "base", "llama")
    lengths = ["--max_source_length", "32", "--max_target_length", "32"]
    shown = shell("scripts/preprocess_dataset.sh", "--model_name_or_path", "base", *lengths)
    assert "Tokenised 16 records" in shown and "12 examples to train on, 4 held out" in shown

    small = ["--model_name_or_path", "base", "--output_dir", "out", "--dtype", "fp32", "--max_steps", "2", "--logging_steps", "1"]
    shown = shell(SCRIPTS[3], *small, *lengths)
    assert "Tokenised" not in shown   # it is in the cache
    assert len(logged(tmp_path / "out", "train/loss")) == 2
    flags = json.loads((tmp_path / "out/sanbu_done.json").read_text())["flags"]
    assert (flags["zero_stage"], flags["learning_rate"], flags["save_steps"]) == (2, 1e-4, 1000)

    shown = shell(SCRIPTS[4], "--model_name_or_path", "out", "--max_target_length", "8")
    assert "| BLEU-4 |" in shown
    lines = (tmp_path / "output/adgen-chatglm2-6b-evaluation/generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).keys() == {"labels", "predict"} for line in lines] == [True] * 4


@pytest.mark.scripts
@pytest.mark.parametrize(("script", "generation"), [(TRAINING[0], "chatglm2-6b"), (TRAINING[1], "chatglm-6b")])
def test_ptuning_and_its_evaluation(shell, shared_dir, tmp_path, script, generation):
    tiny_chatglm(tmp_path / "base", generation, shared_dir)
    small = ["--model_name_or_path", "base", "--output_dir", "out", "--dtype", "fp32", "--max_steps", "2", "--logging_steps", "1"]
    shell(f"{STEP1}/training_scripts/{script}", *small, "--gradient_accumulation_steps", "2", "--eval_iters", "1")
    assert len(logged(tmp_path / "out", "train/loss")) == 2
    flags = json.loads((tmp_path / "out/sanbu_done.json").read_text())["flags"]
    assert (flags["pre_seq_len"], flags["quantization_bit"], flags["learning_rate"]) == (128, 4, 2e-2)
    assert flags["max_target_length"] == (128 if generation == "chatglm2-6b" else 64)

    shown = shell(SCRIPTS[4], "--model_name_or_path", "out", "--quantization_bit", "4", "--max_target_length", "8")
    assert "| BLEU-4 |" in shown


def test_the_scripts_are_plain_and_pass_everything_on(repository):
    for name in SCRIPTS:
        script = repository / name
        text = script.read_text(encoding="utf-8")
        assert os.access(script, os.X_OK), f"{name}: chmod +x"
        assert text.splitlines()[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in text
        assert text.rstrip().endswith('"$@"'), f"{name}: what the user gives must come last, where it wins"
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
