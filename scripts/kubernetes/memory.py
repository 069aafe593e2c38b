"""Does the memory limit of a training pod hold what the memory plan says the step takes on a host?"""

from __future__ import annotations

import sys
import warnings

from errors import UserError
from scripts.kubernetes.pod import SECTIONS
from scripts.kubernetes.render import Job, quantity


def host_gib(job: Job, step: str) -> float | None:
    """GiB that a step takes on one host, /dev/shm not counted; None where a model is neither known nor here.

    The models of earlier steps, which do not exist yet, are planned as what those steps start from.
    """
    from models.device import DTYPES
    from scripts.plan.__main__ import config_of
    from training.utils.flags.parse import parse
    from training.utils.flags.steps import STEPS
    from training.utils.memory.arithmetic import Machine
    from training.utils.memory.fit import StepMemory

    section = SECTIONS[step]
    args = parse(next(one for one in STEPS if one.section == section), ["--config", job.settings.recipe, *job.settings.flags])
    paths = dict(getattr(args, "models", {})) or {"model": args.model_name_or_path}
    if getattr(args, "ref_model_name_or_path", None):
        paths["reference"] = args.ref_model_name_or_path
    try:
        configs = {role: config_of(starting_point(job, str(path))) for role, path in paths.items()}
    except UserError:
        return None
    platform = job.platform
    machine = Machine(
        job.nodes * job.processes, job.processes, platform.device_memory_gib * 2**30, platform.host_memory_gib * 2**30,
        accelerator=platform.accelerator != "cpu",
    )  # fmt: skip
    dtype = platform.dtype if args.dtype == "auto" else args.dtype
    attention = platform.attention if args.attn_implementation == "auto" else args.attn_implementation
    memory = StepMemory(args, configs, dtype=DTYPES[dtype], attn=attention)
    with warnings.catch_warnings():  # newer names of what models on the meta device are asked to do
        warnings.simplefilter("ignore", FutureWarning)
        return memory.plan(memory.setting, machine).on_host / 2**30


def starting_point(job: Job, model: str) -> str:
    """The model that a folder of an earlier step was made from, as the recipe says."""
    for section in ("sft", "reward", "dpo"):
        values = job.recipe.get(section, {})
        if str(values.get("output_dir")) == model and str(values.get("model_name_or_path")) != model:
            return starting_point(job, str(values["model_name_or_path"]))
    return model


def check_memory(job: Job, steps: list[str]) -> None:
    """UserError if the limit is below what a step needs with its /dev/shm."""
    for step in steps:
        needed = host_gib(job, step)
        if needed is None:
            print(f"# step {step}: its models are not known to scripts.plan, so the memory limit is not checked", file=sys.stderr)
            continue
        shared = quantity(job.shm) / 2**30
        if needed + shared > job.memory_gib:
            raise UserError(
                f"step {step} needs {needed:.0f} GiB on each host and {shared:.0f} GiB for /dev/shm, but a pod has "
                f"{job.memory_gib} GiB; give --memory {int(needed + shared) + 1}Gi or more, or see "
                f"python -m scripts.plan --config {job.settings.recipe} --step {step}."
            )
