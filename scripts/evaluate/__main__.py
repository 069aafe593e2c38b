"""Measure a model on records of a data set, beside the model before training: perplexity, BLEU, ROUGE, win rate.

    python -m scripts.evaluate --path output/sft --baseline facebook/opt-1.3b --data_path dev.jsonl --output_dir output/evaluation
    python -m scripts.evaluate --path output/ppo/actor --baseline output/sft --reward_model output/reward \\
        --data_path prompts.jsonl --output_dir output/evaluation
    python -m scripts.evaluate --path output/sft --lm_eval hellaswag my_task.yaml --output_dir output/evaluation
    deepspeed --module scripts.evaluate …       # the same answers, shared out to all cards

Answers are greedy unless --do_sample is given, so that two runs agree. Writes eval.html, eval.md with eval.svg, and eval.json: all
metrics with 95 % intervals, and all answers. Beside them, as ChatGLM's ptuning did, metrics.json and generated_predictions.txt (one
{"labels", "predict"} a line, in the order of the data), and baseline_predictions.txt of the model before.
"""

from training.evaluate.inputs import check_inputs, check_reward_model
from training.utils.flags.steps import EvaluateArguments
from training.utils.run.entry import parse_or_exit, run_main

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help and wrong input are answered at once
    ARGS = parse_or_exit(EvaluateArguments, check=check_inputs)

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from errors import UserError
from models.checkpoint_folder import CheckpointFolder, open_checkpoint
from models.device import detect_platform, empty_cache
from models.load import load_scalar_model
from models.quiet import quiet_libraries
from scripts.evaluate.metrics import estimates
from scripts.evaluate.page import write_pages
from training.evaluate.common import Answer, LoadedModel, held_out, in_batches, load_for_evaluation, write_json
from training.evaluate.reward_scores import answer_by_answer
from training.evaluate.text_metrics import METRICS as TEXT_METRICS
from training.evaluate.text_metrics import check_libraries, score
from training.utils.loss import outcomes
from training.utils.run.metrics import format_seconds
from training.utils.run.process_group import join_process_group

PREDICTIONS = {"before": "baseline_predictions.txt", "after": "generated_predictions.txt"}
Columns = dict[str, Sequence[float]]  # what was measured, a value a record
Share = Callable[..., list[Any]]  # in_batches with the size of a batch and the processes filled in


def main(args: EvaluateArguments) -> None:
    """Answer, score, write, print. Raises UserError for wrong input, most of it before a model is loaded."""
    quiet_libraries()
    platform = detect_platform()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank, local_rank, processes = join_process_group(platform) if several else (0, 0, 1)
    paths = {"before": args.baseline, "after": args.model_name_or_path}
    checkpoints = {name: open_checkpoint(path) for name, path in paths.items() if path}  # all, before one is loaded
    judge = check_reward_model(args.reward_model, "--reward_model") if args.reward_model else None
    records = read_records(args)
    if args.lm_eval:
        from scripts.evaluate import harness

        harness.open_tasks(args.lm_eval)
    started = time.monotonic()
    load = partial(
        load_for_evaluation,
        dtype=args.dtype,
        attention=args.attn_implementation,
        platform=platform,
        local_rank=local_rank,
    )
    share = partial(in_batches, size=args.per_device_eval_batch_size, rank=rank, processes=processes)
    labels, answers, measured, tasks = measure(checkpoints, records, args, load, share)
    scores: Columns = {}
    if judge:
        scores = score_answers(load(judge, load=load_scalar_model), records, answers, share)
        for name, columns in measured.items():
            columns |= wins(name, scores)
    if rank == 0:
        found = {
            "models": {name: checkpoint.path for name, checkpoint in checkpoints.items()},
            "reward_model": args.reward_model,
            "data": args.data_path,
            "examples": len(records),
            "metrics": {
                name: {model: asdict(one) for model, one in row.items()}
                for name, row in (estimates(measured, args.seed) if records else {}).items()
            },
            "lm_eval": tasks,
            "records": [row_of(number, record, answers, scores) for number, record in enumerate(records)],
        }
        write(Path(args.output_dir), found, labels, answers, args)
        print(
            f"{len(records)} records in {format_seconds(time.monotonic() - started)}; see {args.output_dir}/eval.html.",
            flush=True,
        )
    if several:
        dist.barrier()
        dist.destroy_process_group()


