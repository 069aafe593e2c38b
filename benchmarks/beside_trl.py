"""Every step beside TRL, and beside an earlier build of this repository: same weights, rows, optimizer and loss.

    python -m benchmarks.beside_trl                                   # all measures; hours
    python -m benchmarks.beside_trl --measures reward ppo-ragged --vocabulary 32000 --rounds 5

An OPT of 4 x 256 with random weights, float32. All sides of a measure are processes of one thread that train a block of
steps in turn, again and again; imports, loading and the first steps are off the clock. A ratio is that of two blocks next to
each other, in work per second of CPU time; the table has medians, and the least and the largest. TRL runs with each of its
settings for two rounds, and the fastest goes on. TRL 1.16.0 (SFT, reward model, DPO) and 1.12.0 (PPO, its last) are
installed into --workdir, the earlier build is taken from git. Rows are real text where ../shared/data is there, else random words.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.runs import as_flags, opt_config, print_table

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"
BUILD = "44ce0bc"
TOKENS = 8192  # of the tokenizer; a larger vocabulary of the model has rows that no text needs
LEARNING_RATE = 1e-5
PPO_ROWS, PROMPT, ANSWER = 16, 128, 64
RAGGED = 0.043  # probability of the end token: 22 tokens an answer where 64 are the most
# Batches of like length in random order, as ours. TRL's own group_by_length pads more, and goes from long to short through
# fifty batches, so that a block of a few steps would not stand for an epoch.
GROUPED = {"train_sampling_strategy": "sequential"}
# Never in a run: evaluations, checkpoints and the end.
ENDLESS = {"max_steps": 10**6, "eval_interval": 10**6, "save_steps": 10**6, "logging_steps": 10**6}


@dataclass(frozen=True)
class Measure:
    """What is trained on what, in which unit its work is counted (tokens, targets, steps), and what TRL is set to."""

    module: str
    arguments: str
    phase: int
    data: str
    unit: str
    block: int  # steps
    target: float  # times TRL's
    flags: dict[str, Any]
    trainer: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of TRL, by name


def sft(target: float, block: int, data: str, unit: str, batch: int, length: int, loss_on: str) -> Measure:
    """Return a measure of step 1."""
    packed = {"per_device_train_batch_size": max(1, batch // 3), "max_length": length, "packing": True}
    rows = {"per_device_train_batch_size": batch}
    trl = {
        "length-grouped": rows | GROUPED | {"max_length": length},
        "packed bfd": packed,
        "padding-free": rows | {"padding_free": True, "max_length": None},
    }
    flags = {"per_device_train_batch_size": batch, "max_seq_len": length, "loss_on": loss_on, "eval_iters": 1}
    return Measure("training.step1_sft.main", "SFTArguments", 1, data, unit, block, target, flags, "SFT", trl)


PAIRS = {"per_device_train_batch_size": 8, "max_seq_len": 512, "eval_iters": 1}
TRL_PAIRS = {"length-grouped": {"per_device_train_batch_size": 8, "max_length": 512} | GROUPED}
PPO = {
    "per_device_generation_batch_size": PPO_ROWS,
    "per_device_training_batch_size": PPO_ROWS,
    "max_prompt_seq_len": PROMPT,
    "max_answer_seq_len": ANSWER,
    "actor_learning_rate": LEARNING_RATE,
    "critic_learning_rate": LEARNING_RATE,
    "kl_coef": 0.05,
    "missing_eos_penalty": 1.0,
    "eval_prompts": 0,
}
REWARD = ("training.step2_reward.main", "RewardArguments", 2, "pairs", "tokens", 5)
DPO = ("training.step2_dpo.main", "DPOArguments", 2, "pairs", "tokens", 4)
STEP3 = ("training.step3_ppo.main", "PPOArguments", 3, "pairs", "steps")
MEASURES = {
    "sft-answers": sft(1.8, 4, "pairs", "tokens", 16, 512, "answer"),
    "sft-all": sft(1.8, 4, "pairs", "tokens", 16, 512, "all"),
    "sft-dialogues": sft(1.8, 3, "dialogues", "targets", 6, 1024, "answer"),
    "reward": Measure(*REWARD, 1.6, PAIRS, "Reward", TRL_PAIRS),
    "dpo": Measure(*DPO, 2.0, PAIRS | {"beta": 0.1}, "DPO", TRL_PAIRS),
    "ppo-fixed": Measure(*STEP3, 1, 2.2, PPO, "PPO", {"1.12": {}}),
    "ppo-ragged": Measure(*STEP3, 1, 3.2, PPO, "PPO", {"1.12": {}}),
}
PPO_TARGETS = {32000: 3.0, 130528: 4.0}  # ragged


# --- what all sides start from --------------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Write pairs.jsonl and dialogues.jsonl: English preferences, Chinese dialogues of several answers; or random words."""
    files = {"pairs": "preference_en/rm_static_en_train.jsonl.gz", "dialogues": "chat/moss_sharegpt.jsonl.gz"}
    for name, file in files.items():
        if (SHARED / file).is_file():
            text = gzip.decompress((SHARED / file).read_bytes()).decode()
        else:
            text = "".join(json.dumps(record) + "\n" for record in random_records(name))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def random_records(kind: str, count: int = 1200) -> Iterator[dict[str, Any]]:
    """Yield records of random words, with the lengths of real ones."""
    draw = random.Random(0)

    def words(median: float) -> str:
        number = max(1, min(300, int(draw.lognormvariate(0, 0.7) * median)))
        return "".join(f" word{int(draw.paretovariate(0.7)) % 3000}" for _ in range(number))

    for _ in range(count):
        if kind == "pairs":
            yield {"prompt": words(40), "chosen": words(20), "rejected": words(20)}
        else:
            speakers = (("human", 20), ("gpt", 60)) * 4
            yield {"conversations": [{"from": speaker, "value": words(length)} for speaker, length in speakers]}


