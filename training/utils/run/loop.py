"""Assign examples to optimizer steps, processes and micro-batches; report progress."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from errors import UserError
from training.utils.data.batching import Epochs, plan_micro_batches
from training.utils.flags.common import BATCH_FLAGS
from training.utils.run.metrics import progress_line
from training.utils.run.process_group import Run

CPU_TOKENS = 1024  # of a micro-batch: larger ones fall out of a processor's caches (PPO 1.2 times the CPU time at 3,072)
Collate = Callable[[list[dict[str, Any]], list[bool]], Any]  # rows and which of them are real -> a batch on the CPU


@dataclass
class GlobalBatch:
    """The batch of one optimizer step, as one process sees it.

    step counts from 1 over the whole run; micro_batches are this process's share; denominator is the number of targets
    (tokens, pairs) of all processes together; tokens the number of real tokens of all processes. last: of the run.
    evaluates, saves: an evaluation, a checkpoint follows by --eval_interval, --save_steps, or at the end of an epoch without
    them; the end of the run has its own.
    """

    step: int
    epoch: int
    micro_batches: list[Any]
    denominator: float
    tokens: int
    last: bool
    evaluates: bool
    saves: bool


class GlobalBatches:
    """All global batches of a run. The order follows from the seed and the step alone, whatever the number of processes.

    targets: how many targets (tokens, pairs) each example adds to the denominator of its global batch. widths: the tokens that
    each takes in a micro-batch, where that is not its length. schedule_steps: the length of the learning rate's schedule, that
    of a run with this global batch from its start.
    """

    def __init__(
        self, dataset, targets: Sequence[float], collate: Collate, run: Run, args, widths: Sequence[int] | None = None
    ) -> None:
        self.dataset, self.collate, self.run, self.args = dataset, collate, run, args
        self.lengths = list(dataset["length"])
        self.padded = self.lengths if widths is None else list(widths)
        self.targets = list(targets)
        check_token_budget(self.padded, args.max_tokens_per_device)
        self.per_device = args.per_device_train_batch_size
        self.budget = token_budget(args, self.per_device, max(self.padded, default=0), run.device)
        size = kept_batch_size(args, run) or global_batch_size(args, run.world_size, self.per_device)
        self.epochs, self.sizes = epochs_of("global_batch", size, len(self.lengths), run)
        self.total_steps = args.max_steps or self.epochs.total(len(self.lengths), args.num_train_epochs)
        self.schedule_steps = args.max_steps or Epochs(size).total(len(self.lengths), args.num_train_epochs)

    def after(self, step: int) -> Iterator[GlobalBatch]:
        """Yield the global batches that follow the given number of finished steps."""
        for number, epoch, examples, ends_epoch in self.epochs.after(step, self.padded, self.args.seed):
            if number > self.total_steps:
                return
            yield self._batch(number, epoch, examples, ends_epoch)

    def _batch(self, step: int, epoch: int, examples: list[int], ends_epoch: bool) -> GlobalBatch:
        args, lengths = self.args, [self.padded[example] for example in examples]
        plan = plan_micro_batches(lengths, self.run.world_size, None if self.budget else self.per_device, self.budget)
        last = step == self.total_steps
        return GlobalBatch(
            step=step,
            epoch=epoch,
            micro_batches=load_micro_batches(self.dataset, examples, plan[self.run.rank], self.collate, self.run.device),
            denominator=float(sum(self.targets[example] for example in examples)),
            tokens=sum(self.lengths[example] for example in examples),
            last=last,
            evaluates=due(step, args.eval_interval) or (ends_epoch and not args.eval_interval),
            saves=due(step, args.save_steps) or (ends_epoch and not args.save_steps and not last),
        )


def token_budget(args, per_device: int, longest: int, device: torch.device) -> int | None:
    """Return the tokens, padding included, of a micro-batch; None where --max_tokens_per_device 0 cuts it by examples.

    Without the flag a micro-batch holds what per_device of the longest example take, which its memory is planned for: batches
    of several micro-batches need fewer of them where examples are short.
    """
    if args.max_tokens_per_device is not None:
        return args.max_tokens_per_device or None
    most = per_device * longest
    return min(most, max(longest, CPU_TOKENS)) if device.type == "cpu" else most


def check_token_budget(lengths: Sequence[int], budget: int | None) -> None:
    """Raise UserError if a single example exceeds --max_tokens_per_device (0 = no limit). Called before training starts.

    lengths: tokens that each example takes in a micro-batch.
    """
    longest = max(lengths, default=0)
    if 0 < (budget or 0) < longest:
        raise UserError(
            f"--max_tokens_per_device {budget} cannot hold the longest example, of {longest} tokens (a pair counts twice its "
            "longer answer); raise it, or lower --max_seq_len."
        )


def load_micro_batches(dataset, examples: Sequence[int], plan: list[list[int]], collate: Collate, device) -> list[Any]:
    """Collate a plan of positions into examples; -1 is a filler that takes the place of an example without weight."""
    batches = []
    for positions in plan:
        rows = [dataset[int(examples[max(position, 0)])] for position in positions]
        batches.append(collate(rows, [position >= 0 for position in positions]).to(device))
    return batches


def evaluation_batches(dataset, collate: Collate, run: Run, per_device: int, limit: int = 0) -> Iterator[Any]:
    """Yield every example of a held-out set exactly once over all processes; equally many micro-batches on each.

    limit > 0 (--eval_iters) takes no more examples than fill that many micro-batches, on any number of processes: always the
    same ones, drawn by lot, as the first of a plan are the longest.
    """
    lengths, examples = list(dataset["length"]), list(range(len(dataset)))
    if limit:
        random.Random("evaluation").shuffle(examples)
        examples = examples[: limit * per_device]
    for positions in plan_micro_batches([lengths[one] for one in examples], run.world_size, per_device, None)[run.rank]:
        yield load_micro_batches(dataset, examples, [positions], collate, run.device)[0]


def kept_size(name: str, args, run: Run) -> int:
    """Return a size of batches (BATCH_FLAGS) of the run that is resumed; 0 where the flags say it: a new run, or by --allow."""
    return 0 if set(BATCH_FLAGS[name]) & set(args.allowed) else run.sizes.get(name, 0)


def epochs_of(name: str, size: int, count: int, run: Run) -> tuple[Epochs, dict[str, int]]:
    """Return the global batches of a run, or of the rest of the one that is resumed; and what its checkpoints note of them.

    name: of the size, in the notes. count: examples of an epoch.
    """
    noted = {part: run.sizes[part] for part in ("since", "epoch", "seen", "order") if part in run.sizes}
    epochs = Epochs(run.sizes.get(name, size), **noted)
    if epochs.size != size:
        epochs = epochs.changed(run.sizes["step"], size, count)
    return epochs, {name: size} | {part: value for part, value in asdict(epochs).items() if value and part != "size"}


def kept_batch_size(args, run: Run) -> int:
    """Return the examples of one optimizer step of the run that is resumed, or 0, as kept_size does.

    Raises UserError if --global_batch_size is another.
    """
    kept = kept_size("global_batch", args, run)
    if kept and args.global_batch_size not in (0, kept):
        raise UserError(
            f"--global_batch_size {args.global_batch_size}: the run that is resumed takes {kept} examples a step; give that "
            "number or none, or go on with the new one by --allow global_batch_size."
        )
    return kept


def global_batch_size(args, world_size: int, per_device: int) -> int:
    """Return the examples of one optimizer step over all processes. Raises UserError if the number of processes does not
    divide it, or if --gradient_accumulation_steps says something else.
    """
    accumulated = per_device * args.gradient_accumulation_steps * world_size
    if not args.global_batch_size:
        return accumulated
    if args.gradient_accumulation_steps > 1 and accumulated != args.global_batch_size:
        raise UserError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps} makes a batch of {accumulated} over {world_size} "
            f"processes, --global_batch_size is {args.global_batch_size}; drop one of the two (1 step is as good as not given)."
        )
    if args.global_batch_size % world_size:
        raise UserError(
            f"--global_batch_size {args.global_batch_size} cannot be shared by {world_size} processes; "
            f"take a multiple of {world_size}, such as {math.ceil(args.global_batch_size / world_size) * world_size}."
        )
    return args.global_batch_size


def due(step: int, every: int) -> bool:
    """Return true at every n-th step; never for 0."""
    return every > 0 and step % every == 0


class Progress:
    """Speed and time left since the start or the resume; prints the one progress line of a run."""

    def __init__(self, run: Run, total: int, done: int) -> None:
        self.run, self.total, self.start = run, total, done
        self.started = self.last = time.monotonic()
        self.tokens = 0

    def count(self, tokens: int) -> None:
        """Add the real tokens of a finished step."""
        self.tokens += tokens

    def report(self, step: int, values: dict[str, float], every: int, shown: Sequence[str] = ()) -> None:
        """Write the values and the speed since the last report, when due: all to metrics, ``shown`` (or all) as one line."""
        if not (due(step, every) or step == self.total):
            return
        now = time.monotonic()
        values = values | {"tokens_per_second": self.tokens / max(now - self.last, 1e-9)}
        self.last, self.tokens = now, 0
        self.run.metrics.log(step, values)
        if self.run.is_main:
            line = {name: values[name] for name in shown or values} | {"tokens/s": values["tokens_per_second"]}
            line.pop("tokens_per_second", None)
            print(progress_line(step, self.total, line, now - self.started, step - self.start), flush=True)
