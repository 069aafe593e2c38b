"""The ADGEN scripts: data tokenised before training is found by it; a P-Tuning run and its evaluation, with a tiny model."""

import json
import subprocess

import pytest

from scripts import preprocess_dataset
from tests.launching import logged, succeed
from tests.tiny_chatglm import tiny_chatglm

SCRIPTS = [
    "scripts/preprocess_dataset.sh",
    "training/step1_sft/training_scripts/run_ptuning_chatglm2-6b.sh",
    "training/step1_sft/evaluation_scripts/evaluate_finetune_chatglm2-6b.sh",
]


@pytest.fixture
def adgen(tmp_path):
    """Return a folder with ADGEN's two files."""
    folder = tmp_path / "AdvertiseGen"
    folder.mkdir()
    rows = [{"content": f"类型#裙*颜色#{number}", "summary": f"第{number}条裙子"} for number in range(16)]
    for name, some in (("train.json", rows[4:]), ("dev.json", rows[:4])):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
    return folder


@pytest.mark.scripts
def test_preprocess_ptuning_evaluate(repository, shared_dir, adgen, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path / "cache"))
    recipe = str(repository / "configs/single_gpu/ptuning_chatglm2-6b.yaml")
    base = tiny_chatglm(tmp_path / "base", "chatglm2-6b", shared_dir)
    flags = ["--config", recipe, "--model_name_or_path", str(base), "--data_path", str(adgen)]
    preprocess_dataset.main([*flags, "--max_target_length", "64"])
    shown = capsys.readouterr().out
    assert "12 examples to train on, 4 held out" in shown
    small = "--max_target_length 64 --dtype fp32 --max_steps 2 --logging_steps 1 --gradient_accumulation_steps 2 --eval_iters 1"
    output = tmp_path / "out"
    words = [*flags, *small.split(), "--output_dir", str(output)]
    printed = succeed("training.step1_sft.main", words, SANBU_CACHE=str(tmp_path / "cache"))
    assert "Tokenised" not in printed  # it is in the cache
    assert len(logged(output, "train/loss")) == 2

    words = ["--model_name_or_path", str(output), "--data_path", str(adgen), "--output_dir", str(tmp_path / "scores")]
    assert "| BLEU-4 |" in succeed("scripts.evaluate", [*words, "--quantization_bit", "4", "--max_target_length", "8"])
    lines = (tmp_path / "scores/generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).keys() == {"labels", "predict"} for line in lines] == [True] * 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_pass_everything_on(repository, script):
    text = (repository / script).read_text(encoding="utf-8")
    assert text.rstrip().endswith('"$@"'), "what the user gives must come last, where it wins"
    assert subprocess.run(["bash", "-n", str(repository / script)]).returncode == 0
