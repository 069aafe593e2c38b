"""BLEU-4 and ROUGE: equal to counts on paper, 0 for an empty answer, and a sentence where a library is missing."""

import math
import sys

import pytest

from errors import UserError
from training.evaluate import text_metrics
from training.evaluate.text_metrics import check_libraries, score, words

LABEL = "这款连衣裙的颜色很漂亮，适合夏天穿。"
PREDICT = "简约的连衣裙，颜色很好看。夏天穿很漂亮！"
# As jieba cuts them; the counts below are of these.
LABEL_WORDS = ["这", "款", "连衣裙", "的", "颜色", "很漂亮", "，", "适合", "夏天", "穿", "。"]
PREDICT_WORDS = ["简约", "的", "连衣裙", "，", "颜色", "很", "好看", "。", "夏天", "穿", "很漂亮", "！"]


@pytest.fixture(autouse=True)
def libraries(tmp_path, monkeypatch):
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path))
    check_libraries()


def test_metrics_counted_on_paper():
    assert (words(LABEL), words(PREDICT)) == (LABEL_WORDS, PREDICT_WORDS)
    metrics = score(LABEL, PREDICT)
    # words in both: 的 连衣裙 ， 颜色 。 夏天 穿 很漂亮 = 8, of 11 and of 12
    assert metrics["rouge-1"] == pytest.approx(100 * 2 * 8 / (11 + 12), abs=1e-4)
    # pairs of words in both: 夏天 穿, of 10 and of 11
    assert metrics["rouge-2"] == pytest.approx(100 * 2 * 1 / (10 + 11), abs=1e-4)
    # in one order: 连衣裙 ， 夏天 穿, of 11 and of 12
    assert metrics["rouge-l"] == pytest.approx(100 * 2 * 4 / (11 + 12), abs=1e-4)
    # one, two, three characters in both: 14 of 20, 8 of 19, 4 of 18; four: none of 17, the first order without any counts 1/2
    assert metrics["bleu-4"] == pytest.approx(100 * (14 / 20 * 8 / 19 * 4 / 18 * 0.5 / 17) ** 0.25)
    # 2 characters for 18: brevity exp(1 - 18/2); three and four: none, 1/2 and 1/4
    assert score(LABEL, "漂亮")["bleu-4"] == pytest.approx(100 * math.exp(1 - 18 / 2) * (1 * 1 * 1 / 2 * 1 / 4) ** 0.25)
    assert score(LABEL, LABEL) == pytest.approx(dict.fromkeys(text_metrics.METRICS, 100.0), abs=1e-4)


@pytest.mark.parametrize("predict", ["", " ", "\n", "　"])
def test_an_empty_answer_counts_as_0(predict):
    assert score(LABEL, predict) == dict.fromkeys(text_metrics.METRICS, 0.0)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_chinese", None)
    with pytest.raises(UserError, match=r"rouge_chinese.*pip install jieba rouge-chinese nltk"):
        check_libraries()


def test_jieba_says_nothing_and_keeps_its_dictionary_where_cache_dir_says(tmp_path, monkeypatch, capfd):
    import jieba

    monkeypatch.setattr(jieba, "dt", jieba.Tokenizer())
    monkeypatch.setattr(jieba, "lcut", jieba.dt.lcut)
    check_libraries(str(tmp_path / "named"))
    assert words(LABEL) == LABEL_WORDS and capfd.readouterr().err == ""
    assert (tmp_path / "named" / "jieba.cache").stat().st_size > 1000
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*--cache_dir"):
        check_libraries(str(tmp_path / "file" / "inside"))
