"""Save and resume: everything that moves, in folders that are either whole or not there."""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errors import DiskError, UserError
from models.adapters.lora import merged_state_dict, save_adapter, save_prefix
from models.adapters.prefix import has_prefix
from models.device import rng_state, set_rng_state
from models.heads import base_model
from models.save import save_model, share_permissions
from training.utils.engine.same_run import check_same_run, tell_sizes
from training.utils.engine.state import (
    SavedTensors,
    engine_facts,
    engine_tensors,
    read_engine,
    set_engine_facts,
    write_tensors,
)
from training.utils.engine.weights import trained_weights, whole_model
from training.utils.run.deepspeed_internals import load_data, load_data_alone
from training.utils.run.manifest import (
    MANIFEST,
    check_content,
    flush,
    read_manifest,
    settle,
    step_folders,
    step_name,
    whole_checkpoints,
    write_manifest,
)
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")

# Of the flags with resume="free", which may differ between a run and its resumption: they change the learning rate of the
# steps to come, which is allowed and said.
LENGTH = ("max_steps", "num_train_epochs")
FACTS = "engine.json"


def export(
    engine, tokenizer, template, folder: str | Path, run: Run, weights: dict[str, Tensor] | None = None, **config: Any
) -> None:
    """Save the trained network as a checkpoint that transformers opens, LoRA merged (and alone in ``adapter/``); of a
    model with a prefix the prefix alone, in float32 (adapters.save_prefix).

    All processes call it; one for each disk writes (Nodes.keeps_disk). weights: on those that write, what to save in place
    of the trained parameters, whole and named as in engine.module.model.named_parameters(), such as their moving average.
    config: fields to add to its config.json, such as the statistics of a reward model.
    """
    network, writes = engine.module.model, run.nodes.keeps_disk
    if has_prefix(network):
        trained = trained_weights(engine, network) if weights is None else weights
        if writes:
            base_model(network).config.update(config)
            save_prefix(network, tokenizer, template, folder, trained)
        run.barrier()
        return
    # On the host: a card that holds its share of a model, or a model and its adapter, need not have room for a whole one more.
    with whole_model(engine, torch.device("cpu"), keep=writes) as whole:
        if writes:
            model = whole.model
            base_model(model).config.update(config)
            adapted = base_model(model) is not model
            with stand_in(model, weights or {}):
                on_host = {name: tensor.cpu() for name, tensor in model.state_dict().items()} if adapted else {}
                merged = merged_state_dict(model, on_host) if adapted else None
                save_model(model, tokenizer, template, folder, merged)
                if adapted:
                    save_adapter(model, Path(folder) / "adapter")
    run.barrier()


