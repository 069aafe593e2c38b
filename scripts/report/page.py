"""The page: results, steps, answers, curves, data. English or Chinese."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from errors import UserError, language_of_user
from scripts.report import answers
from scripts.report.curves import COLOURS, curve_figures
from scripts.report.results import PRESETS, cost_rows, read_summary, result_rows
from scripts.report.runs import StepRun, sentences
from scripts.report.words import choose, word
from training.utils.run.metrics import format_seconds, is_finite

STYLE = f"""
body {{ font: 15px/1.55 system-ui, "Noto Sans", "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; margin: 0;
  color: #1f2328; background: #f4f5f7 }}
main {{ max-width: 74rem; margin: 0 auto; padding: 1.5rem }}
h1 {{ font-size: 1.6rem; margin: .3rem 0 0 }} h2 {{ font-size: 1.15rem; margin: 0 0 .6rem }}
p {{ color: #59636e; margin: .2rem 0 .8rem }}
section, .note {{ background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 1rem 1.2rem; margin: 1rem 0 }}
.note {{ border-left: 4px solid {COLOURS["eval"]} }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #eceef0 }}
th {{ color: #59636e; font-weight: 600; font-size: .85rem }} tr:last-child td {{ border-bottom: 0 }}
.results {{ width: auto }} .results :is(td, th) {{ padding-right: 2rem }}
.results :is(td, th):is(:nth-child(2), :nth-child(3)) {{ text-align: right; font-variant-numeric: tabular-nums }}
.results td:nth-child(3) {{ font-weight: 600 }}
.answers {{ table-layout: fixed; min-width: 40rem }}
.texts td {{ white-space: pre-wrap; overflow-wrap: anywhere }}
.answers td div {{ white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem; overflow-y: auto }}
small {{ color: #59636e }} .good {{ color: #1a7f37 }} .bad {{ color: #b3261e }}
code, .steps td:last-child {{ font-size: .85rem; overflow-wrap: anywhere }}
.curves {{ display: flex; flex-wrap: wrap; gap: 1.2rem }} figure {{ margin: 0; width: 300px; font-size: .85rem }}
pre {{ font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: .8rem }}
@media print {{ body {{ background: #fff }} .answers td div {{ max-height: none }} }}
"""


def write_report(folder: Path, runs: Sequence[StepRun], output: Path, language: str | None = None) -> list[str]:
    """Write the page about the runs in a folder. Return what is not on it and why, as on the page.

    language: "en" or "zh"; the user's by default. Raises UserError if the page cannot be written, or for a damaged summary.
    """
    language = language or language_of_user()
    summary = read_summary(folder / "summary.json")
    tables, notes = answer_sections(folder, runs, language)
    notes = sentences(runs, language) + notes
    several = len({run.section for run in runs}) < len(runs)
    names = [run.title(language) + (f" ({run.folder.name})" if several and run.section else "") for run in runs]
    name = escape(folder.resolve().name)
    body = [
        f"<h1>{escape(word('title', language))}: {name}</h1><p><code>{escape(str(folder))}</code></p>",
        '<div class="note">' + "<br>".join(map(escape, notes)) + "</div>" if notes else "",
        result_section(runs, summary, language),
        step_section(runs, names, summary, language),
        *tables,
        *(section(title, curve_figures(run, language)) for title, run in zip(names, runs, strict=True)),
        data_section(runs, names, language),
    ]
    write_file("--output", output, html_page(name, body, language))
    return notes


def html_page(title: str, body: Sequence[str], language: str) -> str:
    """Return a page that needs no other file. title and body are HTML; empty pieces of the body leave no line."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Sanbu: {title}</title>'
    head = f'<!DOCTYPE html>\n<html lang="{language}">{head}<style>{STYLE}</style><main>'
    return "\n".join([head, *filter(None, body), "</main></html>\n"])


def write_file(flag: str, file: Path, text: str) -> None:
    """Write a text. Raise UserError if the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", errors="replace")  # JSON may hold half a surrogate pair
    except OSError as error:
        raise UserError(
            f"{flag} {file} cannot be written ({error.strerror}); name a file where you may create one."
        ) from error


def section(title: str, content: str, note: str = "") -> str:
    """Return a part of the page; "" without content."""
    note = f"<p>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>" if content else ""


def table(kind: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of texts; "" without rows."""
    lines = [("th", head), *(("td", row) for row in rows)]
    body = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) for tag, cells in lines)
    return (
        f'<div class="wide"><table class="{kind}">{"".join(f"<tr>{line}</tr>" for line in body)}</table></div>'
        if rows
        else ""
    )


def result_section(runs: Sequence[StepRun], summary: dict[str, Any] | None, language: str) -> str:
    """Return the table of what the steps changed."""
    head = ["", word("before", language), word("after", language), word("target", language) if summary else ""]
    notes = [word("results_note", language)]
    if summary:
        notes = [word("seed", language, seed=summary["seed"]), choose(PRESETS[summary.get("preset", "demo")][2], language)]
    trained = [run for run in runs if run.metrics and not run.held_out]
    notes += [word("nothing_held_out", language, step=run.title(language)) for run in trained]
    note = ("" if language == "zh" else " ").join(notes)
    return section(word("results", language), table("results", head, result_rows(runs, language, summary)), note)


def step_section(runs: Sequence[StepRun], names: Sequence[str], summary: dict[str, Any] | None, language: str) -> str:
    """Return the table of the steps: whether they are done, from which model and data, how long they took."""
    columns = ("step", "state", "model", "data", "length", "time", "memory", "folder")
    rows = []
    for name, run in zip(names, runs, strict=True):
        state = "done" if run.done else "cut_short" if run.there else "absent"
        flags, seconds, memory = run.flags, run.done.get("seconds"), run.done.get("peak_memory_gb")
        given = [flags.get(name) for name in ("data_path", "sft_only_data_path")]
        data = [path for paths in given if isinstance(paths, list) for path in paths]
        unit = "rollouts" if run.section == "ppo" else "optimizer_steps"
        rows.append(
            (
                name,
                word(state, language),
                short_path(flags.get("model_name_or_path") or flags.get("actor_model_name_or_path") or ""),
                ", ".join(map(short_path, data)),
                word(unit, language, run.last_step) if run.metrics else "",
                format_seconds(seconds) if is_finite(seconds) else "",
                f"{memory:.2f} GB" if is_finite(memory) else "",
                str(run.folder) if run.there else "",
            )
        )
    costs = " · ".join(f"{name} {value}" for name, _, value, _ in cost_rows(summary, language)) if summary else ""
    return section(word("steps", language), table("steps", [word(column, language) for column in columns], rows), costs)


def short_path(path: Any) -> str:
    """Return the last two parts of a path."""
    return "/".join(Path(str(path)).parts[-2:])


def answer_sections(folder: Path, runs: Sequence[StepRun], language: str) -> tuple[list[str], list[str]]:
    """Return a table of answers to held-out prompts and one to training prompts, and a sentence for each file with odd lines."""
    tables, notes = [], []

    def read(file: Path, reader: Any) -> list[dict[str, Any]]:
        rows, left_out = reader(file) if file.is_file() else ([], 0)
        if left_out:
            notes.append(word("odd_answers", language, file=file, count=left_out))
        return rows

    measured = read(folder / "answers.jsonl", answers.demo_answers)
    for run in runs:
        if run.section not in ("ppo", None):
            continue
        rows = read(run.folder / "samples.jsonl", answers.sampled_answers)
        last, held_out = answers.last_of(rows, "eval")
        if measured:
            last, held_out = run.last_step, measured
        shown = held_out[:: max(1, len(held_out) // answers.MOST_HELD_OUT)][: answers.MOST_HELD_OUT]
        if shown:
            note = word("held_out_note", language, shown=len(shown), count=len(held_out), rollout=last)
            tables.append(section(word("held_out_answers", language), answers.answer_table(shown, language), note))
        last, training = answers.last_of(rows, "train")
        if shown := training[: answers.MOST_TRAINING]:
            title = word("training_answers", language, rollout=last)
            tables.append(section(title, answers.answer_table(shown, language), word("training_note", language)))
    return tables, notes


def data_section(runs: Sequence[StepRun], names: Sequence[str], language: str) -> str:
    """Return the overviews of the data that the steps wrote, folded."""
    folded = []
    for name, run in zip(names, runs, strict=True):
        if (file := run.folder / "data.txt").is_file():
            text = file.read_bytes().decode("utf-8", "replace")
            folded.append(f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>")
    return section(word("data_seen", language), "".join(folded))