def measure(
    checkpoints: dict[str, CheckpointFolder],
    records: list[dict[str, Any]],
    args: EvaluateArguments,
    load: Callable[..., LoadedModel],
    share: Share,
) -> tuple[dict[str, list[str]], dict[str, list[Answer]], dict[str, Columns], dict[str, dict[str, Any]]]:
    """Return, each by model: the written answers as it could have written them, its answers, what was measured of each record,
    and its metrics of --lm_eval. One model is in memory at a time.
    """
    labels: dict[str, list[str]] = {}
    answers: dict[str, list[Answer]] = {}
    measured: dict[str, Columns] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for name, checkpoint in checkpoints.items():
        prefix = {"ptuning_checkpoint": args.ptuning_checkpoint} if name == "after" else {}
        loaded = load(checkpoint, quantization_bit=args.quantization_bit, **prefix)
        if records:
            answers[name] = answer(loaded, records, args, share)
            labels[name], measured[name] = compare(loaded, records, answers[name], args, share)
        if args.lm_eval:
            from scripts.evaluate import harness

            tasks[name] = harness.run_tasks(loaded, args)
        del loaded
        empty_cache()
    return labels, answers, measured, tasks


def read_records(args: EvaluateArguments) -> list[dict[str, Any]]:
    """Return records with "messages" and "chosen": the first --num_examples held-out ones of each data set."""
    records: list[dict[str, Any]] = []
    for path in args.data_path:
        available = held_out(path, args.column_map, args.cache_dir, alone=len(args.data_path) == 1)
        number = min(args.num_examples or len(available), len(available))
        rows = available.select(range(number)).to_list()
        if not args.reward_model and not have_answers(rows):
            raise UserError(
                f"{path}: prompts without answers, so that there is nothing to compare with; give every record an answer, "
                "name a --reward_model, or look at the model's own with training.evaluate.side_by_side."
            )
        records += rows
    if have_answers(records):
        check_libraries(args.cache_dir)
    return records


def have_answers(records: list[dict[str, Any]]) -> bool:
    """Tell whether every record has a written answer."""
    return all(record["chosen"] for record in records)


def answer(loaded: LoadedModel, records: list[dict[str, Any]], args: EvaluateArguments, share: Share) -> list[Answer]:
    """Return the model's answers to the records, the same for every number of processes."""
    dialogues = [record["messages"] for record in records]
    prompts = loaded.encode(dialogues, args.max_target_length, "--max_target_length", args.max_source_length)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}

    def answer_batch(batch: list[int]) -> list[Answer]:
        return loaded.answer(
            [prompts[number] for number in batch],
            max_batch=len(batch),
            max_new_tokens=args.max_target_length,
            row_seeds=[args.seed + number for number in batch],
            **(sampling if args.do_sample else {"greedy": True}),
        )

    return share(answer_batch, list(map(len, prompts)), done="answered")


def compare(
    loaded: LoadedModel, records: list[dict[str, Any]], answers: list[Answer], args: EvaluateArguments, share: Share
) -> tuple[list[str], Columns]:
    """Return the written answers as the model could have written them, and what is measured of each record.

    Their text passes through its tokenizer, which may know only one form of a punctuation mark; with --truncate_labels it is cut
    where the model's answers have to end. Their log-probability is that of the whole answer, end token included.
    """
    columns: Columns = {
        "tokens": [one.tokens for one in answers],
        "ended": [one.ended for one in answers],
        "empty": [not one.text for one in answers],
    }
    if not have_answers(records):
        return [], columns
    tokenizer, template = loaded.tokenizer, loaded.template
    written = template.encode_answers(tokenizer, [record["chosen"] for record in records])
    longest = args.max_target_length if args.truncate_labels else None
    labels = [template.decode_answer(tokenizer, ids[:longest]) for ids in written]
    texts = [score(label, one.text) for label, one in zip(labels, answers, strict=True)]
    columns |= {name: [one[name] for one in texts] for name in TEXT_METRICS}
    rows = loaded.behind_prompts([record["messages"] for record in records], [written])
    log_probs = share(
        lambda batch: loaded.log_probs(*zip(*(rows[number] for number in batch), strict=True)),
        [len(prompt) + len(ids) for prompt, ids in rows],
    )
    columns |= {
        "nll": [-one for one in log_probs],
        "targets": [len(ids) for _, ids in rows],
        "bytes": [len(record["chosen"].encode()) for record in records],
    }
    return labels, columns


