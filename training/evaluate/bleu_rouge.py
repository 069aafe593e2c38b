"""Compare a model's answers with the written ones: BLEU-4 and ROUGE, as ChatGLM's ptuning counted on ADGEN.

    python -m training.evaluate.bleu_rouge --model_name_or_path output/sft --data_path AdvertiseGen/dev.json \\
        --output_dir output/evaluation
    deepspeed --module training.evaluate.bleu_rouge …       # the same answers, shared out to all cards

Answers are greedy unless --do_sample is given, so that two runs agree. Writes generated_predictions.txt (one
{"labels", "predict"} a line, in the order of the data) and metrics.json. --baseline evaluates the model before training
too, and writes baseline_predictions.txt.
"""

from __future__ import annotations

from training.evaluate.inputs import check_inputs
from training.utils.flags.parse import parse_or_exit, run_main
from training.utils.flags.steps import EvaluateArguments

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help, wrong flags and paths are answered at once
    ARGS = parse_or_exit(EvaluateArguments, check=check_inputs)

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from errors import UserError
from models.checkpoint_folder import open_checkpoint
from models.device import detect_platform, empty_cache
from training.evaluate.common import Answer, LoadedModel, held_out, load_for_evaluation, mean_lengths, write_json
from training.evaluate.text_metrics import METRICS, check_libraries, mean_scores
from training.utils.run.metrics import format_seconds
from training.utils.run.process_group import check_writable, join_process_group, quiet_libraries

PREDICTIONS, BASELINE, METRICS_FILE = "generated_predictions.txt", "baseline_predictions.txt", "metrics.json"
REPORT_SECONDS = 30  # between two lines of progress


def main(args: EvaluateArguments) -> None:
    """Answer, score, write, print. Raises UserError for wrong input, most of it before the model is loaded."""
    quiet_libraries()
    check_libraries(args.cache_dir)
    platform = detect_platform()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank, local_rank, processes = join_process_group(platform) if several else (0, 0, 1)
    check_writable(Path(args.output_dir))
    named = [(args.baseline, BASELINE)] * bool(args.baseline) + [(args.model_name_or_path, PREDICTIONS)]
    models = [(open_checkpoint(path), file) for path, file in named]  # both, before either is loaded
    records = read_records(args)
    started = time.monotonic()
    metrics: dict[str, dict[str, float]] = {}
    for checkpoint, file in models:
        adapter = {"quantization_bit": args.quantization_bit}
        if file == PREDICTIONS:
            adapter["ptuning_checkpoint"] = args.ptuning_checkpoint
        loaded = load_for_evaluation(
            checkpoint, args.dtype, args.attn_implementation, platform=platform, local_rank=local_rank, **adapter
        )
        labels = encode_labels(records, loaded, args.max_target_length if args.truncate_labels else None)
        dialogues = [record["messages"] for record in records]
        prompts = loaded.encode(dialogues, args.max_target_length, "--max_target_length", args.max_source_length)
        answers = answer(loaded, prompts, args, rank, processes)
        del loaded  # before the next model is read
        empty_cache()
        if rank == 0:
            metrics[file] = {"examples": len(answers), **summary(labels, answers)}
            write_predictions(Path(args.output_dir) / file, labels, answers)
    if rank == 0:
        if not args.baseline:  # of a run before
            (Path(args.output_dir) / BASELINE).unlink(missing_ok=True)
        before = {"baseline": metrics[BASELINE]} if args.baseline else {}
        write_json(Path(args.output_dir) / METRICS_FILE, metrics[PREDICTIONS] | before | {"flags": asdict(args)})
        print(table({"before" if file == BASELINE else "after": row for file, row in metrics.items()}))
        print(f"{len(answers)} answers in {format_seconds(time.monotonic() - started)}; see {args.output_dir}.", flush=True)
    if several:
        dist.barrier()
        dist.destroy_process_group()


def read_records(args: EvaluateArguments) -> list[dict[str, Any]]:
    """Return records with "messages" and "chosen": the first --num_examples held-out ones of each data set."""
    records: list[dict[str, Any]] = []
    for path in args.data_path:
        available = held_out(path, args.column_map, args.cache_dir, alone=len(args.data_path) == 1)
        number = min(args.num_examples or len(available), len(available))
        rows = available.select(range(number)).to_list()
        if not all(row["chosen"] for row in rows):
            raise UserError(
                f"{path}: prompts without answers, so that there is nothing to compare with; give every record an answer, "
                "or look at the model's own with training.evaluate.side_by_side."
            )
        records += rows
    return records


def encode_labels(records: list[dict[str, Any]], loaded: LoadedModel, longest: int | None) -> list[str]:
    """Return the written answers as the model could have written them, cut to their first ``longest`` tokens.

    They pass through its tokenizer, which may know only one form of a punctuation mark.
    """
    tokenizer, template = loaded.tokenizer, loaded.template
    encoded = template.encode_answers(tokenizer, [record["chosen"] for record in records])
    return [template.decode_answer(tokenizer, ids[:longest]) for ids in encoded]


def answer(
    loaded: LoadedModel, prompts: list[list[int]], args: EvaluateArguments, rank: int = 0, processes: int = 1
) -> list[Answer]:
    """Return the answers in the order of the prompts, on every process.

    Batches hold prompts of like length and are the same for every number of processes, which take them in turn:
    so the answers are the same too.
    """
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    size = args.per_device_eval_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    answers: dict[int, Answer] = {}
    reported = time.monotonic()
    for done, numbers in enumerate(batches[rank::processes], 1):
        batch = loaded.answer(
            [prompts[number] for number in numbers],
            max_batch=size,
            max_new_tokens=args.max_target_length,
            row_seeds=[args.seed + number for number in numbers],
            **(sampling if args.do_sample else {"greedy": True}),
        )
        answers |= zip(numbers, batch, strict=True)
        if rank == 0 and time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            print(f"answered {min(done * processes * size, len(prompts))} of {len(prompts)}", flush=True)
    if processes > 1:
        gathered: list[dict[int, Answer]] = [{}] * processes
        dist.all_gather_object(gathered, answers)
        answers = {number: one for each in gathered for number, one in each.items()}
    return [answers[number] for number in range(len(prompts))]


def summary(labels: list[str], answers: list[Answer]) -> dict[str, float]:
    """Return the means of METRICS, the mean length in tokens, the share that ended, and the number of empty answers."""
    scores = mean_scores([(label, one.text) for label, one in zip(labels, answers, strict=True)])
    return scores | mean_lengths(answers) | {"empty": sum(not one.text for one in answers)}


def write_predictions(file: Path, labels: list[str], answers: list[Answer]) -> None:
    """Write one {"labels", "predict"} a line."""
    rows = ({"labels": label, "predict": one.text} for label, one in zip(labels, answers, strict=True))
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def table(models: dict[str, dict[str, float]]) -> str:
    """Return the metrics of models as a Markdown table, a row each; their names stand in front if there are two."""
    rows = []
    for model, metrics in models.items():
        cells = {"model": model} if len(models) > 1 else {}
        cells |= {name.upper(): f"{metrics[name]:.4f}" for name in METRICS}
        cells |= {"mean tokens": f"{metrics['mean_tokens']:.1f}", "ended": f"{metrics['ended']:.1%}"}
        rows.append(cells | {"empty": str(metrics["empty"]), "examples": str(metrics["examples"])})
    lines = (rows[0], ["---"] * len(rows[0]), *(cells.values() for cells in rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_main(main, ARGS)
