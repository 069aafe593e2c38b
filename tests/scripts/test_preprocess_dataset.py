"""preprocess_dataset: tokenises once, without weights; training with the same flags only opens what it wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.templates import load_template
from models.tokenizer import load_tokenizer
from scripts import preprocess_dataset
from tests.tiny import tiny_checkpoint
from training.utils.data import prepare
from training.utils.flags.parse import parse
from training.utils.flags.steps import SFTArguments


@pytest.fixture
def flags(tmp_path) -> list[str]:
    """Flags of step 1: a model folder without weights, a data folder as ADGEN's, a cache of the test's own."""
    model = tiny_checkpoint(tmp_path / "model", "llama")
    for file in model.glob("*.safetensors"):
        file.unlink()
    data = tmp_path / "AdvertiseGen"
    data.mkdir()
    rows = [{"content": f"类型#裙*颜色#{number}", "summary": f"第{number}条裙子" * (1 + number % 3)} for number in range(25)]
    for name, some in (("train.json", rows[5:]), ("dev.json", rows[:5])):
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    return [
        "--model_name_or_path", str(model), "--data_path", str(data), "--data_split", "1,0,0", "--cache_dir",
        str(tmp_path / "cache"), "--max_source_length", "24", "--max_target_length", "40",
    ]  # fmt: skip


def test_training_opens_what_was_tokenised(flags, tmp_path, monkeypatch, capsys, caplog):
    with caplog.at_level("INFO", logger="sanbu"):
        preprocess_dataset.main(flags)
    said = capsys.readouterr().out
    assert "20 examples to train on, 5 held out" in said
    (folder,) = [one for one in (tmp_path / "cache/tokens").iterdir() if one.is_dir()]
    assert str(folder) in said
    assert any(line.startswith("train: 20 of 20 records") and "lost their oldest part" in line for line in caplog.messages)

    args = parse(SFTArguments, ["--output_dir", str(tmp_path / "out"), *flags])
    tokenizer = load_tokenizer(args.model_name_or_path)
    template = load_template(args.model_name_or_path, tokenizer)
    monkeypatch.setattr(prepare, "tokenise", lambda *_: pytest.fail("tokenised again"))
    data = prepare.prepare_phase(args, 1, tokenizer, template)
    assert (len(data.train), len(data.eval)) == (20, 5)
    assert data.folder == folder
    assert not Path("sanbu_done.json").exists()


def test_nothing_but_the_tokenizer_is_imported(flags, tmp_path, repository):
    flags[1] = str(tiny_checkpoint(tmp_path / "gpt2", "gpt2"))  # transformers' configuration of LLaMA imports networks
    code = "import sys; from scripts.preprocess_dataset import main; main(sys.argv[1:]); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code, *flags], cwd=repository, capture_output=True, text=True, check=True)
    loaded = set(ended.stdout.splitlines()[-1].split())
    assert "transformers" in loaded
    assert not {"pandas", "datasets", "deepspeed", "peft", "transformers.modeling_utils", "torch._dynamo"} & loaded


def test_other_steps_and_wrong_flags(flags, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"Q{n}", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(9)))
    words = [*flags[:2], "--data_path", str(pairs), *flags[6:8]]
    preprocess_dataset.main(["--step", "2", *words, "--data_split", "0,1,0", "--eval_fraction", "0"])
    assert "step 2 (reward model): 9 examples" in capsys.readouterr().out
    preprocess_dataset.main(["--step", "dpo", *words, "--data_split", "0,1,0", "--eval_fraction", "0"])
    assert "DPO: 9 examples" in capsys.readouterr().out
    for wrong, sentence in ((["--max_sorce_length", "4"], "did you mean --max_source_length?"), (["--cache_dir"], "expected one")):
        with pytest.raises(SystemExit) as stopped:
            preprocess_dataset.main([*flags, *wrong])
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.fast
def test_help_is_that_of_the_step_and_of_this_command(monkeypatch, capsys):
    for language, begin in (("C", "Tokenise the data of a step once"), ("zh_CN.UTF-8", "提前把某一步的数据分词一次")):
        for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
            monkeypatch.setenv(name, language)
        preprocess_dataset.main(["--step", "3", "--help"])
        said = capsys.readouterr().out
        assert said.startswith(begin) and "python -m scripts.preprocess_dataset" in said and "--max_prompt_seq_len" in said
