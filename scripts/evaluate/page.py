"""The results of an evaluation for readers: a page, Markdown, a picture. English or Chinese, as the user's locale."""

from collections.abc import Mapping, Sequence
from html import escape
from math import sqrt
from pathlib import Path
from typing import Any

from errors import language_of_user
from scripts.evaluate.metrics import METRICS
from scripts.report.page import html_page, section, table
from training.evaluate.common import write_json
from training.evaluate.intervals import RESAMPLES

COLOURS = {"written": "#8c959f", "before": "#2a6fb0", "after": "#d1661b"}
MOST_BINS, MOST_ANSWERS = 24, 24
WIDTH, HEIGHT, EDGE = 390, 190, 34  # of a histogram, in pixels; EDGE: around it, for what is written there
WORDS = {
    "title": ("Evaluation", "评估"),
    "metric": ("metric", "指标"),
    "written": ("written answer", "参考回答"),
    "before": ("before", "训练前"),
    "after": ("after", "训练后"),
    "difference": ("difference", "差"),
    "reward_model": ("reward model", "奖励模型"),
    "data": ("data", "数据"),
    "results": ("Results", "结果"),
    "interval": (
        "{count} records. In brackets: 95 % intervals, Wilson's for shares, the others by drawing records anew {draws} times.",
        "{count} 条记录。方括号内为 95 % 置信区间：比例用 Wilson 区间，其余对记录重抽样 {draws} 次。",
    ),
    "picture": ("Lengths and scores", "长度与得分"),
    "tokens": ("Length of answers, tokens", "回答的长度（token）"),
    "score": ("Score by the reward model", "奖励模型的得分"),
    "share": ("share of answers", "回答的比例"),
    "task": ("task", "任务"),
    "errors": ("Behind +-: the standard error, as lm-eval gives it.", "+- 后为 lm-eval 给出的标准误。"),
    "answers": ("Answers", "回答"),
    "shown": ("{shown} of {count} records, evenly taken.", "{count} 条记录中均匀取出的 {shown} 条。"),
    "prompt": ("prompt", "提示"),
    "cut": ("did not end", "没有自行结束"),
    "scored": ("score {:.3f}", "得分 {:.3f}"),
}


