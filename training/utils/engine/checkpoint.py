"""Save and resume: everything that moves, in folders that are either whole or not there."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from errors import UserError
from models.adapters.lora import merged_state_dict, save_adapter, save_prefix
from models.adapters.prefix import has_prefix
from models.device import rng_state, set_rng_state
from models.heads import base_model
from models.save import save_model
from training.utils.engine.deepspeed_internals import save_on_every_disk
from training.utils.engine.weights import trained_weights, whole_model
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")

MANIFEST = "checkpoint.json"
# Of the flags with resume="free", which may differ between a run and its resumption: they change the learning rate of the
# steps to come, which is allowed and said.
LENGTH = ("max_steps", "num_train_epochs")


def fingerprint(args: Any, run: Run, data: str) -> dict[str, Any]:
    """Return what must be equal for a resumed run to continue the same curve: flags, number of processes, data."""
    free = {one.name for one in fields(args) if one.metadata["resume"] == "free"}
    flags = {name: value for name, value in asdict(args).items() if name not in free}
    return {"world_size": run.world_size, "data": data, **flags}


def export(
    engine: Any,
    tokenizer: Any,
    template: Any,
    folder: str | Path,
    run: Run,
    weights: dict[str, Tensor] | None = None,
    **config: Any,
) -> None:
    """Save the trained network as a checkpoint that transformers opens, LoRA merged (and alone in ``adapter/``); of a
    model with a prefix the prefix alone, in float32 (adapters.save_prefix).

    All processes call it; one for each disk writes (Nodes.keeps_disk). weights: on those that write, what to save in place
    of the trained parameters, whole and named as in engine.module.model.named_parameters(), such as their moving average.
    config: fields to add to its config.json, such as the statistics of a reward model.
    """
    network = engine.module.model
    if has_prefix(network):
        trained = trained_weights(engine, network) if weights is None else weights
        if run.nodes.keeps_disk:
            base_model(network).config.update(config)
            save_prefix(network, tokenizer, template, folder, trained)
        run.barrier()
        return
    # On the host: a card that holds its share of a model, or a model and its adapter, need not have room for a whole one more.
    with whole_model(engine, torch.device("cpu"), keep=run.nodes.keeps_disk) as whole:
        if run.nodes.keeps_disk:
            model = whole.model
            base_model(model).config.update(config)
            adapted = base_model(model) is not model
            with stand_in(model, weights or {}):
                merged = None
                if adapted:
                    merged = merged_state_dict(model, {name: tensor.cpu() for name, tensor in model.state_dict().items()})
                save_model(model, tokenizer, template, folder, merged)
                if adapted:
                    save_adapter(model, Path(folder) / "adapter")
    run.barrier()


@contextmanager
def stand_in(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Temporarily replace some parameters of the model, in their own dtype and on their own device."""
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].data for name in weights}
    try:
        for name, value in weights.items():
            parameters[name].data = value.to(own[name].device, own[name].dtype)
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value