def train_tokenizer(folder: Path) -> Any:
    """Return a byte-level BPE of 8,192 tokens, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters, special = pre_tokenizers.ByteLevel.alphabet(), ["</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=special, initial_alphabet=letters, show_progress=False)
    records = (json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.open(encoding="utf-8"))
    tokenizer.train_from_iterator(("\n".join(strings(record)) for record in records), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def strings(value: Any) -> list[str]:
    """Return all texts in a record."""
    if isinstance(value, str):
        return [value]
    return [text for one in (value.values() if isinstance(value, dict) else value) for text in strings(one)]


def write_models(folder: Path, tokenizer: Any, vocabulary: int, ragged: bool) -> None:
    """Write model and reward: the same trunk. ragged: the end token has the probability RAGGED at every place."""
    import torch
    from transformers import OPTForCausalLM, OPTForSequenceClassification

    torch.manual_seed(0)
    more = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    more |= {"vocab_size": max(vocabulary, len(tokenizer)), "max_position_embeddings": 2048, "dropout": 0.0}
    config = opt_config(256, 4, 4, **more)
    model = OPTForCausalLM(config)
    if ragged:
        decoder, bias = model.model.decoder, 10.0
        with torch.no_grad():  # the first coordinate of every last state is 10, and the end token alone reads it
            decoder.final_layer_norm.weight[0], decoder.final_layer_norm.bias[0] = 0.0, bias
            decoder.embed_tokens.weight[:, 0] = decoder.embed_tokens.weight[tokenizer.eos_token_id] = 0.0
            decoder.embed_tokens.weight[tokenizer.eos_token_id, 0] = torch.tensor(RAGGED * vocabulary).log() / bias
    model.save_pretrained(folder / "model")
    config.num_labels = 1
    scorer = OPTForSequenceClassification(config)
    scorer.model.load_state_dict(model.model.state_dict())
    scorer.save_pretrained(folder / "reward")
    for name in ("model", "reward"):
        tokenizer.save_pretrained(folder / name)


def flags_of_ours(measure: Measure, folder: Path, output: Path) -> list[str]:
    """Return the command line of a step."""
    split = ",".join("01"[number == measure.phase] for number in (1, 2, 3))
    flags = {"data_path": folder.parent / f"{measure.data}.jsonl", "output_dir": output, "cache_dir": output / "cache"}
    flags |= {"data_split": split, "lr_scheduler_type": "constant"}
    if measure.phase == 3:
        flags |= {"actor_model_name_or_path": folder / "model", "critic_model_name_or_path": folder / "reward"}
    else:
        flags |= {"model_name_or_path": folder / "model", "learning_rate": LEARNING_RATE}
    return as_flags(flags | ENDLESS | measure.flags)


def rows_for_trl(measure: Measure, flags: list[str]) -> list[dict[str, Any]]:
    """Return the rows that our step will train on, in the columns of TRL's trainer, and in batches of like length."""
    import importlib

    from models.templates import load_template
    from models.tokenizer import load_tokenizer
    from training.utils.data.batching import collate_sft, plan_epoch
    from training.utils.data.prepare import prepare_phase
    from training.utils.flags.parse import parse

    args = parse(getattr(importlib.import_module("training.utils.flags.steps"), measure.arguments), flags)
    path = next(iter(args.models.values()))
    tokenizer = load_tokenizer(path)
    template = load_template(path, tokenizer)
    data = prepare_phase(args, measure.phase, tokenizer, template).train
    if measure.phase == 3:
        return [{"input_ids": row["prompt_ids"]} for row in data]
    batches = plan_epoch(data["length"], args.per_device_train_batch_size, seed=args.seed, epoch=0)
    data = data.select([example for batch in batches for example in batch])
    if measure.trainer == "SFT":
        rows = []
        for row in data:
            batch = collate_sft([row], pad_id=tokenizer.pad_token_id, loss_on=args.loss_on, end_id=template.end_token_id)
            labels = batch.labels.masked_fill(~batch.loss_mask, -100)[0].tolist()
            rows.append({"input_ids": row["input_ids"], "labels": labels})
        return rows
    pairs = [{name: row[name] for name in ("chosen_ids", "rejected_ids")} for row in data]
    if measure.trainer == "Reward":
        return pairs
    return [
        {
            "prompt_ids": pair["chosen_ids"][: row["prompt_length"]],
            "chosen_ids": pair["chosen_ids"][row["prompt_length"] :],
            "rejected_ids": pair["rejected_ids"][row["prompt_length"] :],
        }
        for pair, row in zip(pairs, data, strict=True)
    ]


