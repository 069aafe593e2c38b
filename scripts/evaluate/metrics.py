"""The metrics of an evaluation: what each is computed from, and its interval."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.evaluate.intervals import Estimate, percentile, resampled_means, wilson


@dataclass(frozen=True)
class Metric:
    """A mean over records of what was measured of each, a ratio of two such means, or a share of records.

    title: in English and in Chinese. top, bottom: names of measurements; without bottom the mean of top. transform: of the
    ratio. shown: format of a value.
    """

    title: tuple[str, str]
    top: str
    bottom: str = ""
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray
    share: bool = False
    shown: str = ".2f"


def share(title: tuple[str, str], name: str) -> Metric:
    """Return the metric that is the share of records for which something is true."""
    return Metric(title, name, share=True, shown=".1%")


def perplexity(nats: np.ndarray) -> np.ndarray:
    """Return exp of nats a token; exp(700) for more, which would be infinite."""
    return np.exp(np.minimum(nats, 700.0))


def bits(nats: np.ndarray) -> np.ndarray:
    """Return nats as bits."""
    return nats / np.log(2.0)


METRICS = {
    "perplexity": Metric(("Perplexity of the written answers", "参考回答的困惑度"), "nll", "targets", perplexity),
    # The same for tokenizers that cut the answers into different tokens.
    "bits_per_byte": Metric(
        ("Bits per byte of the written answers", "参考回答每字节的比特数"), "nll", "bytes", bits, shown=".3f"
    ),
    "bleu-4": Metric(("BLEU-4", "BLEU-4"), "bleu-4"),
    "rouge-1": Metric(("ROUGE-1", "ROUGE-1"), "rouge-1"),
    "rouge-2": Metric(("ROUGE-2", "ROUGE-2"), "rouge-2"),
    "rouge-l": Metric(("ROUGE-L", "ROUGE-L"), "rouge-l"),
    "tokens": Metric(("Length of answers, tokens", "回答的长度（token）"), "tokens", shown=".1f"),
    "ended": share(("Answers that ended by themselves", "自行结束的回答"), "ended"),
    "empty": share(("Empty answers", "空回答"), "empty"),
    "score": Metric(("Score by the reward model", "奖励模型的得分"), "score", shown=".3f"),
    "win_rate_written": share(("Win rate against the written answers", "对参考回答的胜率"), "win_written"),
    "win_rate": share(("Win rate against the model before", "对训练前模型的胜率"), "win_before"),
}


def estimates(measured: Mapping[str, Mapping[str, Sequence[float]]], seed: int) -> dict[str, dict[str, Estimate]]:
    """Return the metrics by name, each by model, with the "difference" where two models have it.

    measured: by model ("before", "after") and name of the measurement, a value a record. Intervals of shares are Wilson's, all
    others and those of differences are resampled; the two models' records are drawn together.
    """
    names = [(model, name) for model, columns in measured.items() for name in columns]
    values = np.array([measured[model][name] for model, name in names], dtype=float).T
    place = {name: number for number, name in enumerate(names)}
    means, draws = values.mean(axis=0), resampled_means(values, seed)
    rows: dict[str, dict[str, Estimate]] = {}
    for name, metric in METRICS.items():
        row, resampled = {}, {}
        for model, columns in measured.items():
            if metric.top not in columns:
                continue

            def of(means: np.ndarray, metric=metric, model=model) -> np.ndarray:
                bottom = means[..., place[model, metric.bottom]] if metric.bottom else 1.0
                return metric.transform(means[..., place[model, metric.top]] / bottom)

            value, resampled[model] = float(of(means)), of(draws)
            row[model] = wilson(value, len(values)) if metric.share else percentile(value, resampled[model])
        if len(row) == 2:
            change = row["after"].value - row["before"].value
            row["difference"] = percentile(change, resampled["after"] - resampled["before"])
        if row:
            rows[name] = row
    return rows