class Checkpoint:
    """The checkpoints of one run, under ``output_dir/checkpoints/step-00000012``.

    A folder is written under another name, gets its manifest (all files with their sizes) last and is renamed then; without
    a matching manifest it is never read. It holds the engines' weights, optimizers, schedules and loss scales, and for every
    process the states of the random generators and of ``parts``: objects with state_dict() and load_state_dict(), whose
    state is tensors, numbers and text. The position in the data is the step itself. Nodes that do not share a disk have a
    folder each, with what their own processes need, and resume from the newest step that all of them have whole.

    What lies there of another run is moved into ``checkpoints/earlier-1``, with its metrics; nothing of it is removed.
    """

    def __init__(
        self, run: Run, engines: dict[str, Any], marks: dict[str, Any], parts: dict[str, Any] | None = None
    ) -> None:
        self.run = run
        self.engines = engines
        self.parts = parts or {}
        self.marks = json.loads(json.dumps(marks, default=str))
        self.folder = Path(run.args.output_dir) / "checkpoints"
        self._check_nodes()

    def save(self, step: int, extra: dict[str, Any] | None = None) -> None:
        """Save after the given number of optimizer steps; extra is any JSON that the step wants back. All processes call it."""
        final = self.folder / step_name(step)
        if all(self.run.nodes.gather((final / MANIFEST).exists())):
            return
        partial = self.folder / f".writing-{final.name}"
        if self.run.nodes.keeps_disk:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            partial.mkdir(parents=True)
        self.run.barrier()
        for name, engine in self.engines.items():
            if self.run.nodes.keeps_disk:
                save_on_every_disk(engine)
            engine.save_checkpoint(str(partial / name), tag="state", save_latest=False)
        torch.save(generator_states(), partial / f"generators-{self.run.rank}.pt")
        for name, part in self.parts.items():
            torch.save(part.state_dict(), partial / f"{name}-{self.run.rank}.pt")
        self.run.barrier()
        if self.run.nodes.keeps_disk:
            self._seal(partial, final, step, extra or {})
        # On disks of their own: no node removes an older checkpoint before every node has this one.
        self.run.barrier()
        if self.run.nodes.keeps_disk:
            self._prune()
        self.run.barrier()

    def _seal(self, partial: Path, final: Path, step: int, extra: dict[str, Any]) -> None:
        """Write the manifest and give the folder its name."""
        files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
        manifest = {"step": step, "marks": self.marks, "length": self._length(), "extra": extra, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        partial.rename(final)

    def _prune(self) -> None:
        """Remove the oldest whole checkpoints beyond --save_total_limit."""
        limit = self.run.args.save_total_limit
        if limit > 0:
            for folder in sorted(self.folder.glob("step-*"))[:-limit]:
                shutil.rmtree(folder, ignore_errors=True)

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Continue where --resume says. Returns the number of steps done and the extra of that checkpoint; (0, {}) to start.

        Raises UserError for a checkpoint that is half-written or was made by another run.
        """
        wanted = self.run.args.resume
        folder = self._newest_of_all() if wanted == "auto" else Path(wanted) if wanted else None
        if folder is None:
            if wanted:
                logger.info("--resume: no whole checkpoint under %s; the run starts at its beginning.", self.folder)
            self._set_aside(None, metrics=True)
            return 0, {}
        manifest = self.run.nodes.together(lambda: self._checked(folder))
        for name, engine in self.engines.items():
            loaded, _ = engine.load_checkpoint(str(folder / name), tag="state")
            if loaded is None:
                raise UserError(
                    f"{folder}: the state of the {name} could not be loaded; resume from an older checkpoint."
                )
        for name, part in self.parts.items():
            part.load_state_dict(torch.load(folder / f"{name}-{self.run.rank}.pt", weights_only=True))
        states = torch.load(folder / f"generators-{self.run.rank}.pt", weights_only=True)
        set_generator_states(states)
        own = folder.resolve().parent == self.folder.resolve()
        self._set_aside(manifest["step"] if own else None, metrics=not own and any(self.folder.glob("step-*")))
        self.run.metrics.rewind(manifest["step"])
        self._warn_of_length(manifest.get("length", {}))
        logger.info("Resumed from %s after %d steps.", folder, manifest["step"])
        return manifest["step"], manifest["extra"]

    def _set_aside(self, after: int | None, metrics: bool) -> None:
        """Move checkpoints out of the way that are of later steps than this run has done, or all (after=None): they would
        be taken for this run's own, and --save_total_limit would remove those in their place. All processes call it.

        metrics: metrics.jsonl and samples.jsonl too. What was half-written is removed. UserError if the disk refuses.
        """
        if self.run.nodes.keeps_disk:
            for partial in self.folder.glob(".writing-*"):
                shutil.rmtree(partial, ignore_errors=True)
        self.run.nodes.together(lambda: self._move_aside(after, metrics) if self.run.nodes.keeps_disk else None)
        self.run.barrier()

    def _move_aside(self, after: int | None, metrics: bool) -> None:
        """What _set_aside moves, on this process's disk."""
        files = [file for file in sorted(self.folder.glob("step-*")) if after is None or file.name > step_name(after)]
        files += self.run.metrics.files() if metrics else []
        if not files:
            return
        numbers = [one.name.removeprefix("earlier-") for one in self.folder.glob("earlier-*")]
        aside = self.folder / f"earlier-{1 + max((int(number) for number in numbers if number.isdigit()), default=0)}"
        try:
            aside.mkdir(parents=True)
            for file in files:
                file.rename(aside / file.name)
        except OSError as error:
            raise UserError(
                f"--output_dir {self.run.args.output_dir} holds another run, which cannot be moved to {aside} "
                f"({error.strerror}); name another folder, or go on with that run by --resume."
            ) from error
        logger.info("Not of this run: %s; moved to %s.", ", ".join(file.name for file in files), aside)

    def _length(self) -> dict[str, Any]:
        """The flags that say how long the run is."""
        return {name: getattr(self.run.args, name, None) for name in LENGTH}

    def _warn_of_length(self, then: dict[str, Any]) -> None:
        """Say that a run of another length than that of its checkpoint has another schedule."""
        changed = [name for name in LENGTH if name in then and then[name] != self._length()[name]]
        schedule = getattr(self.run.args, "lr_scheduler_type", "constant")
        if changed and not schedule.startswith("constant"):
            now = " and ".join(f"--{name} {self._length()[name]} (it was {then[name]})" for name in changed)
            logger.warning(
                "%s: --lr_scheduler_type %s goes by the whole length, so from here on the learning rate is another than that "
                "of the run so far would have been.", now, schedule,
            )  # fmt: skip

    def _newest_of_all(self) -> Path | None:
        """The newest checkpoint that is whole on every node; None if no node has any. UserError if they have none in common."""
        nodes = self.run.nodes
        if not nodes.several:
            return newest_whole(self.folder)
        found = nodes.gather([folder.name for folder in whole_checkpoints(self.folder)])
        common = set(found[0]).intersection(*found)
        if common and max(common) == max(map(max, found)):
            return self.folder / max(common)
        if not any(found):
            return None
        newest = dict(zip(nodes.names, (max(own, default="none") for own in found), strict=True))
        have = ", ".join(f"{name}: {checkpoint}" for name, checkpoint in newest.items())
        if not common:
            raise UserError(
                f"--resume: no checkpoint under {self.folder} is whole on every node ({have}). Bring back the folder of the node "
                "that lacks it, or remove it on the others to start at the beginning."
            )
        logger.warning("The newest whole checkpoints differ (%s): all go on from %s, which every node has.", have, max(common))
        return self.folder / max(common)

    def _checked(self, folder: Path) -> dict[str, Any]:
        """The manifest of a checkpoint that this process can go on from. Raises UserError otherwise."""
        manifest = read_manifest(folder)
        self._check_marks(folder, manifest["marks"])
        if f"generators-{self.run.rank}.pt" not in manifest["files"]:
            raise UserError(
                f"{folder} has nothing of rank {self.run.rank}: it was another node's; start the nodes in the order of the run "
                "that wrote it (--node_rank, lines of the hostfile), or copy the folder that belongs here."
            )
        return manifest

    def _check_nodes(self) -> None:
        """UserError unless all nodes were started with the same flags and data; their folders may have other names."""
        nodes = self.run.nodes
        if not nodes.several:
            return
        first, *others = nodes.gather(self.marks)
        for name, marks in zip(nodes.names[1:], others, strict=True):
            differ = [mark for mark in first if marks.get(mark) != first[mark] and not mark.endswith("path")]
            if "data" in differ:
                raise UserError(f"{name} reads other training data than {nodes.names[0]}; copy the same files to every node.")
            if differ:
                raise UserError(
                    f"{name} was started with --{differ[0]} {marks.get(differ[0])}, {nodes.names[0]} with {first[differ[0]]}; "
                    "start the same command on every node."
                )

    def _check_marks(self, folder: Path, marks: dict[str, Any]) -> None:
        """Compare what the checkpoint was made with to this run, mark by mark."""
        for name in sorted(self.marks.keys() | marks.keys()):
            then, now = marks.get(name), self.marks.get(name)
            if then == now:
                continue
            if name == "data":
                raise UserError(
                    f"{folder} was made with other training data; resume with the same files, or start afresh."
                )
            if name == "world_size":
                raise UserError(
                    f"{folder} was made by {then} processes, this run has {now}; DeepSpeed's shards need the same number."
                )
            raise UserError(
                f"{folder} was made with --{name} {then}, this run says {now}; give the same value, or another --output_dir."
            )


def step_name(step: int) -> str:
    """The name of a checkpoint's folder; names sort as the steps do."""
    return f"step-{step:08d}"


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint folder that has a matching manifest, or None."""
    return next(whole_checkpoints(folder), None)


def whole_checkpoints(folder: Path) -> Iterator[Path]:
    """The checkpoint folders that have a matching manifest, newest first."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_manifest(candidate)
        except UserError as error:
            logger.warning("Passed over: %s", error)
            continue
        yield candidate


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there in full size. Raises UserError otherwise."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(
            f"--resume {folder}: no such folder; name one under output_dir/checkpoints, or use --resume alone."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder} is not a whole checkpoint ({MANIFEST} is missing or cut); resume from an older one."
        ) from error
    for name, size in files:
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(
                f"{folder} is half-written: {name} is missing or has another size; resume from an older one."
            )
    return manifest


def generator_states() -> dict[str, Any]:
    """States of the generators of python, numpy, torch and the device, as tensors that load without pickle."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": torch.tensor([version, *words]),
        "python_gauss": gauss,
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": [name, int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "device": rng_state(),
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Undo what happened since ``generator_states``."""
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), states["python_gauss"]))
    name, position, has_gauss, cached = states["numpy_rest"]
    np.random.set_state((name, states["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    set_rng_state(states["device"])
