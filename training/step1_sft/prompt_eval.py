"""The answers of two models to the same prompts, side by side: what did training change?

    python -m training.step1_sft.prompt_eval --model_name_or_path_baseline facebook/opt-1.3b \\
        --model_name_or_path_finetune output/actor-models/1.3b --language English

Each model is asked with its own template and stop tokens. Answers are greedy; --num_return_sequences above 1 samples.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from errors import UserError
from inference.chatbot import context_length
from inference.engine import generate_many
from models.checkpoint_folder import resolve_checkpoint
from models.device import attention_implementation, detect_platform, empty_cache, resolve_dtype, set_device
from models.heads import prefix_length
from models.load import load_causal_lm, load_tokenizer
from models.templates import load_template
from training.utils.data.sources import load_records
from training.utils.data.tokenize import cut_prompt
from training.utils.flags.parse import main_entry
from training.utils.flags.steps import PromptEvalArguments
from training.utils.run.process_group import quiet_libraries

BATCH = 16  # answers in work at once

PROMPTS = {
    "English": [
        "Explain to a ten-year-old why the sky is blue.",
        "Give me three tips for sleeping better.",
        "Write a short, polite e-mail to my landlord: the heating has been broken since Monday.",
        "What is the difference between weather and climate?",
        "I have eggs, rice and spinach. What can I cook with them?",
        "Write a poem of four lines about the first snow.",
    ],
    "Chinese": [
        "请用小学生能听懂的话解释为什么天空是蓝色的。",
        "怎样才能睡得更好？请给我三条建议。",
        "请帮我给房东写一封简短而礼貌的信：暖气从星期一起就坏了。",
        "天气和气候有什么区别？",
        "家里有鸡蛋、米饭和菠菜，可以做什么菜？",
        "请写一首关于初雪的四行小诗。",
    ],
    "Japanese": [
        "空が青い理由を、小学生にもわかるように説明してください。",
        "よく眠るためのコツを三つ教えてください。",
        "月曜日から暖房が壊れています。大家さんへの短く丁寧なメールを書いてください。",
        "天気と気候の違いは何ですか。",
        "卵とご飯とほうれん草があります。何が作れますか。",
        "初雪についての四行の詩を書いてください。",
    ],
}


@dataclass
class Answer:
    """One answer: its text, its length in tokens with the end token, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def main(args: PromptEvalArguments) -> None:
    """Ask both models, print the answers side by side, write them where --output says."""
    quiet_libraries()
    prompts = read_prompts(args)
    models = {"baseline": args.model_name_or_path_baseline, "finetuned": args.model_name_or_path_finetune}
    folders = {name: resolve_checkpoint(path) for name, path in models.items()}  # both, before either is loaded
    answers = {name: ask(folder, prompts, args) for name, folder in folders.items()}
    figures = {name: summary(rows) for name, rows in answers.items()}
    print_table(prompts, answers, models, shutil.get_terminal_size((120, 24)).columns)
    for name, values in figures.items():
        print(f"{name:10} {values['mean_tokens']:7.1f} tokens an answer, {values['ended']:.0%} ended by themselves")
    if args.output:
        rows = [
            {"prompt": messages} | {name: [vars(answer) for answer in rows[place]] for name, rows in answers.items()}
            for place, messages in enumerate(prompts)
        ]
        content = {"models": models, "summary": figures, "prompts": rows}
        Path(args.output).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def read_prompts(args: PromptEvalArguments) -> list[list[dict[str, str]]]:
    """Dialogues that end in a question: from --prompts, --data_path, or the built-in ones of --language."""
    if args.prompts and args.data_path:
        raise UserError("--prompts and --data_path both give prompts; leave one of them out.")
    if args.prompts:
        try:
            # Only a line break ends a prompt; splitlines would also cut at U+2028, which stands in copied texts.
            lines = Path(args.prompts).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {args.prompts} cannot be read ({error}); name a UTF-8 text file.") from error
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise UserError(f"--prompts {args.prompts} is empty; write one prompt a line.")
        return [[{"role": "user", "content": text}] for text in texts]
    if not args.data_path:
        return [[{"role": "user", "content": text}] for text in PROMPTS[args.language]]
    prompts = []
    for path in args.data_path:
        records = load_records(path, columns=args.column_map)
        held_out = records.get("eval", records["train"])
        prompts += held_out.select(range(min(args.num_prompts, len(held_out))))["messages"]
    return list(prompts)