def write_pages(folder: Path, found: Mapping[str, Any], language: str | None = None) -> str:
    """Write eval.json, eval.svg, eval.md and eval.html. Return the results as a Markdown table, for the terminal.

    found: what eval.json holds. language: "en" or "zh"; the user's by default.
    """
    language = language or language_of_user()
    write_json(folder / "eval.json", found)
    title, results, tasks = word("title", language), result_table(found, language), task_table(found, language)
    text = [f"# {title}", "\n".join(f"- {name}: `{what}`" for name, what in subjects(found, language))]
    page: list[str] = []
    if found["records"]:
        picture = draw_picture(found, language)
        (folder / "eval.svg").write_text(picture, encoding="utf-8")
        note = word("interval", language, count=found["examples"], draws=RESAMPLES)
        text += [note, markdown_table(results), f"![{word('picture', language)}](eval.svg)"]
        page += [section(word("results", language), table("results", results[0], results[1:]), note)]
        page += [section(word("picture", language), picture)]
    if found["lm_eval"]:
        text += [word("errors", language), markdown_table(tasks)]
        page += [section("lm-eval", table("results", tasks[0], tasks[1:]), word("errors", language))]
    if found["records"]:
        page += [answer_section(found, language)]
    (folder / "eval.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    named = "<br>".join(f"{escape(name)}: <code>{escape(what)}</code>" for name, what in subjects(found, language))
    page.insert(0, f"<h1>{escape(title)}</h1><p>{named}</p>")
    (folder / "eval.html").write_text(html_page(escape(title), page, language), encoding="utf-8")
    return "\n\n".join(markdown_table(rows) for rows in (results, tasks) if len(rows) > 1)


def word(name: str, language: str, *values: Any, **named: Any) -> str:
    """Return a word or sentence in a language, with what it says filled in."""
    return WORDS[name][language == "zh"].format(*values, **named)


def subjects(found: Mapping[str, Any], language: str) -> list[tuple[str, str]]:
    """Return the models and data sets by their names."""
    rows = [(word(name, language), path) for name, path in found["models"].items()]
    if found["reward_model"]:
        rows.append((word("reward_model", language), found["reward_model"]))
    return rows + [(word("data", language), path) for path in found["data"]]


def result_table(found: Mapping[str, Any], language: str) -> list[list[str]]:
    """Return a head and a row a metric: the models' values with their intervals, and the difference where there are two."""
    columns = [*found["models"], *(["difference"] if len(found["models"]) > 1 else [])]
    rows = [[word("metric", language), *(word(column, language) for column in columns)]]
    for name, row in found["metrics"].items():
        metric = METRICS[name]
        cells = [
            interval(row[column], ("+" if column == "difference" else "") + metric.shown) if column in row else ""
            for column in columns
        ]
        rows.append([metric.title[language == "zh"], *cells])
    return rows


def task_table(found: Mapping[str, Any], language: str) -> list[list[str]]:
    """Return a head and a row for each metric of each task of lm-eval: the models' values with their standard errors."""
    rows = [[word("task", language), word("metric", language), *(word(model, language) for model in found["models"])]]
    of_models = [found["lm_eval"][model] for model in found["models"] if found["lm_eval"]]
    for task, metrics in of_models[0].items() if of_models else ():
        for name in metrics:
            values = [tasks[task][name] for tasks in of_models]
            errors = (f" +- {one['stderr']:.4f}" if "stderr" in one else "" for one in values)
            rows.append([task, name, *(f"{one['value']:.4f}{error}" for one, error in zip(values, errors, strict=True))])
    return rows


def interval(estimate: Mapping[str, float], shown: str) -> str:
    """Write a value and its interval."""
    value, low, high = (format(estimate[name], shown) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown; the first row is its head."""
    lines = (rows[0], ["---"] * len(rows[0]), *rows[1:])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- the picture ------------------------------------------------------------------------------------------------------


def draw_picture(found: Mapping[str, Any], language: str) -> str:
    """Return an SVG with the histograms of lengths, and of scores where there are any."""
    drawn = []
    for name in ("tokens", "score"):
        series = {
            origin: [row[origin][name] for row in found["records"]]
            for origin in COLOURS
            if all(name in row.get(origin, {}) for row in found["records"])
        }
        if series:
            drawn.append(
                f'<g transform="translate({len(drawn) * WIDTH},0)">{histogram(series, word(name, language), language)}</g>'
            )
    size = f'width="{len(drawn) * WIDTH}" height="{HEIGHT}" viewBox="0 0 {len(drawn) * WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11" fill="#555">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *drawn, "</svg>\n"])


def histogram(series: Mapping[str, Sequence[float]], title: str, language: str) -> str:
    """Return the histograms of some series over the same bins, as shares of each series. As many bins as the root of the count."""
    low = min(min(values) for values in series.values())
    high = max(max(values) for values in series.values())
    bins = max(4, min(MOST_BINS, round(sqrt(len(next(iter(series.values())))))))
    width = (high - low) / bins or 1.0
    heights: dict[str, list[float]] = {}
    for name, values in series.items():
        heights[name] = [0.0] * bins
        for value in values:
            heights[name][min(int((value - low) / width), bins - 1)] += 1 / len(values)
    top = max(max(shares) for shares in heights.values())
    across, up = (WIDTH - 2 * EDGE) / bins, (HEIGHT - 2 * EDGE) / top
    foot = HEIGHT - EDGE
    drawn = [f'<text x="{EDGE}" y="14" font-size="13" fill="#1f2328">{escape(title)}</text>']
    for name, shares in heights.items():
        steps = "".join(f"V{foot - share * up:.1f}h{across:.2f}" for share in shares)
        path = f"M{EDGE},{foot}{steps}V{foot}"
        drawn.append(
            f'<path d="{path}" fill="{COLOURS[name]}" fill-opacity="0.15" stroke="{COLOURS[name]}" stroke-width="1.5"/>'
        )
    drawn.append(f'<path d="M{EDGE},{foot}H{WIDTH - EDGE}" stroke="#8c959f"/>')
    drawn.append(f'<text x="{EDGE}" y="{foot + 13}">{low:.3g}</text>')
    drawn.append(f'<text x="{WIDTH - EDGE}" y="{foot + 13}" text-anchor="end">{low + bins * width:.3g}</text>')
    drawn.append(f'<text x="{EDGE - 3}" y="{EDGE + 9}" text-anchor="end">{top:.0%}</text>')
    for place, name in enumerate(series):
        x = EDGE + place * (WIDTH - 2 * EDGE) / 3
        drawn.append(
            f'<text x="{x:.0f}" y="{foot + 28}" fill="{COLOURS[name]}">■ {escape(word(name, language))}</text>'
        )
    return "".join(drawn)


# --- the page ---------------------------------------------------------------------------------------------------------


def answer_section(found: Mapping[str, Any], language: str) -> str:
    """Return the table of answers side by side, with scores, the records evenly taken."""
    records = found["records"]
    shown = records[:: -(-len(records) // MOST_ANSWERS)]
    origins = [origin for origin in COLOURS if origin in records[0]]
    rows = [[word("prompt", language), *(word(origin, language) for origin in origins)]]
    for row in shown:
        turns = row["messages"]
        whole = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        prompt = turns[0]["content"] if len(turns) == 1 else whole
        rows.append([prompt, *(answer_cell(row.get(origin, {"text": ""}), language) for origin in origins)])
    note = word("shown", language, shown=len(shown), count=len(records))
    return section(word("answers", language), table("answers texts", rows[0], rows[1:]), note)


def answer_cell(answer: Mapping[str, Any], language: str) -> str:
    """Write an answer with its score below it, and whether it was cut off."""
    notes = [word("scored", language, answer["score"])] if "score" in answer else []
    notes += [word("cut", language)] if not answer.get("ended", True) else []
    return answer["text"] + (f"\n({', '.join(notes)})" if notes else "")
