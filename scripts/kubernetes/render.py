"""From a recipe and the flags of `render` to the values of the templates, and to the text of each file.

templates/ holds one template a kind of job, one for each document around the training, and pod.yaml.j2 with what they
share. docs/en/kubernetes.md says what the kinds want.
"""

from __future__ import annotations

import argparse
import math
import os.path
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from errors import UserError, refuse
from scripts.kubernetes.pod import STEP_OF, USUAL_FLAGS
from scripts.launch.options import find_recipe, read_recipe, split_words
from scripts.launch.platforms import ROOT, MachineKind, did_you_mean, platform_named
from steps import SECTIONS, STEPS, Step
from training.utils.flags.recipe import Recipe, recipe_file

KINDS = ("deepspeedjob", "pytorchjob", "trainjob", "mpijob")
ACCESS_MODES = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
TRAINER_VERSIONS = ("2.0", "2.1", "2.2", "2.3")
CODE, WORK = "/opt/sanbu", "/workspace"  # in the pod: the project in the image, the volume
PORT = 29517  # of the processes' first meeting; DeepSpeedJob and MPIJob, where no operator sets one
GRACE = 300  # seconds between SIGTERM and the end of a pod: a step that is asked to end saves a checkpoint first
SERVER_GIB = 4  # of the host, for a server without its model: Python, the libraries of a card and its context
LONGEST_NAME = 63 - len("-launcher-abcde")  # operators append to the name; a pod's may have 63 characters
NODE_LABEL, LABEL_FORM = r"([\w./-]+)=([\w.-]*)", "KEY=VALUE, as `kubectl get nodes --show-labels` shows them"
IMAGE = r"(?!.*:latest$).+(:[\w.-]+|@sha256:[0-9a-f]{64})"
ABOUT = {
    "1-storage.yaml": "the claim for data, models, output and caches",
    "2-download.yaml": "models and data sets of the hub to the claim (a token: secret huggingface, key token)",
    "4-tensorboard.yaml": "curves: kubectl port-forward service/NAME-tensorboard 6006:80",
    "5-chat.yaml": "a dialogue, on one card: kubectl attach -it deployment/NAME-chat",
    "6-serve.yaml": "the HTTP server, on one card (keys: secret NAME-serve, key api-key): http://NAME-serve:8000/v1",
}


def dns_name(text: str) -> str:
    """Return a name as Kubernetes takes it: small letters, digits, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def quantity(text: str | int | float) -> float:
    """Return a Kubernetes quantity as a number: 2 cores, 500m, 64Gi in bytes. Raise UserError for what is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|[KMGTPE]i?)?", str(text))
    if not match:
        raise UserError(f"{text!r} is no quantity of Kubernetes; write 64Gi, 2Ti, 500m or 8.")
    number, unit = float(match[1]), match[2] or ""
    if unit == "m":
        return number / 1000
    return number * (1024 if unit.endswith("i") else 1000) ** "-KMGTPE".index(unit[:1].upper() or "-")


def groups(flag: str, text: str, pattern: str, form: str) -> tuple[str, ...]:
    """Return the groups of a flag's value. Raise UserError that names the form for another one."""
    match = re.fullmatch(pattern, text)
    if not match:
        raise UserError(f"--{flag} {text}: write {form}.")
    return match.groups()


def toleration(text: str) -> dict[str, str]:
    """Return a toleration from KEY[=VALUE][:EFFECT]. Raise UserError for another form."""
    pattern = r"([\w./-]+)(?:=([\w.-]*))?(?::(NoSchedule|PreferNoSchedule|NoExecute))?"
    form = "KEY, KEY=VALUE or KEY=VALUE:EFFECT with NoSchedule, PreferNoSchedule or NoExecute"
    key, value, effect = groups("toleration", text, pattern, form)
    one = {"key": key, "operator": "Exists" if value is None else "Equal", "value": value, "effect": effect}
    return {name: word for name, word in one.items() if word is not None}