def ask(folder: Path, prompts: list[list[dict[str, str]]], args: PromptEvalArguments) -> list[list[Answer]]:
    """The answers of one model, --num_return_sequences to each prompt. The model is gone from memory afterwards."""
    platform = detect_platform()
    device = set_device(platform, 0)
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer)
    attention = attention_implementation(args.attn_implementation, platform)
    model = load_causal_lm(folder, dtype=resolve_dtype(args.dtype, platform), attn=attention).to(device).eval()
    longest = context_length(model.config) - prefix_length(model)
    room = longest - args.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in the {longest} "
            f"tokens that {folder} reads; lower it."
        )
    encoded = [cut_prompt(ids, room, template) for ids in template.encode_prompts(tokenizer, prompts)]
    each = args.num_return_sequences
    found = generate_many(
        model, encoded, max_batch=BATCH, num_return_sequences=each, max_new_tokens=args.max_new_tokens,
        stop_token_ids=template.stop_token_ids, pad_token_id=tokenizer.pad_token_id, temperature=args.temperature,
        top_p=args.top_p, greedy=each == 1, row_seeds=range(args.seed, args.seed + each * len(encoded)),
    )  # fmt: skip
    answers = [
        Answer(template.decode_answer(tokenizer, row[:length]), length, ended)
        for row, length, ended in zip(found.sequences.tolist(), found.lengths.tolist(), found.ended.tolist(), strict=True)
    ]
    del model
    empty_cache()
    return [answers[place : place + each] for place in range(0, len(answers), each)]


def summary(answers: list[list[Answer]]) -> dict[str, float]:
    """Mean length in tokens, and the share of answers that ended before the limit."""
    flat = [answer for some in answers for answer in some]
    return {
        "mean_tokens": sum(answer.tokens for answer in flat) / len(flat),
        "ended": sum(answer.ended for answer in flat) / len(flat),
    }


# --- the table --------------------------------------------------------------------------------------------------------


def print_table(
    prompts: list[list[dict[str, str]]], answers: dict[str, list[list[Answer]]], models: dict[str, str], columns: int
) -> None:
    """Each prompt, and under it the answers of both models in two columns."""
    width = max(20, (min(columns, 160) - 3) // 2)
    rule = "-" * width + "-+-" + "-" * width
    print("\n".join(side_by_side(*(f"{name}: {path}" for name, path in models.items()), width)))
    for place, messages in enumerate(prompts):
        print(rule)
        for message in messages:
            print("\n".join(wrapped(f"[{message['role']}] {message['content']}", 2 * width + 3)))
        for texts in zip(*(answers[name][place] for name in models), strict=True):
            print("\n".join(["", *side_by_side(*(answer.text or "(nothing)" for answer in texts), width)]))
    print(rule)


def side_by_side(left: str, right: str, width: int) -> list[str]:
    """Lines of two texts in columns of the given width, measured as a terminal shows them."""
    return [
        f"{one}{' ' * (width - shown_width(one))} | {other}".rstrip()
        for one, other in zip_longest(wrapped(left, width), wrapped(right, width), fillvalue="")
    ]


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns, broken at spaces where there are any near, and anywhere in Chinese."""
    lines = []
    for line in text.splitlines() or [""]:
        line = "".join(character for character in line.expandtabs(4) if character.isprintable())
        while shown_width(line) > width:
            end = 0
            while shown_width(line[: end + 1]) <= width:
                end += 1
            space = line.rfind(" ", 0, end + 1)
            end = space if space > end // 2 else end
            lines.append(line[:end].rstrip())
            line = line[end:].lstrip()
        lines.append(line)
    return lines


def shown_width(text: str) -> int:
    """Columns that a terminal gives to a text: two for Chinese and Japanese characters, none for combining marks."""
    wide = {"W": 2, "F": 2}
    return sum(0 if unicodedata.combining(c) else wide.get(unicodedata.east_asian_width(c), 1) for c in text)


if __name__ == "__main__":
    main_entry(main, PromptEvalArguments)
