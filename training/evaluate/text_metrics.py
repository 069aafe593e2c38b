"""BLEU-4 and ROUGE as ChatGLM's predecessors count them on Chinese text, by the libraries that they use.

Every metric compares one answer with one written answer, times 100; a data set's metric is the mean over its answers.
The libraries are imported where they are called: only the evaluation needs them.
"""

import logging
import warnings

from errors import UserError
from training.utils.data.cache import cache_folder

METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


def check_libraries(cache_dir: str | None = None) -> None:
    """Raise UserError unless the libraries behind the metrics are installed and can keep their dictionary in the cache."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba's and nltk's own, about older names and escapes
            import jieba
            import nltk.translate.bleu_score  # noqa: F401
            import rouge_chinese  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"BLEU and ROUGE need a package that is missing ({error}); pip install jieba rouge-chinese nltk."
        ) from error
    jieba.setLogLevel(logging.WARNING)
    folder = cache_folder(cache_dir)  # its dictionary is kept as a marshal file, which must not lie in the shared /tmp
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be written ({error.strerror}); name another with --cache_dir or SANBU_CACHE."
        ) from error
    jieba.dt.tmp_dir = str(folder)


def words(text: str) -> list[str]:
    """Return the words of a text as jieba cuts it; spaces and punctuation are words too."""
    import jieba

    return jieba.lcut(text)


def score(label: str, predict: str) -> dict[str, float]:
    """Return the METRICS of one answer, 0 to 100. A blank answer has 0 in all; rouge_chinese would raise.

    Sentence BLEU (Papineni et al. 2002) is over sequences of up to four characters; counts that are zero get NIST's smoothing
    (Chen and Cherry 2014, method 3). ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) are F1 over jieba's words: rouge_chinese counts
    each different n-gram once, and its ROUGE-L is the longest common subsequence of the whole texts.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    if not label.strip() or not predict.strip():
        return dict.fromkeys(METRICS, 0.0)
    bleu = sentence_bleu([list(label)], list(predict), smoothing_function=SmoothingFunction().method3)
    (rouge,) = Rouge().get_scores(" ".join(words(predict)), " ".join(words(label)))
    return {"bleu-4": 100.0 * bleu} | {name: 100.0 * rouge[name]["f"] for name in METRICS[1:]}