def check_settings(settings: argparse.Namespace) -> None:
    """Raise UserError for a value of `render` that Kubernetes or the kind of job does not take."""
    kind, version, image = settings.kind, settings.trainer_version, settings.image
    kinds, versions = ", ".join(KINDS), ", ".join(TRAINER_VERSIONS)
    refuse(kind not in KINDS, f"--kind {kind} is unknown{did_you_mean(kind, KINDS)}; use one of {kinds}.")
    for flag in ("name", "pvc", "namespace"):
        value = getattr(settings, flag) or ""
        refuse(
            value != dns_name(value) or len(value) > LONGEST_NAME,
            f"--{flag} {value}: Kubernetes takes small letters, digits and dashes, here at most {LONGEST_NAME} of them, "
            f"such as {dns_name(value)[:LONGEST_NAME]}.",
        )
    refuse(
        settings.pvc == "",
        "--pvc is empty: without a volume, models and checkpoints would be lost with their pod; name a claim.",
    )
    for flag, least in (("retries", 0), ("wait_minutes", 1), ("cpu", 1)):
        count = getattr(settings, flag)
        refuse(count is not None and count < least, f"--{flag.replace('_', '-')} {count}: give {least} or more.")
    for flag in ("pvc_size", "memory", "shm"):
        text = getattr(settings, flag)
        refuse(text is not None and not quantity(text), f"--{flag.replace('_', '-')} {text}: give more than nothing, such as 64Gi.")
    modes, mode = ", ".join(ACCESS_MODES), settings.access_mode
    refuse(mode not in ACCESS_MODES, f"--access-mode {mode} is unknown{did_you_mean(mode, ACCESS_MODES)}; use one of {modes}.")
    dotted, label = settings.storage_class, r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    refuse(
        dotted is not None and not re.fullmatch(rf"{label}(\.{label})*", dotted),
        f"--storage-class {dotted}: Kubernetes takes small letters, digits, dashes and dots; kubectl get storageclass lists them.",
    )
    wrong = image and not re.fullmatch(IMAGE, image)
    refuse(wrong, f"--image {image}: name a tag other than latest, or a restart may run other code.")
    ranked = settings.priority is not None
    if kind == "trainjob":
        unknown = version not in TRAINER_VERSIONS
        refuse(unknown, f"--trainer-version {version} is not known; use {versions} (2.3 for later ones).")
        refuse(
            settings.queue or ranked,
            "A TrainJob has no field for --queue or --priority; queueing systems read a label of theirs, so add that.",
        )
    refuse(
        kind in ("pytorchjob", "mpijob") and ranked,
        "--priority is a number for a DeepSpeedJob only; leave it out, and set a priorityClass by hand.",
    )


def make_job(settings: argparse.Namespace) -> SimpleNamespace:
    """Return the values of the templates for the flags of `render`. Raise UserError for a wrong value or recipe."""
    check_settings(settings)
    path = settings.recipe if recipe_file(settings.recipe) else str(find_recipe(settings.recipe))
    recipe, flags, model = Recipe(path, read_recipe(path)), split_words("--flags", settings.flags), Path(path).stem
    name = settings.name or dns_name(f"sanbu-{model}")
    unnamed, long = not recipe.launch.get("platform"), len(f"{name}-tensorboard") > LONGEST_NAME
    refuse(unnamed, f"{path}: no platform in the section launch; a manifest asks for its devices.")
    refuse(long, f"{name} is too long for a name that operators append to; give a shorter --name.")
    platform = platform_named(recipe.launch["platform"])
    host_paths = list(platform.kubernetes.get("host_paths") or [])
    steps = [step for step in STEPS if step.section in recipe.sections and step.section != "dpo"]
    folders = [recipe.output(step.section) for step in steps]
    return SimpleNamespace(
        settings=settings,
        recipe=recipe,
        platform=platform,
        flags=flags,
        steps=steps,  # without DPO, which takes the place of steps 2 and 3
        model=model,
        name=name,
        recipe_in_pod=settings.recipe_in_pod or image_path(path),
        log_folder=os.path.commonpath(folders) or ".",
        chat_folder=chat_folder(recipe, steps, model, platform),
        hub_words=hub_words(recipe),
        claim=settings.pvc or name,
        claim_size=settings.pvc_size or claim_size(model),
        image=settings.image or platform.kubernetes["image"],
        host_paths=host_paths,
        vendor_env=["bash", f"{CODE}/scripts/vendor_env.sh"] if host_paths else [],
        # Two kinds log in as root over ssh, and device files belong to groups of the host.
        root=settings.as_root or settings.kind in ("deepspeedjob", "mpijob") or bool(host_paths),
        node_selector=dict(groups("node-selector", one, NODE_LABEL, LABEL_FORM) for one in settings.node_selector),
        tolerations=list(map(toleration, settings.toleration)),
        work=WORK,
        code=CODE,
        port=PORT,
        grace=GRACE,
        **machine_values(settings, recipe, platform),
        **environments(settings, recipe, platform),
    )


