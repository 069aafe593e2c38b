"""Compare the run that wrote a checkpoint with the one that goes on from it: what must be equal, and what may change."""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import Any

from errors import UserError
from models.checkpoint_folder import open_checkpoint
from training.utils.data.digest import sampled_digest, weight_files
from training.utils.flags.common import BATCH_FLAGS
from training.utils.run.process_group import Run

logger = logging.getLogger("sanbu")


def fingerprint(args: Any, run: Run, data: str) -> dict[str, Any]:
    """Return what a checkpoint remembers of its run: flags (but for those with resume="free"), processes, models and data."""
    free = {one.name for one in fields(args) if one.metadata["resume"] == "free"}
    flags = {name: value for name, value in asdict(args).items() if name not in free}
    weights = {role: weights_digest(path) for role, path in args.models.items()}
    return {"world_size": run.world_size, "data": data, "weights": weights, **flags}


def weights_digest(path: str) -> str:
    """Return sampled_digest of a model's weight files, those of its base and adapters too: frozen ones are in no checkpoint."""
    model = open_checkpoint(path)
    folders = dict.fromkeys([model.folder, model.weights, *model.adapters])
    return sampled_digest(*(file for one in folders for file in weight_files(one)))


def check_same_run(folder: Path, then: dict[str, Any], now: dict[str, Any], args: Any) -> None:
    """Raise UserError if a checkpoint's run differs from this one in what may not change, or not without --allow.

    Logs a line for each flag that does change. Marks of former flags, and those that the checkpoint has not, do not count.
    """
    kinds = {one.name: one.metadata["resume"] for one in fields(args)}
    changed = [name for name in sorted(now) if name in then and then[name] != now[name]]
    for name in changed:
        if kinds.get(name) == "same":
            raise UserError(
                f"{folder} was made with --{name} {then[name]}, this run says {now[name]}, which cannot change within a run; "
                "give the same value, or another --output_dir."
            )
    asked = [name for name in changed if kinds.get(name) == "allow"]
    if set(asked) - set(args.allowed):
        before, after = (", ".join(f"--{name} {marks[name]}" for name in asked) for marks in (then, now))
        raise UserError(
            f"{folder} was made with {before}; this run says {after}. Give the same, or go on with the new by --allow "
            f"{','.join(asked)}."
        )
    if "weights" in changed:
        roles = [role for role in now["weights"] if now["weights"][role] != then["weights"].get(role)]
        raise UserError(f"{folder} was made from other weights ({', '.join(roles)}); bring those back, or start afresh.")
    if "data" in changed:
        raise UserError(f"{folder} was made with other training data; resume with the same files, or start afresh.")
    for name in asked:
        logger.info("--%s %s from here on (it was %s).", name, now[name], then[name])
    layout = [name for name in changed if re.search("^world_size$|zero_stage$|^per_device|accumulation", name)]
    if layout:
        what = [f"{'processes' if name == 'world_size' else f'--{name}'} {now[name]} (it was {then[name]})" for name in layout]
        stay = "" if set(args.allowed) & set(chain(*BATCH_FLAGS.values())) else "the global batch and the order of the data stay; "
        logger.info("%s: %sdropout draws other masks, and sums are rounded in another order.", ", ".join(what), stay)


def tell_sizes(folder: Path, manifest: dict[str, Any], now: dict[str, int]) -> bool:
    """Return whether batches have another size than those of a checkpoint; log a line then.

    Raises UserError if the place in the data, at which the new size begins, is not the checkpoint's.
    """
    then, since = manifest.get("sizes", now), now.get("since", 0)
    if since not in (then.get("since", 0), manifest["step"]):
        raise UserError(f"{folder} has another size of batches than the newer one, which is damaged; give --resume {folder}.")
    units = {"global_batch": "examples a step", "rollout": "prompts a rollout", "minibatch": "answers an optimizer step"}
    changed = [f"{now[one]} {unit} (it was {then[one]})" for one, unit in units.items() if one in now and now[one] != then[one]]
    if changed:
        place = f" epoch {now.get('epoch', 0)} goes on behind its first {now.get('seen', 0)} examples;"
        place = place if since == manifest["step"] else ""
        rate = "the learning rate goes on from its place in the whole schedule"
        logger.info("From here on %s:%s %s.", ", ".join(changed), place, rate)
    return bool(changed)
