"""Show the answers of two models to the same prompts side by side: what did training change?

    python -m training.evaluate.side_by_side --model_name_or_path_baseline facebook/opt-1.3b \\
        --model_name_or_path_finetune output/actor-models/1.3b --language English

Each model is asked with its own template and stop tokens. Answers are greedy; --num_return_sequences above 1 samples.
"""

from training.evaluate.inputs import check_inputs
from training.utils.flags.steps import PromptEvalArguments
from training.utils.run.entry import parse_or_exit, run_main

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help, wrong flags and paths are answered at once
    ARGS = parse_or_exit(PromptEvalArguments, check=check_inputs)

import shutil
import unicodedata
from itertools import zip_longest
from pathlib import Path

from errors import UserError
from models.checkpoint_folder import CheckpointFolder, open_checkpoint
from models.device import empty_cache
from models.quiet import quiet_libraries
from training.evaluate.common import BUILT_IN, Answer, Messages, held_out, load_for_evaluation, write_json

BATCH = 16  # answers in work at once


def main(args: PromptEvalArguments) -> None:
    """Ask both models, print the answers side by side, write them where --output says."""
    quiet_libraries()
    prompts = read_prompts(args)
    models = {"baseline": args.model_name_or_path_baseline, "finetuned": args.model_name_or_path_finetune}
    checkpoints = {name: open_checkpoint(path) for name, path in models.items()}  # both, before either is loaded
    answers = {name: ask(checkpoint, prompts, args) for name, checkpoint in checkpoints.items()}
    summary = {}
    for name, rows in answers.items():
        each = [answer for row in rows for answer in row]
        means = {"mean_tokens": [answer.tokens for answer in each], "ended": [answer.ended for answer in each]}
        summary[name] = {what: sum(values) / len(each) for what, values in means.items()}
    print_table(prompts, answers, models, shutil.get_terminal_size((120, 24)).columns)
    for name, values in summary.items():
        print(f"{name:10} {values['mean_tokens']:7.1f} tokens an answer, {values['ended']:.0%} ended by themselves")
    if args.output:
        rows = [
            {"prompt": messages} | {name: [vars(answer) for answer in rows[number]] for name, rows in answers.items()}
            for number, messages in enumerate(prompts)
        ]
        write_json(args.output, {"models": models, "summary": summary, "prompts": rows})


def read_prompts(args: PromptEvalArguments) -> list[Messages]:
    """Return dialogues that end in a question: from --prompts, --data_path, or the built-in ones of --language."""
    if args.prompts and args.data_path:
        raise UserError("--prompts and --data_path both give prompts; leave one of them out.")
    if args.data_path:
        records = [held_out(path, args.column_map, alone=len(args.data_path) == 1) for path in args.data_path]
        return [prompt for each in records for prompt in each.select(range(min(args.num_prompts, len(each))))["messages"]]
    texts = read_lines(args.prompts) if args.prompts else BUILT_IN["prompts"][args.language][: args.num_prompts]
    return [[{"role": "user", "content": text}] for text in texts]


def read_lines(file: str) -> list[str]:
    """Return the lines of a text file that are not blank. Raise UserError if there are none."""
    try:
        # Only a line break ends a prompt; splitlines would also cut at U+2028, which stands in copied texts.
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file} cannot be read ({error}); name a UTF-8 text file.") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"--prompts {file} is empty; write one prompt a line.")
    return texts


def ask(checkpoint: CheckpointFolder, prompts: list[Messages], args: PromptEvalArguments) -> list[list[Answer]]:
    """Return one model's answers, --num_return_sequences to each prompt. The model is gone from memory afterwards."""
    loaded = load_for_evaluation(checkpoint, args.dtype, args.attn_implementation)
    each = args.num_return_sequences
    answers = loaded.answer(
        loaded.encode(prompts, args.max_new_tokens, "--max_new_tokens"),
        max_batch=BATCH,
        num_return_sequences=each,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        greedy=each == 1,
        row_seeds=range(args.seed, args.seed + each * len(prompts)),
    )
    del loaded
    empty_cache()
    return [answers[start : start + each] for start in range(0, len(answers), each)]


def print_table(
    prompts: list[Messages], answers: dict[str, list[list[Answer]]], models: dict[str, str], columns: int
) -> None:
    """Print each prompt and, under it, the answers of both models in two columns."""
    width = max(20, (min(columns, 160) - 3) // 2)
    rule = "-" * width + "-+-" + "-" * width
    print("\n".join(side_by_side(*(f"{name}: {path}" for name, path in models.items()), width)))
    for number, messages in enumerate(prompts):
        print(rule)
        for message in messages:
            print("\n".join(wrapped(f"[{message['role']}] {message['content']}", 2 * width + 3)))
        for texts in zip(*(answers[name][number] for name in models), strict=True):
            print("\n".join(["", *side_by_side(*(answer.text or "(nothing)" for answer in texts), width)]))
    print(rule)


def side_by_side(left: str, right: str, width: int) -> list[str]:
    """Return lines of two texts in columns of the given width, measured as a terminal shows them."""
    return [
        f"{one}{' ' * (width - shown_width(one))} | {other}".rstrip()
        for one, other in zip_longest(wrapped(left, width), wrapped(right, width), fillvalue="")
    ]


def wrapped(text: str, width: int) -> list[str]:
    """Return lines of at most ``width`` columns, broken at spaces where there are any near, and anywhere in Chinese."""
    lines = []
    for line in text.splitlines() or [""]:
        line = "".join(character for character in line.expandtabs(4) if character.isprintable())
        while shown_width(line) > width:
            end = next(end for end in range(len(line), 0, -1) if shown_width(line[:end]) <= width)
            space = line.rfind(" ", 0, end + 1)
            end = space if space > end // 2 else end
            lines.append(line[:end].rstrip())
            line = line[end:].lstrip()
        lines.append(line)
    return lines


def shown_width(text: str) -> int:
    """Return the columns that a terminal gives a text: two for Chinese and Japanese, none for combining marks."""
    wide = {"W": 2, "F": 2}
    return sum(0 if unicodedata.combining(c) else wide.get(unicodedata.east_asian_width(c), 1) for c in text)


if __name__ == "__main__":
    run_main(main, ARGS)