@contextmanager
def stand_in(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Replace for a while some parameters of the model, in their own dtype and on their own device."""
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

    A folder is written under another name, gets its manifest (all files with sizes and checksums) last and is renamed then;
    without a matching manifest it is never read. It holds the engines' trained weights, optimizers, schedules and loss scales
    and the ``averages`` (MovingAverage), which other numbers of processes under other ZeRO stages can read (state.py), and
    for every process the states of the random generators and of ``states``: objects with state_dict() and load_state_dict(),
    whose state is numbers and text, the same on all processes. The position in the data is the step itself, with the ``sizes``
    of batches (loop.epochs_of), which a resumed run keeps but for --allow. Nodes that do not share a disk have a folder each,
    with what their own processes need, and resume from the newest step that all of them have whole.

    What lies there of another run is moved into ``checkpoints/earlier-1``, with its metrics; nothing of it is removed.
    """

    def __init__(
        self,
        run: Run,
        engines: dict[str, Any],
        marks: dict[str, Any],
        sizes: dict[str, int],
        states: dict[str, Any] | None = None,
        averages: dict[str, Any] | None = None,
    ) -> None:
        self.run, self.engines, self.sizes = run, engines, sizes
        self.states, self.averages = states or {}, averages or {}
        self.marks = json.loads(json.dumps(marks, default=str))
        self.folder = Path(run.args.output_dir) / "checkpoints"
        self._check_nodes()

    def save(self, step: int) -> None:
        """Save after the given number of optimizer steps. All processes call it. Raises DiskError if the disk is full."""
        run, final = self.run, self.folder / step_name(step)
        if all(run.nodes.gather((final / MANIFEST).exists())):
            return
        partial = self.folder / f".writing-{final.name}"
        with self._disk_errors_told(partial):
            self._write(partial, final, step)

    def _write(self, partial: Path, final: Path, step: int) -> None:
        """Write a checkpoint whole, then remove the oldest."""
        run = self.run
        if run.nodes.keeps_disk:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            partial.mkdir(parents=True)
        self._check_space(partial)
        own = settle(partial, self._files(partial))
        written = {name: one for of_process in [*run.nodes.gather(own), own] for name, one in of_process.items()}
        if run.nodes.keeps_disk:
            self._seal(partial, final, step, {name: one for name, one in written.items() if (partial / name).exists()})
        # On disks of their own: no node removes an older checkpoint before every node has this one.
        run.barrier()
        if run.nodes.keeps_disk:
            self._prune()
        run.barrier()

    def _files(self, partial: Path) -> Iterator[Path]:
        """Write the files of this process; yield each when it is written."""
        rank, keeps_disk = self.run.rank, self.run.nodes.keeps_disk
        for name, engine in self.engines.items():
            yield from write_tensors(partial / name, rank, engine_tensors(engine, keeps_disk))
            if keeps_disk:
                facts = partial / name / FACTS
                facts.write_text(json.dumps(engine_facts(engine)), encoding="utf-8")
                yield facts
        for name, average in self.averages.items():
            yield from write_tensors(partial / name, rank, average.tensors())
        states = {"generators": generator_states()} | {name: owner.state_dict() for name, owner in self.states.items()}
        for name, state in states.items():
            torch.save(state, partial / f"{name}-{rank}.pt")
            yield partial / f"{name}-{rank}.pt"

    def _check_space(self, partial: Path) -> None:
        """Raise DiskError, on all processes, if a disk has no room for a checkpoint as large as the newest on it."""
        short = self.run.nodes.keeps_disk and self._free(partial) < self._needed()
        if any(self.run.nodes.gather(short)):
            raise DiskError(self._disk_sentence(partial, "too little room"))
        self.run.barrier()

    def _needed(self) -> int:
        """Return the bytes of the newest whole checkpoint; 0 if there is none."""
        newest = next(whole_checkpoints(self.folder), None)
        return sum(read_manifest(newest)["files"].values()) if newest else 0

    def _free(self, path: Path) -> int:
        """Return the bytes that may still be written beside a path."""
        return shutil.disk_usage(path.parent if path.parent.exists() else "/").free

    def _disk_sentence(self, partial: Path, reason: str) -> str:
        """Say why and where a checkpoint was not written."""
        needed = f"about {self._needed():,} bytes" if self._needed() else "more bytes"
        return (
            f"The checkpoint {partial} was not written ({reason}): it needs {needed}, {self._free(partial):,} bytes are free. "
            "The older checkpoints are whole; make room, then give the same command with --resume."
        )

    @contextmanager
    def _disk_errors_told(self, partial: Path) -> Iterator[None]:
        """Turn what a full or lost disk raises inside into a DiskError; torch's writer says neither ENOSPC nor the path."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None)
            if not reason and not re.search("iostream|unexpected pos|inline_container|Parent directory|os error", str(error)):
                raise
            sentence = self._disk_sentence(partial, reason or "the disk took no more")
            if self.run.world_size == 1:
                shutil.rmtree(partial, ignore_errors=True)
            raise DiskError(sentence) from error

    def _seal(self, partial: Path, final: Path, step: int, written: dict[str, tuple[int, str]]) -> None:
        """Write the manifest and give the folder its name."""
        more = {"marks": self.marks, "length": self._length(), "sizes": self.sizes}
        write_manifest(partial, step, written, **more)
        share_permissions(partial, MANIFEST)
        partial.rename(final)
        flush(self.folder)

    def _prune(self) -> None:
        """Remove the oldest whole checkpoints beyond --save_total_limit."""
        limit = self.run.args.save_total_limit
        old = step_folders(self.folder)[:-limit] if limit > 0 else []
        if not old:
            return
        try:
            check_loads(step_folders(self.folder)[-1])
        except UserError as error:
            logger.warning("No older checkpoint is removed: %s", error)
            return
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)

    def resume(self) -> int:
        """Continue where --resume says. Returns the number of steps done; 0 to start.

        Raises UserError for a checkpoint that is half-written or was made by another run.
        """
        wanted = self.run.args.resume
        folder = self._newest_of_all() if wanted == "auto" else Path(wanted) if wanted else None
        if folder is None:
            if wanted:
                logger.info("--resume: no whole checkpoint under %s; the run starts at its beginning.", self.folder)
            self._set_aside(None, metrics=True)
            return 0
        if wanted != "auto" and (damage := self._damage(folder)):
            raise UserError(damage)
        manifest = self.run.nodes.together(lambda: self._checked(folder))
        resized = tell_sizes(folder, manifest, self.sizes)
        self._load(folder, resized, manifest.get("length", {}), manifest.get("sizes", self.sizes))
        step, own = manifest["step"], folder.resolve().parent == self.folder.resolve()
        self._set_aside(step if own else None, metrics=not own and bool(step_folders(self.folder)))
        self.run.metrics.rewind(step)
        self._warn_of_length(manifest.get("length", {}))
        logger.info("Resumed from %s after %d steps.", folder, step)
        return step

    def _load(self, folder: Path, resized: bool, then: dict[str, Any], sizes: dict[str, int]) -> None:
        """Bring back the state that a checkpoint holds. Raises UserError, on all nodes, for what it lacks.

        resized: see set_engine_facts. then: the flags of the checkpoint's run that say how long it is. sizes: its batches.
        """
        now = self._length()
        resized = resized and not now["max_steps"]  # by --max_steps steps count on, whatever their size
        longer = now["num_train_epochs"] / then["num_train_epochs"] if resized and not then.get("max_steps", 1) else 1
        larger = None
        if resized and then.get("max_steps"):
            larger = self._examples_of_a_step(self.sizes) / self._examples_of_a_step(sizes)
        if any((folder / name / "state").is_dir() for name in self.engines):
            self._load_former(folder)
        else:
            parts = {name: SavedTensors(folder / name) for name in (*self.engines, *self.averages)}

            def read() -> None:
                for name, engine in self.engines.items():
                    read_engine(engine, parts[name])
                for name, average in self.averages.items():
                    average.read(parts[name])

            self.run.nodes.together(read)
            for name, engine in self.engines.items():
                facts = json.loads((folder / name / FACTS).read_text(encoding="utf-8"))
                set_engine_facts(engine, facts, resized, longer, larger)
        for name, owner in self.states.items():
            owner.load_state_dict(load_data(self._own(folder, name)))
        set_generator_states(load_data(self._own(folder, "generators")))

    def _examples_of_a_step(self, sizes: dict[str, int]) -> int:
        """Return how many examples, in step 3 answers, an optimizer step takes by the sizes of a run."""
        if "minibatch" not in sizes:
            return sizes.get("global_batch", 1)
        return min(sizes["minibatch"], sizes["rollout"] * self.run.args.num_return_sequences)

    def _own(self, folder: Path, name: str) -> Path:
        """Return the file of this process, or that of the first one where the checkpoint was written by fewer."""
        own = folder / f"{name}-{self.run.rank}.pt"
        return own if own.exists() else min(folder.glob(f"{name}-*.pt"))

    def _load_former(self, folder: Path) -> None:
        """Load an older checkpoint, which has DeepSpeed's own files."""
        for name, engine in self.engines.items():
            load_data_alone(engine)
            if engine.load_checkpoint(str(folder / name), tag="state")[0] is None:
                raise UserError(f"{folder}: the state of the {name} could not be loaded; resume from an older checkpoint.")
        for name, average in self.averages.items():
            average.load_former(load_data(folder / f"{name}-{self.run.rank}.pt"))

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
        """Move what _set_aside says, on this process's disk."""
        files = [file for file in step_folders(self.folder) if after is None or file.name > step_name(after)]
        files += self.run.metrics.files() if metrics else []
        if not files:
            return
        number = 1
        while (aside := self.folder / f"earlier-{number}").exists():
            number += 1
        try:
            aside.mkdir(parents=True)
            for file in files:
                shutil.move(file, aside / file.name)  # "checkpoints" may be a link to another disk
        except OSError as error:
            raise UserError(
                f"--output_dir {self.run.args.output_dir} holds another run, which cannot be moved to {aside} "
                f"({error.strerror or error}); name another folder, or go on with that run by --resume."
            ) from error
        logger.info("Not of this run: %s; moved to %s.", ", ".join(file.name for file in files), aside)

    def _length(self) -> dict[str, Any]:
        """Return the flags that say how long the run is."""
        return {name: getattr(self.run.args, name, None) for name in LENGTH}

    def _warn_of_length(self, then: dict[str, Any]) -> None:
        """Warn if the schedule of a run of another length than that of its checkpoint is another."""
        now = self._length()
        changed = [f"--{name} {now[name]} (it was {then[name]})" for name in then if then[name] != now[name]]
        schedule = getattr(self.run.args, "lr_scheduler_type", "constant")
        if changed and not schedule.startswith("constant"):
            logger.warning(
                f"{' and '.join(changed)}: --lr_scheduler_type {schedule} goes by the whole length, so from here on the "
                "learning rate is another than that of the run so far would have been."
            )

    def _newest_of_all(self) -> Path | None:
        """Find the newest checkpoint that is whole on every node; None if no node has any. UserError if they share none."""
        nodes = self.run.nodes
        whole = nodes.gather([folder.name for folder in whole_checkpoints(self.folder)])
        if not any(whole):
            return None
        common = set(whole[0]).intersection(*whole)
        newest = [max(own, default="none") for own in whole]
        have = ", ".join(f"{name}: {one}" for name, one in dict(zip(nodes.names, newest, strict=False)).items())
        if not common:
            raise UserError(
                f"--resume: no checkpoint under {self.folder} is whole on every node ({have}). Bring back the folder of the node "
                "that lacks it, or remove it on the others to start at the beginning."
            )
        if max(common) != max(newest):
            logger.warning("The newest whole checkpoints differ (%s): all go on from %s, which every node has.", have, max(common))
        for chosen in sorted(common, reverse=True):
            damage = self._damage(self.folder / chosen)
            if not damage:
                return self.folder / chosen
            logger.warning("Passed over: %s", damage)
        return None

    def _damage(self, folder: Path) -> str | None:
        """Return a sentence about what is damaged in a checkpoint, on any disk; None if it is good. All processes call it."""
        nodes, found = self.run.nodes, {}
        if nodes.keeps_disk:
            try:
                check_content(folder)
                check_loads(folder)
            except UserError as error:
                found = {nodes.names[self.run.rank]: str(error)}
        damaged = {name: sentence for one in nodes.gather(found) for name, sentence in one.items()}
        return next((f"{name}: {sentence}" if nodes.several else sentence for name, sentence in damaged.items()), None)

    def _checked(self, folder: Path) -> dict[str, Any]:
        """Return the manifest of a checkpoint that this process can go on from. Raises UserError otherwise."""
        manifest = read_manifest(folder)
        then, now = manifest["marks"], self.marks
        check_same_run(folder, then, now, self.run.args)
        moved = [name for name in now if name == "world_size" or name.endswith("zero_stage") if then.get(name) != now[name]]
        if moved and "sizes" not in manifest:
            raise UserError(
                f"{folder} was written by an earlier version, in files that the same processes under the same ZeRO stage read "
                f"({', '.join(f'{name} {then.get(name)}' for name in moved)}); go on with those."
            )
        if f"generators-{self.run.rank}.pt" not in manifest["files"] and "world_size" not in moved:
            raise UserError(
                f"{folder} has nothing of rank {self.run.rank}: it was another node's; start the nodes in the order of the run "
                "that wrote it (--node_rank, lines of the hostfile), or copy the folder that belongs here."
            )
        return manifest

    def _check_nodes(self) -> None:
        """Raise UserError unless all nodes were started with the same flags and data; their folders may have other names."""
        names = self.run.nodes.names
        first, *others = self.run.nodes.gather(self.marks)
        for name, marks in zip(names[1:], others, strict=False):
            differ = [mark for mark in first if marks.get(mark) != first[mark] and not mark.endswith("path")]
            for what, words in {"data": "reads other training data", "weights": "has other model weights"}.items():
                if what in differ:
                    raise UserError(f"{name} {words} than {names[0]}; copy the same files to every node.")
            for mark in differ:
                raise UserError(
                    f"{name} was started with --{mark} {marks.get(mark)}, {names[0]} with {first[mark]}; start the same "
                    "command on every node."
                )


def check_loads(folder: Path) -> None:
    """Raise UserError for a checkpoint of which a file is missing or does not load. Nothing that a file names is run."""
    for name in read_manifest(folder)["files"]:
        try:
            if name.endswith(".pt"):
                load_data(folder / name, mmap=True)
            elif name.endswith(".safetensors"):
                safe_open(folder / name, framework="pt")
        except Exception as error:  # what a damaged pickle raises is of any type
            reason = str(error).split("\n")[0]
            raise UserError(f"{folder} does not load ({name}: {reason}); resume from an older one.") from error


def generator_states() -> dict[str, Any]:
    """Return the states of the generators of python, numpy, torch and the device, as tensors that load without pickle."""
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
