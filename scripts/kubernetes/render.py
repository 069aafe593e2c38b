"""The documents of a set of manifests: claim, downloads, training of one step or of all, TensorBoard, a dialogue.

Pure functions from a recipe and its settings to plain dictionaries; __main__.py writes them, checks.py
looks at them. What each kind wants: docs/en/kubernetes.md.
"""

from __future__ import annotations

import os.path
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.kubernetes.pod import MODULES, SECTIONS, USUAL_FLAGS, former_folders, output_folder
from scripts.launch.__main__ import read_recipe
from scripts.launch.platforms import ROOT, Platform, platform_named

KINDS = ("deepspeedjob", "pytorchjob", "trainjob", "mpijob")
TRAINER_VERSIONS = ("2.0", "2.1", "2.2", "2.3")
TITLES = {"sft": "supervised fine-tuning", "reward": "reward model", "ppo": "PPO", "dpo": "DPO"}
CODE, WORK = "/opt/sanbu", "/workspace"  # in the pod: the project in the image, the volume
PORT = 29517  # of the processes' first meeting; DeepSpeedJob and MPIJob, where no operator sets one
GRACE = 300  # seconds between SIGTERM and the end of a pod: a step that is asked to end saves a checkpoint first
LONGEST_NAME = 63 - len("-launcher-abcde")  # operators append to the name; a pod's may have 63 characters
Document = dict[str, Any]


class Words(list):
    """A list that YAML shows on one line: a command."""


