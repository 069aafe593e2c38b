"""BLEU-4 and ROUGE counted by plain loops, from their papers, to compare the libraries' figures with."""

import math


def ngrams(items: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]


def bleu_4(label: str, predict: str) -> float:
    """Over characters; the k-th order without any match counts as 1 / 2^k matches (NIST's smoothing)."""
    logs, zeros = [], 0
    for n in (1, 2, 3, 4):
        left = ngrams(list(label), n)
        matches = 0
        for gram in ngrams(list(predict), n):
            if gram in left:
                left.remove(gram)
                matches += 1
        if n == 1 and not matches:
            return 0.0
        if not matches:
            zeros += 1
        logs.append(math.log((matches or 0.5**zeros) / max(len(predict) - n + 1, 1)))
    brevity = 1.0 if len(predict) > len(label) else math.exp(1 - len(label) / len(predict))
    return 100.0 * brevity * math.exp(sum(logs) / 4)


def f1(common: int, of_label: int, of_predict: int) -> float:
    if not common:
        return 0.0
    recall, precision = common / of_label, common / of_predict
    return 100.0 * 2 * precision * recall / (precision + recall)


def rouge_n(label: list[str], predict: list[str], n: int) -> float:
    """Over words; each different n-gram counts once."""
    left, right = set(ngrams(label, n)), set(ngrams(predict, n))
    return f1(len(left & right), len(left), len(right))


def rouge_l(label: list[str], predict: list[str]) -> float:
    """The longest common subsequence, row by row."""
    before = [0] * (len(predict) + 1)
    for one in label:
        row = [0]
        for place, other in enumerate(predict):
            row.append(before[place] + 1 if one == other else max(before[place + 1], row[-1]))
        before = row
    return f1(before[-1], len(label), len(predict))


def scores(label: str, predict: str, cut) -> dict[str, float]:
    """All four figures of one answer; cut: text -> words."""
    if not predict.strip():
        return {"bleu-4": 0.0, "rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    left, right = ([word for word in cut(text) if word.strip()] for text in (label, predict))
    return {
        "bleu-4": bleu_4(label, predict),
        "rouge-1": rouge_n(left, right, 1),
        "rouge-2": rouge_n(left, right, 2),
        "rouge-l": rouge_l(left, right),
    }
