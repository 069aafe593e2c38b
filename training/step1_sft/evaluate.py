"""How near are a model's answers to the written ones? BLEU-4 and ROUGE, as ChatGLM's ptuning counted on ADGEN.

    python -m training.step1_sft.evaluate --model_name_or_path output/sft --data_path AdvertiseGen/dev.json \\
        --output_dir output/evaluation
    deepspeed --module training.step1_sft.evaluate …       # the same answers, shared out to all cards

Answers are greedy unless --do_sample is given, so that two runs agree. Writes generated_predictions.txt (one
{"labels", "predict"} a line, in the order of the data) and metrics.json.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from errors import UserError
from inference.chatbot import context_length
from inference.engine import generate
from models.checkpoint_folder import resolve_checkpoint
from models.device import attention_implementation, detect_platform, resolve_dtype, set_device
from models.heads import prefix_length
from models.load import load_causal_lm, load_tokenizer
from models.templates import Template, load_template
from training.step1_sft.text_metrics import METRICS, check_libraries, mean_scores
from training.utils.data.batching import pad_left
from training.utils.data.sources import load_records
from training.utils.data.tokenize import cut_prompt
from training.utils.flags.parse import main_entry
from training.utils.flags.steps import EvaluateArguments
from training.utils.run.metrics import format_seconds
from training.utils.run.process_group import check_writable, join_process_group, quiet_libraries

PREDICTIONS, FIGURES = "generated_predictions.txt", "metrics.json"


@dataclass
class Answer:
    """What the model wrote, its length in tokens with the end token, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def main(args: EvaluateArguments) -> None:
    """Answer, score, write, print. Raises UserError for wrong input, most of it before the model is loaded."""
    quiet_libraries()
    check_libraries(args.cache_dir)
    platform = detect_platform()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank, local_rank, processes = join_process_group(platform) if several else (0, 0, 1)
    check_writable(Path(args.output_dir))
    folder = resolve_checkpoint(args.model_name_or_path)
    records = read_records(args)
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer)
    labels = labels_of(records, tokenizer, template, args.max_target_length if args.truncate_labels else None)

    device = set_device(platform, local_rank)
    model = load_causal_lm(
        folder,
        dtype=resolve_dtype(args.dtype, platform),
        attn=attention_implementation(args.attn_implementation, platform),
        ptuning_checkpoint=args.ptuning_checkpoint,
        quantization_bit=args.quantization_bit,
    ).to(device)
    room = prompt_room(model, args)
    prompts = template.encode_prompts(tokenizer, [one["messages"] for one in records])
    prompts = [cut_prompt(ids, room, template) for ids in prompts]
    started = time.monotonic()
    answers = answer(model, prompts, tokenizer, template, args, rank, processes)
    if rank == 0:
        figures = {"examples": len(answers), **summary(labels, answers)}
        write(Path(args.output_dir), labels, answers, figures, args)
        print(table(figures))
        print(f"{len(answers)} answers in {format_seconds(time.monotonic() - started)}; see {args.output_dir}.", flush=True)
    if several:
        dist.barrier()
        dist.destroy_process_group()


def read_records(args: EvaluateArguments) -> list[dict[str, Any]]:
    """Records with "messages" and "chosen": the held-out part of each set where it has one, the first --num_examples."""
    records: list[dict[str, Any]] = []
    for path in args.data_path:
        parts = load_records(path, columns=args.column_map, cache_dir=args.cache_dir)
        held_out = parts.get("eval", parts["train"])
        number = min(args.num_examples, len(held_out)) if args.num_examples else len(held_out)
        some = held_out.select(range(number)).to_list()
        if not all(one["chosen"] for one in some):
            raise UserError(
                f"{path}: prompts without answers, so that there is nothing to compare with; give every record an answer, "
                "or look at the model's own with training.step1_sft.prompt_eval."
            )
        records += some
    return records


def labels_of(records: list[dict[str, Any]], tokenizer: Any, template: Template, longest: int | None) -> list[str]:
    """The written answers as the model could have written them: through its tokenizer, which may know only one form of a
    punctuation mark, and only the first ``longest`` tokens, for the rest it cannot match.
    """
    encoded = template.encode_answers(tokenizer, [one["chosen"] for one in records])
    return [template.decode_answer(tokenizer, ids[:longest]) for ids in encoded]