def score_answers(
    loaded: LoadedModel, records: list[dict[str, Any]], answers: dict[str, list[Answer]], share: Share
) -> Columns:
    """Return the reward model's scores of the models' answers, by model, and of the written ones ("written") where all are there.

    It reads them in its own template, as whole answers; one that was cut off has no end token.
    """
    tokenizer, template = loaded.tokenizer, loaded.template
    encoded = {}
    if have_answers(records):
        encoded["written"] = template.encode_answers(tokenizer, [record["chosen"] for record in records])
    for name, given in answers.items():
        whole = template.encode_answers(tokenizer, [one.text for one in given])
        encoded[name] = [ids if one.ended else ids[:-1] for ids, one in zip(whole, given, strict=True)]
    rows = answer_by_answer(loaded.behind_prompts([record["messages"] for record in records], list(encoded.values())))
    scores = share(lambda batch: loaded.scores([rows[number] for number in batch]), list(map(len, rows)), done="scored")
    return {name: scores[place * len(records) : (place + 1) * len(records)] for place, name in enumerate(encoded)}


def wins(model: str, scores: Columns) -> Columns:
    """Return a model's scores, and its wins (a tie counts one half) against the written answers and the model before."""
    columns: Columns = {"score": scores[model]}
    for other in ("written", "before"):
        if other in scores and other != model:
            columns[f"win_{other}"] = outcomes(torch.tensor(scores[model]), torch.tensor(scores[other])).tolist()
    return columns


def row_of(number: int, record: dict[str, Any], answers: dict[str, list[Answer]], scores: Columns) -> dict[str, Any]:
    """Return one record of eval.json: the dialogue, the written answer, the models' answers, and their scores."""
    texts: dict[str, Any] = {"written": {"text": record["chosen"]}} if record["chosen"] else {}
    texts |= {name: asdict(given[number]) for name, given in answers.items()}
    for name, values in scores.items():
        texts[name]["score"] = values[number]
    return {"messages": record["messages"]} | texts


def write(
    folder: Path,
    found: dict[str, Any],
    labels: dict[str, list[str]],
    answers: dict[str, list[Answer]],
    args: EvaluateArguments,
) -> None:
    """Write all files and print the table. A file of a former run with --baseline goes if there is none now."""
    for name, file in PREDICTIONS.items():
        if not labels.get(name):
            (folder / file).unlink(missing_ok=True)
            continue
        rows = ({"labels": label, "predict": one.text} for label, one in zip(labels[name], answers[name], strict=True))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / file).write_text(text, encoding="utf-8")
    if found["records"]:
        before = {"baseline": flat(found, "before")} if args.baseline else {}
        write_json(folder / "metrics.json", flat(found, "after") | before | {"flags": asdict(args)})
    print(write_pages(folder, found))


def flat(found: dict[str, Any], model: str) -> dict[str, float]:
    """Return the metrics of one model under the names of metrics.json, without intervals; empty answers as a number."""
    values = {name: row[model]["value"] for name, row in found["metrics"].items() if model in row}
    values |= {"mean_tokens": values.pop("tokens"), "empty": sum(not row[model]["text"] for row in found["records"])}
    return {"examples": found["examples"]} | values


if __name__ == "__main__":
    run_main(main, ARGS)