def machine_values(settings: argparse.Namespace, recipe: Recipe, platform: MachineKind) -> dict[str, Any]:
    """Return devices, processes, nodes, cores and memory of a training pod. Raise UserError if /dev/shm is above memory."""
    on_cpu = platform.accelerator == "cpu"
    processes = int(recipe.launch.get("processes") or platform.devices)
    # Its share of seven eighths of the node, the rest is the system's; all of it on a CPU.
    share = min(1.0, processes / platform.devices) * (1 if on_cpu else 7 / 8)
    memory = max(2, int(platform.host_memory_gib * share))
    memory = int(quantity(settings.memory) // 2**30) if settings.memory else memory
    # 4 GiB a process for data workers and NCCL, 1 on a CPU; it counts into the memory limit.
    shm = settings.shm or f"{max(1, min((1 if on_cpu else 4) * processes, memory // 4))}Gi"
    above = quantity(shm) > memory * 2**30
    refuse(above, f"/dev/shm may hold {shm}, above the memory limit {memory}Gi that it counts into; lower --shm.")
    return {
        "processes": processes,
        "devices": platform.devices,
        "nodes": int(recipe.launch.get("num_nodes") or platform.nodes),
        "resource": None if on_cpu else settings.resource or platform.kubernetes.get("resource"),
        "cpu": settings.cpu or 4 * processes,
        "memory_gib": memory,
        "shm": shm,
    }


def environments(settings: argparse.Namespace, recipe: Recipe, platform: MachineKind) -> dict[str, dict[str, str]]:
    """Return the variables of all pods and of those that compute: folders, the platform's, the recipe's, which win."""
    base = {
        "PYTHONPATH": CODE,
        "PYTHONUNBUFFERED": "1",
        "HF_HOME": f"{WORK}/cache/huggingface",
        "SANBU_CACHE": f"{WORK}/cache/sanbu",
        "TORCH_EXTENSIONS_DIR": "/tmp/torch_extensions",
    }
    if platform.kubernetes.get("host_paths"):
        del base["PYTHONPATH"]  # vendors' toolkits add to it, and this would replace it; their images have a .pth file
    found = base | {"HF_HUB_OFFLINE": "1"} | platform.env  # all is downloaded; a missing model ends the step at once
    if int(recipe.launch.get("num_nodes") or platform.nodes) > 1:
        names = ("GLOO", "HCCL" if platform.accelerator == "npu" else "NCCL")
        found |= platform.env_several_nodes | {f"{name}_SOCKET_IFNAME": settings.interface for name in names}
    found |= recipe.launch.get("env") or {}
    found = {name: str(value).replace("${USER}", "sanbu") for name, value in found.items()}
    return {"base_env": base, "training_env": found}


def image_path(recipe: str) -> str:
    """Return where the image has a recipe. Raise UserError for one that is not under configs/."""
    path = Path(recipe).resolve()
    if not path.is_relative_to(ROOT / "configs"):
        raise UserError(
            f"--recipe {recipe} is not under configs/, which the image carries; move it there, or put it on the "
            f"volume and say where with --recipe-in-pod, such as {WORK}/{path.name}."
        )
    return f"{CODE}/{path.relative_to(ROOT).as_posix()}"


def billions(model: str) -> float | None:
    """Return the weights in units of 1e9 from a name (opt-1.3b, bloom-1b1); None where it does not say."""
    match = re.search(r"(?:^|[-_])(\d+(?:\.\d+)?)b(\d)?$", model.lower())
    return float(f"{match[1]}.{match[2]}" if match and match[2] else match[1]) if match else None


def claim_size(model: str) -> str:
    """Return 64 bytes a weight: two checkpoints (the old until the new is whole) of two models at 12, four models, and room."""
    size = billions(model)
    needed = 64 * size * 1e9 / 2**30 if size else 500
    return f"{max(100, -(-needed // 100) * 100):.0f}Gi"


def chat_folder(recipe: Recipe, steps: list[Step], model: str, platform: MachineKind) -> str | None:
    """Return the model to talk to; None where its weights do not leave a quarter of one device."""
    size = billions(model)
    if size and size * 2e9 / 2**30 >= 0.75 * platform.device_memory_gib:
        return None
    last = steps[-1].section
    return recipe.output("sft" if last == "reward" else last)


@cache
def served_bytes(model: str, dtype: str, attention: str) -> tuple[float, float] | None:
    """Return bytes of a model's weights, and of the keys and values of an answer that has the whole context; None for a model
    that scripts.plan does not know.
    """
    from scripts.plan.known import UnknownModel, config_of

    try:
        config = config_of(model)
    except UnknownModel:
        return None
    from inference.chatbot import context_length
    from models.device import DTYPES
    from models.sizes import SPARE_COLUMNS
    from training.utils.memory.footprint import Footprint

    network = Footprint(config, dtype=DTYPES[dtype], attn=attention)
    row = network.cache(1, context_length(config) + SPARE_COLUMNS) * (1 + 2 / network.blocks)  # a layer that grows is there twice
    return network.weights.total * DTYPES[dtype].itemsize + network.weights.integers, row


def server_needs(model: str, platform: MachineKind, batch: int, prompt_cache: int) -> tuple[int, int] | None:
    """Return GiB of host memory for a server, and the answers at a time that fit on its device, ``batch`` at most.

    The host holds the weights while they are loaded. The device, or on a CPU the host, also holds prompt_cache bytes and the KV
    cache of these answers. None for a model that is not known.
    """
    sizes = served_bytes(model, platform.dtype, platform.attention)
    if sizes is None:
        return None
    weights, row = sizes
    if platform.accelerator != "cpu":
        fitting = int((0.9 * platform.device_memory_gib * 2**30 - weights - prompt_cache) / row)
        return math.ceil(weights / 2**30) + SERVER_GIB, max(1, min(batch, fitting))
    return math.ceil((weights + prompt_cache + batch * row) / 2**30) + SERVER_GIB, batch


def server_values(job: SimpleNamespace) -> dict[str, Any]:
    """Return the memory and the further flags of the server. A model that is not known gets the memory of a dialogue."""
    from inference.server.__main__ import build_parser

    batch, megabytes = (build_parser().get_default(name) for name in ("max_batch", "prompt_cache"))
    needs = server_needs(job.recipe.model_of(job.chat_folder), job.platform, batch, int(megabytes * 2**20))
    if needs is None:
        return {"memory_gib": min(64, max(2, job.memory_gib // job.processes)), "more": []}
    return {"memory_gib": needs[0], "more": ["--max_batch", str(needs[1])] if needs[1] < batch else []}


def hub_words(recipe: Recipe) -> list[str]:
    """Return the words for `scripts.pod download`: models and data sets by id; files and other steps' output are left out."""
    from training.utils.data.named_sets import find_named_set
    from training.utils.data.readers import looks_local

    def by_id(value: str) -> bool:
        named = find_named_set(value)
        return not looks_local(value) and not (named and named.files)

    sections = [values for section, values in recipe.sections.items() if section in SECTIONS]
    made = {str(values.get("output_dir")) for values in sections}
    models = [str(value) for values in sections for key, value in values.items() if key.endswith("model_name_or_path")]
    models = [name for name in models if name not in made and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
    models = [name for name in dict.fromkeys(models) if not name.startswith(("output/", "models/"))]
    data = list(dict.fromkeys(str(one) for values in sections for one in values.get("data_path", []) if by_id(str(one))))
    return [*(["--model", *models] if models else []), *(["--dataset", *data] if data else [])]


@cache
def templates() -> Any:
    """Return the Jinja2 environment of the folder templates."""
    import jinja2
    import yaml

    def flow(value: Any) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, width=2**30, allow_unicode=True)
        return text.removesuffix("...\n").strip()

    def nindent(text: str, spaces: int) -> str:
        lines = [" " * spaces + line for line in text.splitlines() if line.strip()]
        return "".join(f"\n{line}" for line in lines)

    def block(value: Any, spaces: int) -> str:
        return nindent(yaml.safe_dump(value, sort_keys=False, width=2**30, allow_unicode=True), spaces)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"flow": flow, "nindent": nindent, "block": block, "shell": shlex.join, "dns": dns_name}
    return environment


def fill(job: SimpleNamespace, template: str, about: str, **values: Any) -> str:
    """Return a document as text, with two lines of comment that say what it is."""
    text = templates().get_template(f"{template}.yaml.j2").render(job=job, settings=job.settings, **values)
    return f"# {job.model}, {job.platform.title} ({job.settings.kind})\n# {about}\n{text.strip()}\n"


def training(job: SimpleNamespace, steps: list[Step], about: str) -> str:
    """Return the job that runs one step, or several in order. Raise UserError for a step that the recipe lacks."""
    for step in steps:
        job.recipe.output(step.section)
    component = steps[0].section if len(steps) == 1 else "train"
    words = [*job.vendor_env, "python", "-m", "scripts.pod", "run", "--workdir", WORK, "--recipe", job.recipe_in_pod]
    words += ["--step", *(step.choice for step in steps), "--wait-minutes", str(job.settings.wait_minutes)]
    words += [f"--flags={shlex.join(job.flags)}"] if job.flags else []
    values = {"steps": steps, "component": component, "full_name": f"{job.name}-{component}", "run_words": [*words, "--"]}
    values |= {"former": job.recipe.inputs(steps[0].section)}
    values |= {"step_flags": ["--config", job.recipe_in_pod, *USUAL_FLAGS, *job.flags]}
    return fill(job, job.settings.kind, about, **values)


def title(steps: list[Step]) -> str:
    """Return such as ``step 2 (reward model)``."""
    if len(steps) > 1:
        return f"steps {', '.join(step.choice for step in steps[:-1])} and {steps[-1].choice} in order"
    return f"step {steps[0].choice} ({steps[0].title})" if steps[0].choice.isdigit() else steps[0].title


def render(job: SimpleNamespace, choices: Sequence[str] = (), with_server: bool = True) -> dict[str, str]:
    """Return file name -> text. choices: steps of one job; none: everything, each step also as a job of its own.

    with_server: with the server's manifest, whose memory is planned: that imports torch and transformers, 3 s.
    """

    def alone(step: Step) -> dict[str, str]:
        about = f"{title([step])} alone; not beside 3-train.yaml, which writes to the same folders"
        name = f"step{step.choice}_{step.section}.yaml" if step.choice.isdigit() else f"{step.choice}.yaml"
        return {name: training(job, [step], about)}

    if choices:
        steps = [STEP_OF[choice] for choice in choices]
        return alone(*steps) if len(steps) == 1 else {"train.yaml": training(job, steps, "several steps in order")}
    served = job.chat_folder if with_server else None
    wanted = {"2-download.yaml": job.hub_words, "5-chat.yaml": job.chat_folder, "6-serve.yaml": served}
    files = {"3-train.yaml": training(job, job.steps, f"{title(job.steps)}; a step that is done is skipped")}
    for name, about in ABOUT.items():
        if wanted.get(name, True):
            values = server_values(job) if name == "6-serve.yaml" else {}
            files[name] = fill(job, name[2:-5], about.replace("NAME", job.name), **values)
    return dict(sorted(files.items())) | {f"steps/{name}": text for step in job.steps for name, text in alone(step).items()}