def prompt_room(model: torch.nn.Module, args: EvaluateArguments) -> int:
    """How many tokens a prompt may have. UserError if the answers leave none."""
    whole = context_length(model.config) - prefix_length(model)
    room = whole - args.max_target_length
    if room < 1:
        raise UserError(
            f"--max_target_length {args.max_target_length} leaves no room for a prompt in the {whole} tokens that "
            f"{args.model_name_or_path} reads; lower it."
        )
    return min(room, args.max_source_length or room)


def answer(
    model: torch.nn.Module,
    prompts: list[list[int]],
    tokenizer: Any,
    template: Template,
    args: EvaluateArguments,
    rank: int = 0,
    processes: int = 1,
) -> list[Answer]:
    """Answers in the order of the prompts, on every process.

    Batches hold prompts of like length and are the same for every number of processes, to which they are dealt like cards:
    so the answers are the same too.
    """
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    size = args.per_device_eval_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    device = next(model.parameters()).device
    found: dict[int, Answer] = {}
    said = time.monotonic()
    for number, places in enumerate(batches[rank::processes], 1):
        ids, mask = pad_left([prompts[place] for place in places], tokenizer.pad_token_id)
        made = generate(
            model, ids.to(device), mask.to(device), max_new_tokens=args.max_target_length,
            stop_token_ids=template.stop_token_ids, pad_token_id=tokenizer.pad_token_id, greedy=not args.do_sample,
            temperature=args.temperature if args.do_sample else 1.0, top_p=args.top_p, top_k=args.top_k,
            row_seeds=[args.seed + place for place in places],
        )  # fmt: skip
        for place, row, length, ended in zip(
            places, made.sequences.tolist(), made.lengths.tolist(), made.ended.tolist(), strict=True
        ):
            found[place] = Answer(template.decode_answer(tokenizer, row[:length]), length, ended)
        if rank == 0 and time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"answered {min(number * processes * size, len(prompts))} of {len(prompts)}", flush=True)
    if processes > 1:
        parts: list[dict[int, Answer]] = [{}] * processes
        dist.all_gather_object(parts, found)
        found = {place: one for part in parts for place, one in part.items()}
    return [found[place] for place in range(len(prompts))]


def summary(labels: list[str], answers: list[Answer]) -> dict[str, float]:
    """Mean figures (METRICS), mean length in tokens, share that ended before the limit, number of empty answers."""
    number = len(answers)
    return mean_scores([(label, one.text) for label, one in zip(labels, answers, strict=True)]) | {
        "mean_tokens": sum(one.tokens for one in answers) / number,
        "ended": sum(one.ended for one in answers) / number,
        "empty": sum(not one.text for one in answers),
    }


def write(folder: Path, labels: list[str], answers: list[Answer], figures: dict[str, float], args: EvaluateArguments) -> None:
    """generated_predictions.txt and metrics.json into the folder."""
    rows = ({"labels": label, "predict": one.text} for label, one in zip(labels, answers, strict=True))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / PREDICTIONS).write_text(lines, encoding="utf-8")
    content = json.dumps(figures | {"flags": asdict(args)}, ensure_ascii=False, indent=1)
    (folder / FIGURES).write_text(content + "\n", encoding="utf-8")


def table(figures: dict[str, float]) -> str:
    """The figures as a Markdown table of one row."""
    names = {"bleu-4": "BLEU-4", "rouge-1": "ROUGE-1", "rouge-2": "ROUGE-2", "rouge-l": "ROUGE-L"}
    cells = {names[name]: f"{figures[name]:.4f}" for name in METRICS}
    cells |= {"mean tokens": f"{figures['mean_tokens']:.1f}", "ended": f"{figures['ended']:.1%}"}
    cells |= {"empty": str(figures["empty"]), "examples": str(figures["examples"])}
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells, ["---"] * len(cells), cells.values()))


if __name__ == "__main__":
    main_entry(main, EvaluateArguments)
