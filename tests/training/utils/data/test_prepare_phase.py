"""Tokenised data with a step's flags, and real data through all three steps."""

import random
from types import SimpleNamespace

import pytest

from models.templates import load_template
from tests.tiny import tiny_tokenizer
from tests.training.utils.data.test_tokenize import run, write
from training.utils.data.tokenize import prepare_phase


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["llama", "qwen2"])
def tokenizer(request):
    return tiny_tokenizer(request.param)


@pytest.fixture
def llama():
    return tiny_tokenizer("llama")


def test_prepare_phase_reads_a_step_s_flags(tmp_path, llama, caplog):
    path = write(tmp_path / "data.jsonl", [{"question": f"q{n}", "answer": f"a{n}"} for n in range(40)])
    args = SimpleNamespace(
        data_path=[path], data_split="1,0,0", column_map={"prompt": "question", "chosen": "answer"}, seed=3, eval_fraction=0.2,
        cache_dir=str(tmp_path / "mine"), rebuild_cache=False, max_seq_len=32, sft_only_data_path=[], max_source_length=None,
        max_target_length=None,
    )  # fmt: skip
    with caplog.at_level("INFO", logger="sanbu"):
        data = prepare_phase(args, 1, llama, load_template(None, llama))
    assert len(data.train) + len(data.eval) == 40
    assert f"train: {len(data.train)} of {len(data.train)} records" in caplog.text
    assert (tmp_path / "mine" / "tokens").is_dir()


def test_real_preference_data_goes_through_all_phases(shared_dir, tokenizer):
    for name in ("preference_en/rm_static_en_train.jsonl.gz", "preference_zh/rm_static_zh_train.jsonl.gz"):
        path, template = str(shared_dir / "data" / name), load_template(None, tokenizer)
        for phase, column in ((1, "input_ids"), (2, "chosen_ids"), (3, "prompt_ids")):
            data = run(path, phase, tokenizer, split="2,4,4", eval_fraction=0.05, max_seq_len=512)
            for part, dataset in (("train", data.train), ("eval", data.eval)):
                counts = data.report[part]
                assert counts["records"] == counts["kept"] + sum(counts["dropped"].values())
                assert len(dataset) == counts["kept"] > 0
                assert sum(dataset["length"]) == counts["tokens"]
            for row in random.Random(0).sample(data.train.to_list(), 50):
                assert len(row[column]) <= 512
                assert phase == 3 or row[column][-1] == template.end_token_id