@dataclass(frozen=True)
class Settings:
    """What the command line of `render` says; None: from the platform of the recipe."""

    kind: str
    recipe: str
    image: str | None = None
    pvc: str | None = None
    pvc_size: str | None = None
    access_mode: str = "ReadWriteMany"
    storage_class: str | None = None
    namespace: str | None = None
    name: str | None = None
    resource: str | None = None
    cpu: int | None = None  # cores of a training pod
    memory: str | None = None
    shm: str | None = None
    interface: str = "eth0"
    queue: str | None = None
    priority: int | None = None
    node_selector: Sequence[str] = ()  # KEY=VALUE
    toleration: Sequence[str] = ()  # KEY[=VALUE][:EFFECT]
    retries: int = 3
    wait_minutes: int = 10
    trainer_version: str = "2.2"
    runtime: str = "torch-distributed"
    as_root: bool = False
    recipe_in_pod: str | None = None
    flags: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Job:
    """A recipe with its settings, and what follows from them for every document."""

    settings: Settings

    @cached_property
    def recipe(self) -> dict[str, dict[str, Any]]:
        """The sections of the recipe."""
        return read_recipe(self.settings.recipe)

    @cached_property
    def platform(self) -> Platform:
        """The machine that the recipe is for."""
        name = self.recipe.get("launch", {}).get("platform")
        if not name:
            raise UserError(f"{self.settings.recipe}: no platform in the section launch; a manifest asks for its devices.")
        return platform_named(name)

    @property
    def processes(self) -> int:
        """Processes of a pod, one for each device."""
        return int(self.recipe.get("launch", {}).get("processes") or self.platform.devices)

    @property
    def nodes(self) -> int:
        """Pods that train."""
        return int(self.recipe.get("launch", {}).get("num_nodes") or self.platform.nodes)

    @property
    def model(self) -> str:
        """Such as opt-1.3b: what the recipe's file is called."""
        return Path(self.settings.recipe).stem

    @property
    def name(self) -> str:
        """What all names begin with."""
        return self.settings.name or dns_name(f"sanbu-{self.model}")

    @property
    def pvc(self) -> str:
        """The claim."""
        if self.settings.pvc == "":
            raise UserError("--pvc is empty: without a volume, models and checkpoints would be lost with their pod; name a claim.")
        return self.settings.pvc or self.name

    @property
    def image(self) -> str:
        """The image of all pods."""
        return self.settings.image or self.platform.kubernetes["image"]

    @property
    def resource(self) -> str | None:
        """The accelerator's name in limits; None on a CPU."""
        name = self.settings.resource or self.platform.kubernetes.get("resource")
        return None if self.platform.accelerator == "cpu" else name

    @property
    def host_paths(self) -> list[str]:
        """What a pod that trains takes from its host."""
        return list(self.platform.kubernetes.get("host_paths") or [])

    @property
    def vendor_env(self) -> list[str]:
        """What comes before a command where the vendor's toolkit sets variables that the image's own list cannot hold."""
        return ["bash", f"{CODE}/scripts/vendor_env.sh"] if self.host_paths else []

    @property
    def root(self) -> bool:
        """Whether pods run as root: two kinds log in as root over ssh, and device files belong to groups of the host."""
        return self.settings.as_root or self.settings.kind in ("deepspeedjob", "mpijob") or bool(self.host_paths)

    @property
    def recipe_in_pod(self) -> str:
        """Where the pod finds the recipe: in the image, unless told otherwise."""
        if self.settings.recipe_in_pod:
            return self.settings.recipe_in_pod
        path = Path(self.settings.recipe).resolve()
        if not path.is_relative_to(ROOT / "configs"):
            raise UserError(
                f"--recipe {self.settings.recipe} is not under configs/, which the image carries; move it there, or put it on the "
                f"volume and say where with --recipe-in-pod, such as {WORK}/{path.name}."
            )
        return f"{CODE}/{path.relative_to(ROOT).as_posix()}"

    @property
    def memory_gib(self) -> int:
        """Limit of a training pod, GiB: its share of seven eighths of the node, the rest is the system's; all of it on a CPU."""
        if self.settings.memory:
            return int(quantity(self.settings.memory) // 2**30)
        share = min(1.0, self.processes / self.platform.devices)
        return max(2, int(self.platform.host_memory_gib * (7 / 8 if self.resource else 1) * share))

    @property
    def shm(self) -> str:
        """Size of /dev/shm, which counts into the memory limit: 4 GiB a process for data workers and NCCL, 1 on a CPU."""
        wanted = (4 if self.resource else 1) * self.processes
        return self.settings.shm or f"{max(1, min(wanted, self.memory_gib // 4))}Gi"

    @property
    def billions(self) -> float | None:
        """Weights in units of 1e9, from the recipe's name (opt-1.3b, bloom-1b1); None where it does not say."""
        match = re.search(r"(?:^|[-_])(\d+(?:\.\d+)?)b(\d)?$", self.model.lower())
        return float(f"{match[1]}.{match[2]}" if match and match[2] else match[1]) if match else None

    @property
    def pvc_size(self) -> str:
        """Of the claim. 64 bytes a weight: two checkpoints (the old until the new is whole) of two models at 14, four models."""
        if self.settings.pvc_size:
            quantity(self.settings.pvc_size)
            return self.settings.pvc_size
        needed = 64 * self.billions * 1e9 / 2**30 if self.billions else 500
        return f"{max(100, -(-needed // 100) * 100):.0f}Gi"

    @property
    def fits_one_card(self) -> bool:
        """Whether the weights alone leave a quarter of one device for a dialogue; True where the size is not known."""
        return self.billions is None or self.billions * 2e9 / 2**30 < 0.75 * self.platform.device_memory_gib

    def steps(self) -> list[str]:
        """The steps that the recipe has, without DPO, which takes the place of steps 2 and 3."""
        return [step for step, section in SECTIONS.items() if section in self.recipe and section != "dpo"]

    def folder(self, section: str) -> str:
        """Where a step writes."""
        return output_folder(self.recipe, section, self.settings.recipe)


# --- parts of pods -----------------------------------------------------------------------------------------------------


def dns_name(text: str) -> str:
    """A name as Kubernetes takes it: small letters, digits, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number: 2 cores, 500m, 64Gi in bytes. UserError for what is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|[KMGTPE]i?)?", str(text))
    if not match:
        raise UserError(f"{text!r} is no quantity of Kubernetes; write 64Gi, 2Ti, 500m or 8.")
    number, unit = float(match[1]), match[2] or ""
    if unit == "m":
        return number / 1000
    return number * (1024 if unit.endswith("i") else 1000) ** "-KMGTPE".index(unit[:1].upper() or "-")


def metadata(job: Job, name: str, component: str) -> Document:
    """Name, namespace and labels of a document."""
    full = f"{job.name}-{name}" if name else job.name
    found: Document = {"name": full}
    if job.settings.namespace:
        found["namespace"] = job.settings.namespace
    return {**found, "labels": labels(job, component)}


def labels(job: Job, component: str) -> dict[str, str]:
    """What `kubectl get -l` asks for."""
    return {
        "app.kubernetes.io/name": "sanbu",
        "app.kubernetes.io/instance": job.name,
        "app.kubernetes.io/component": component,
    }


def environment(job: Job, training: bool = True) -> list[Document]:
    """The variables of a pod: where things lie, then the platform's and the recipe's, which win in this order."""
    found = {
        # The images of vendors find the project by a .pth file: their toolkit adds to PYTHONPATH, and this would replace it.
        **({} if job.vendor_env else {"PYTHONPATH": CODE}),
        "PYTHONUNBUFFERED": "1",
        "HF_HOME": f"{WORK}/cache/huggingface",
        "SANBU_CACHE": f"{WORK}/cache/sanbu",
        "TORCH_EXTENSIONS_DIR": "/tmp/torch_extensions",
    }
    if training:
        found["HF_HUB_OFFLINE"] = "1"  # the download job has fetched all; a missing model ends the step at once
        found |= job.platform.env
        if job.nodes > 1:
            found |= job.platform.env_several_nodes
            names = ["GLOO", "HCCL" if job.platform.accelerator == "npu" else "NCCL"]
            found |= {f"{name}_SOCKET_IFNAME": job.settings.interface for name in names}
        found |= job.recipe.get("launch", {}).get("env") or {}
    return [{"name": name, "value": str(value).replace("${USER}", "sanbu")} for name, value in found.items()]


def user(job: Job) -> Document:
    """Who the processes of a pod are."""
    if job.root:
        return {"runAsUser": 0}
    # OnRootMismatch: not every file of a full volume is touched before each start.
    group = {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"}
    return {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, **group}


def rights(job: Job, training: bool) -> Document:
    """What a container may do beyond that. IPC_LOCK, to pin memory for RDMA, counts for root only."""
    if not job.root:
        return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {"capabilities": {"add": ["IPC_LOCK"]}} if training and job.resource else {"allowPrivilegeEscalation": False}


def resources(job: Job, accelerators: int, memory_gib: int, cpu: int) -> Document:
    """Requests and limits; memory and accelerators the same in both, cores up to twice the request."""
    devices = {job.resource: str(accelerators)} if job.resource and accelerators else {}
    return {
        "requests": {"cpu": str(cpu), "memory": f"{memory_gib}Gi", **devices},
        "limits": {"cpu": str(2 * cpu), "memory": f"{memory_gib}Gi", **devices},
    }


def placement(job: Job) -> Document:
    """Which nodes pods with cards go to. UserError for a label or taint that is none."""
    selector, tolerations = {}, []
    for text in job.settings.node_selector:
        match = re.fullmatch(r"([\w./-]+)=([\w.-]*)", text)
        if not match:
            raise UserError(f"--node-selector {text}: write KEY=VALUE, as `kubectl get nodes --show-labels` shows them.")
        selector[match[1]] = match[2]
    for text in job.settings.toleration:
        match = re.fullmatch(r"([\w./-]+)(?:=([\w.-]*))?(?::(NoSchedule|PreferNoSchedule|NoExecute))?", text)
        if not match:
            raise UserError(
                f"--toleration {text}: write KEY, KEY=VALUE or KEY=VALUE:EFFECT with NoSchedule, PreferNoSchedule or NoExecute."
            )
        key, value, effect = match.groups()
        one = {"key": key, "operator": "Exists"} if value is None else {"key": key, "operator": "Equal", "value": value}
        tolerations.append(one | ({"effect": effect} if effect else {}))
    return ({"nodeSelector": selector} if selector else {}) | ({"tolerations": tolerations} if tolerations else {})


def training_resources(job: Job) -> Document:
    """Of a pod that trains: all its devices, four cores for each."""
    return resources(job, job.processes, job.memory_gib, job.settings.cpu or 4 * job.processes)


def volumes(job: Job, devices: bool = True) -> tuple[list[Document], list[Document]]:
    """Volumes and their mounts: the claim, shared memory, and of the host what its cards need."""
    found = [
        ({"name": "work", "persistentVolumeClaim": {"claimName": job.pvc}}, {"mountPath": WORK}),
        ({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shm}}, {"mountPath": "/dev/shm"}),
    ]
    for path in job.host_paths if devices else []:
        rest = {"mountPath": path} if path.startswith("/dev/") else {"mountPath": path, "readOnly": True}
        found.append(({"name": dns_name(f"host{path}"), "hostPath": {"path": path}}, rest))
    return [volume for volume, _ in found], [{"name": volume["name"], **mount} for volume, mount in found]


def container(job: Job, name: str, command: list[str] | None, **rest: Any) -> Document:
    """A container of our image that works on the volume."""
    return {
        "name": name,
        "image": job.image,
        "imagePullPolicy": "IfNotPresent",
        "workingDir": WORK,
        **({"command": Words(command)} if command else {}),
        **rest,
    }


def training_pod(job: Job, name: str, command: list[str] | None, **rest: Any) -> Document:
    """The pod template of a training job; rest: more fields of the container."""
    found, mounts = volumes(job)
    main = container(
        job, name, command, env=environment(job), securityContext=rights(job, training=True),
        resources=training_resources(job), volumeMounts=mounts, **rest,
    )  # fmt: skip
    return {
        **placement(job),
        "securityContext": user(job),
        "terminationGracePeriodSeconds": GRACE,
        "containers": [main],
        "volumes": found,
    }


def waiting(job: Job, folders: list[str]) -> Document:
    """An initContainer that ends when the folders are done, or fails after the time limit and gives the devices back."""
    command = ["python", "-m", "scripts.pod", "wait", "--minutes", str(job.settings.wait_minutes), "--folder", *folders]
    return container(
        job, "former-step", command,
        env=environment(job, training=False), securityContext=rights(job, training=False),
        resources=resources(job, 0, 1, 1), volumeMounts=[{"name": "work", "mountPath": WORK}],
    )  # fmt: skip


def helper_pod(job: Job, main: Document, restart: str, devices: bool = False) -> Document:
    """The pod of what surrounds training: no token of the cluster, the claim, cards only where they are used."""
    found, mounts = volumes(job, devices)
    if not devices:
        found, mounts = found[:1], mounts[:1]
    main = {**main, "securityContext": rights(job, training=False), "volumeMounts": mounts}
    return {
        **(placement(job) if devices else {}),
        "restartPolicy": restart,
        "automountServiceAccountToken": False,
        "securityContext": user(job),
        "containers": [main],
        "volumes": found,
    }


# --- documents around the training ------------------------------------------------------------------------------------


def storage(job: Job) -> list[Document]:
    """The claim for data, models, output and caches."""
    spec: Document = {"accessModes": [job.settings.access_mode], "resources": {"requests": {"storage": job.pvc_size}}}
    if job.settings.storage_class:
        spec["storageClassName"] = job.settings.storage_class
    described = {**metadata(job, "", "storage"), "name": job.pvc}
    return [{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": described, "spec": spec}]


def from_the_hub(job: Job) -> tuple[list[str], list[str]]:
    """Models and data sets that the recipe's steps fetch by id; files, folders and other steps' output are left out."""
    from training.utils.data.named_sets import find_named_set
    from training.utils.data.readers import data_suffix

    def by_id(value: str) -> bool:
        named = find_named_set(value)
        local = value.startswith((".", "/", "~")) or value.count("/") > 1 or data_suffix(Path(value))
        return not local and not (named and named.local)

    steps = [values for section, values in job.recipe.items() if section in MODULES]
    made = {str(values.get("output_dir")) for values in steps}
    models = [str(value) for values in steps for key, value in values.items() if key.endswith("model_name_or_path")]
    data = [str(one) for values in steps for one in values.get("data_path", [])]
    models = [name for name in models if name not in made and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
    models = [name for name in models if not name.startswith(("output/", "models/"))]
    return list(dict.fromkeys(models)), [name for name in dict.fromkeys(data) if by_id(name)]


def downloads(job: Job) -> list[Document]:
    """A Job that fetches models and data sets to the claim; nothing if the recipe names none of the hub."""
    models, data = from_the_hub(job)
    if not models and not data:
        return []
    words = ["python", "-m", "scripts.pod", "download", "--workdir", WORK]
    words += ["--model", *models] if models else []
    words += ["--dataset", *data] if data else []
    token = {"secretKeyRef": {"name": "huggingface", "key": "token", "optional": True}}
    main = container(
        job, "download", words,
        env=[*environment(job, training=False), {"name": "HF_TOKEN", "valueFrom": token}],
        resources=resources(job, 0, 16, 2),
    )  # fmt: skip
    template = {"metadata": {"labels": labels(job, "download")}, "spec": helper_pod(job, main, "OnFailure")}
    spec = {"backoffLimit": job.settings.retries, "template": template}
    return [{"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata(job, "download", "download"), "spec": spec}]


def deployment(job: Job, name: str, pod: Document) -> Document:
    """One pod that is kept running. Recreate: a claim of one node cannot be mounted by the old and the new one."""
    select = labels(job, name)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(job, name, name),
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": select},
            "template": {"metadata": {"labels": select}, "spec": pod},
        },
    }


def tensorboard(job: Job) -> list[Document]:
    """The curves of all steps, inside the cluster only: TensorBoard asks nobody for a password."""
    folders = [job.folder(SECTIONS[step]) for step in job.steps()]
    logs = os.path.commonpath(folders) if len(folders) > 1 else folders[0]
    words = ["tensorboard", "--logdir", logs or ".", "--host", "0.0.0.0", "--port", "6006"]
    main = container(
        job, "tensorboard", words, env=environment(job, training=False), resources=resources(job, 0, 4, 1),
        ports=[{"name": "http", "containerPort": 6006}],
        readinessProbe={"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 10},
    )  # fmt: skip
    pod = helper_pod(job, main, "Always")
    pod["containers"][0]["volumeMounts"] = [{"name": "work", "mountPath": WORK, "readOnly": True}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(job, "tensorboard", "tensorboard"),
        "spec": {
            "type": "ClusterIP",
            "selector": labels(job, "tensorboard"),
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }
    return [deployment(job, "tensorboard", pod), service]


def chat(job: Job) -> list[Document]:
    """A pod with one card in which chat.py waits for `kubectl attach -it`; nothing for a model that one card cannot hold."""
    if not job.fits_one_card:
        return []
    last = SECTIONS[job.steps()[-1]]
    folder = job.folder("sft" if last == "reward" else last)
    # With /dev/dri a container sees every card of the host, so no other pod may be given one of them.
    cards = job.platform.devices if "/dev/dri" in job.host_paths else 1
    main = container(
        job, "chat", [*job.vendor_env, "python", f"{CODE}/chat.py", "--path", folder],
        stdin=True, tty=True, env=environment(job),
        resources=resources(job, cards, min(64, max(2, job.memory_gib // job.processes)), 4 if job.resource else 1),
    )  # fmt: skip
    pod = helper_pod(job, main, "Always", devices=True)
    return [deployment(job, "chat", {**pod, "initContainers": [waiting(job, [folder])]})]


def step_flags(job: Job) -> list[str]:
    """What every step is given besides its recipe."""
    return ["--config", job.recipe_in_pod, *USUAL_FLAGS, *job.settings.flags]


def in_pod(job: Job, steps: list[str], launcher: list[str]) -> list[str]:
    """The command of scripts.kubernetes.pod that runs steps under a launcher."""
    words = [*job.vendor_env, "python", "-m", "scripts.pod", "run", "--workdir", WORK]
    words += ["--recipe", job.recipe_in_pod, "--step", *steps, "--wait-minutes", str(job.settings.wait_minutes)]
    words += [f"--flags={shlex.join(job.settings.flags)}"] if job.settings.flags else []
    return [*words, "--", *launcher]


def formers(job: Job, step: str) -> list[str]:
    """Folders that have to be done before a step."""
    return former_folders(job.recipe, SECTIONS[step])
