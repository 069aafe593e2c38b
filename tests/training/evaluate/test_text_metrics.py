"""BLEU-4 and ROUGE: equal to counts by hand, 0 for an empty answer, and a sentence where a library is missing."""

import sys

import pytest

from errors import UserError
from tests.training.evaluate import hand_metrics
from training.evaluate import text_metrics
from training.evaluate.text_metrics import bleu_4, check_libraries, mean_scores, rouge, score, words

LABEL = "这款连衣裙的颜色很漂亮，适合夏天穿。"
PREDICT = "简约的连衣裙，颜色很好看。夏天穿很漂亮！"
# As jieba cuts them; the counts below are of these.
LABEL_WORDS = ["这", "款", "连衣裙", "的", "颜色", "很漂亮", "，", "适合", "夏天", "穿", "。"]
PREDICT_WORDS = ["简约", "的", "连衣裙", "，", "颜色", "很", "好看", "。", "夏天", "穿", "很漂亮", "！"]


@pytest.fixture(autouse=True)
def libraries(tmp_path, monkeypatch):
    monkeypatch.setenv("SANBU_CACHE", str(tmp_path))
    check_libraries()


def test_figures_counted_on_paper():
    assert (words(LABEL), words(PREDICT)) == (LABEL_WORDS, PREDICT_WORDS)
    found = score(LABEL, PREDICT)
    # words in both: 的 连衣裙 ， 颜色 。 夏天 穿 很漂亮 = 8, of 11 and of 12
    assert found["rouge-1"] == pytest.approx(100 * 2 * 8 / (11 + 12), abs=1e-4)
    # pairs of words in both: 夏天 穿, of 10 and of 11
    assert found["rouge-2"] == pytest.approx(100 * 2 * 1 / (10 + 11), abs=1e-4)
    # in one order: 连衣裙 ， 夏天 穿, of 11 and of 12
    assert found["rouge-l"] == pytest.approx(100 * 2 * 4 / (11 + 12), abs=1e-4)


@pytest.mark.parametrize(
    ("label", "predict"),
    [
        (LABEL, PREDICT),
        (LABEL, LABEL),
        (LABEL, "完全不同"),  # no character in common
        (LABEL, "漂亮"),  # shorter than four characters: brevity, orders without any n-gram
        ("白色", PREDICT),  # longer than the written answer
        (LABEL, "夏夏夏夏穿穿"),  # a character repeated more often than it is written counts once
        ("宽松的白色T恤，显瘦。", "宽松的 T恤 very nice, 显瘦，\n百搭！"),
        ("a b c d", "a b c d e"),
    ],
)
def test_figures_equal_plain_loops(label, predict):
    expected = hand_metrics.scores(label, predict, words)
    assert score(label, predict) == pytest.approx(expected, abs=1e-4)
    assert bleu_4(label, predict) == pytest.approx(expected["bleu-4"], abs=1e-9)


@pytest.mark.parametrize("predict", ["", " ", "\n", "　"])
def test_an_empty_answer_counts_as_0(predict):
    """K10: rouge_chinese raises, and took the whole evaluation with it."""
    with pytest.raises(ValueError):
        rouge(LABEL, predict)
    assert score(LABEL, predict) == dict.fromkeys(text_metrics.METRICS, 0.0)
    whole = score(LABEL, PREDICT)
    half = mean_scores([(LABEL, PREDICT), (LABEL, predict)])
    assert half == {name: value / 2 for name, value in whole.items()}


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