# --- the sides ------------------------------------------------------------------------------------------------------------


def earlier_build(workdir: Path, build: str) -> Path:
    """Return a folder with an earlier build of this repository."""
    folder = workdir / build
    if not folder.is_dir():
        archive = subprocess.run(["git", "-C", ROOT, "archive", build], stdout=subprocess.PIPE, check=True).stdout
        folder.mkdir()
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def trl_python(workdir: Path, version: str) -> Path:
    """Return an interpreter that has this TRL, and of this environment torch, transformers, datasets and accelerate."""
    folder = workdir / f"trl-{version}"
    python = folder / "bin/python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        next(folder.glob("lib/python*/site-packages")).joinpath("base.pth").write_text(ours + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", f"trl=={version}"], check=True)
    return python


class Side:
    """A process that trains a block of steps whenever it is asked to."""

    def __init__(self, name: str, python: Path, root: Path, settings: dict[str, Any], folder: Path) -> None:
        self.name, self.blocks = name, []
        file = folder / f"{name}.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        self.log = file.with_suffix(".log")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(root)}
        command = [python, "-P", Path(__file__).with_name("beside_trl_side.py"), file]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log.open("w", encoding="utf-8")}
        self.process = subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes)
        self._next()  # the warm-up

    def _next(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise SystemExit(f"{self.log}: the process ended: {' '.join(last)}")
        return json.loads(line)

    def measure(self) -> None:
        """Let it train one block."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.blocks.append(self._next())

    def stop(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def start_sides(measure: Measure, folder: Path, args: argparse.Namespace) -> list[Side]:
    """Start this repository, the earlier build and TRL with each of its settings, one after another."""
    ours = {"side": "ours", "module": measure.module, "arguments": measure.arguments, "block": measure.block}
    builds = {"now": (ROOT, "training.utils.flags.parse")}
    if args.build:
        builds[args.build] = (earlier_build(args.workdir, args.build), "training.utils.parsing")
    rows = folder / f"{measure.trainer}-rows.json"  # which also puts the tokens into the cache of this build
    rows.write_text(json.dumps(rows_for_trl(measure, flags_of_ours(measure, folder, folder / "now"))), encoding="utf-8")
    sides = []
    for name, (root, parser) in builds.items():
        settings = ours | {"parser": parser, "flags": flags_of_ours(measure, folder, folder / name), "counts": name == "now"}
        sides.append(Side(name, Path(sys.executable), root, settings, folder))
    settings = {"side": "trl", "trainer": measure.trainer, "block": measure.block, "learning_rate": LEARNING_RATE}
    settings |= {"rows": str(rows), "model": str(folder / "model"), "reward": str(folder / "reward")}
    if measure.phase == 3:
        settings |= {"side": "trl_ppo", "batch": PPO_ROWS, "answer": ANSWER}
    python = trl_python(args.workdir, "1.12.0" if measure.phase == 3 else "1.16.0")
    for name, options in measure.settings.items():
        if not args.settings or name in args.settings:
            own = settings | {"options": options, "output": str(folder / f"trl-{name}")}
            sides.append(Side(f"TRL {name}", python, ROOT, own, folder))
    return sides


def run_measure(name: str, measure: Measure, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all sides in turn. Returns name, target and each side's blocks; TRL is the fastest of its settings.

    blocks.json has what is measured so far.
    """
    sides = start_sides(measure, folder, args)

    def rate(side: Side) -> float:
        return statistics.median(block[measure.unit] / block["cpu"] for block in side.blocks)

    for number in range(args.rounds):
        for side in sides if number % 2 else reversed(sides):
            side.measure()
        (folder / "blocks.json").write_text(json.dumps({side.name: side.blocks for side in sides}), encoding="utf-8")
        peers = sorted((side for side in sides if side.name.startswith("TRL")), key=rate, reverse=True)
        for slower in peers[1:] if number == min(1, args.rounds - 1) else []:
            print(f"{name}, {slower.name}: {rate(slower):.3g} {measure.unit} a CPU second; left out", file=sys.stderr)
            slower.stop()
            sides.remove(slower)
    for side in sides:
        side.stop()
    blocks = {("TRL" if side is peers[0] else side.name): side.blocks for side in sides}
    return {"measure": name, "setting": peers[0].name, "unit": measure.unit, "target": measure.target, "sides": blocks}


# --- results --------------------------------------------------------------------------------------------------------------

RATES = ("measure", "unit", "TRL", "before", "now", "now / before", "now / TRL", "by wall time", "target")
PEAKS = ("peak MB: TRL", "before", "now", "start, CPU s: TRL", "now")
HEAD = (*RATES, "share of the matmul rate", *PEAKS, "loss: TRL", "now", "TRL's setting")


def ratios(result: dict[str, Any], other: str, clock: str = "cpu") -> list[float]:
    """Return how many times the work of another side ours does in a second, block by block."""
    unit, sides = result["unit"], result["sides"]
    return [
        (ours[unit] / ours[clock]) / (theirs[unit] / theirs[clock])
        for ours, theirs in zip(sides["now"], sides[other], strict=True)
    ]


def spread(values: Sequence[float]) -> str:
    """Write median, least and largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def earlier(result: dict[str, Any]) -> str | None:
    """Return the name of the earlier build, if it was measured."""
    return next((name for name in result["sides"] if name not in ("now", "TRL")), None)


def table_row(result: dict[str, Any]) -> list[object]:
    """Return a row as HEAD names it."""
    unit, sides, before = result["unit"], result["sides"], earlier(result)

    def middle(name: str | None, key: str, per: str, form: str) -> str:
        known = name and key in sides[name][0]
        return format(statistics.median(block[key] / block.get(per, 1) for block in sides[name]), form) if known else "-"

    rates = [middle(name, unit, "cpu", ".3g") for name in ("TRL", before, "now")]
    peaks = [middle(name, "peak_mb", "", ".0f") for name in ("TRL", before, "now")]
    starts = [middle(name, "before", "", ".1f") for name in ("TRL", "now")]
    losses = [middle(name, "loss", "steps", ".3f") for name in ("TRL", "now")]
    gain = spread(ratios(result, before)) if before else "-"
    wall = f"{statistics.median(ratios(result, 'TRL', 'wall')):.2f}"
    gains = [gain, spread(ratios(result, "TRL")), wall, result["target"]]
    share = statistics.median(
        block["flops"] / block["counted_tokens"] * block["tokens"] / block["cpu"] / block["matmul_rate"] for block in sides["now"]
    )
    gains.append(f"{share:.2f}")
    return [result["measure"], unit, *rates, *gains, *peaks, *starts, *losses, result["setting"].removeprefix("TRL ")]


def draw(results: Sequence[dict[str, Any]]) -> str:
    """Return an SVG: for each measure the work of the earlier build and of this one in times TRL's, and the target."""
    left, line = 170, 40
    scale = 400 / max(max(statistics.median(ratios(result, "TRL")), result["target"]) for result in results)
    height = line * len(results) + 30
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{height}" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="100%" height="100%" fill="#fff"/>')
    for number, result in enumerate(results):
        top = 20 + number * line
        parts.append(f'<text x="{left - 8}" y="{top + 20}" text-anchor="end">{result["measure"]}</text>')
        now = statistics.median(ratios(result, "TRL"))
        bars = [(now, "#2a6fb0", "")]
        if before := earlier(result):
            bars.insert(0, (now / statistics.median(ratios(result, before)), "#b9c4cf", f" {before}"))
        for place, (value, colour, label) in enumerate(bars):
            y = top + 4 + 14 * place
            parts.append(f'<rect x="{left}" y="{y}" width="{value * scale:.0f}" height="12" fill="{colour}"/>')
            parts.append(f'<text x="{left + value * scale + 4:.0f}" y="{y + 10}" font-size="10">{value:.2f}{label}</text>')
        goal = left + result["target"] * scale
        parts.append(f'<path d="M{goal:.0f} {top}v36" stroke="#c33" stroke-dasharray="3 2"/>')
    one = left + scale
    parts.append(f'<path d="M{one} 14V{height - 8}" stroke="#333"/><text x="{one}" y="11" text-anchor="middle">TRL = 1</text>')
    return "\n".join([*parts, "</svg>\n"])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write results.json, table.md and beside_trl.svg into --workdir."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="what to measure (all)")
    parser.add_argument("--vocabulary", nargs="+", type=int, default=[TOKENS], help="tokens of the models' vocabularies (8192)")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each side (%(default)s)")
    parser.add_argument("--settings", nargs="+", help="only these settings of TRL, such as length-grouped (all)")
    parser.add_argument("--build", default=BUILD, help="earlier build to compare with, empty for none (%(default)s)")
    parser.add_argument("--workdir", type=Path, default=ROOT / "output/beside_trl", help="folder for everything (%(default)s)")
    args = parser.parse_args(argv)
    args.workdir = args.workdir.resolve()
    args.workdir.mkdir(parents=True, exist_ok=True)
    write_data(args.workdir)
    tokenizer = train_tokenizer(args.workdir)
    results: list[dict[str, Any]] = []

    def rows() -> Iterator[list[object]]:
        for vocabulary in args.vocabulary:
            for name in args.measures:
                folder = args.workdir / f"{name}-{vocabulary}"
                write_models(folder, tokenizer, vocabulary, ragged=name == "ppo-ragged")
                label = name if vocabulary == TOKENS else f"{name}, {vocabulary:,}"
                results.append(run_measure(label, MEASURES[name], folder, args))
                if name == "ppo-ragged":
                    results[-1]["target"] = PPO_TARGETS.get(vocabulary, MEASURES[name].target)
                (args.workdir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
                yield table_row(results[-1])

    (args.workdir / "table.md").write_text(print_table(HEAD, rows()), encoding="utf-8")
    (args.workdir / "beside_trl.svg").write_text(draw(results), encoding="utf-8")


if __name__ == "__main__":
    main()
