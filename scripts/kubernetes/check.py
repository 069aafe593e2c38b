"""Find what is wrong with a manifest: by the schemas that others keep, then by rules that no schema knows.

kubernetes-validate knows the kinds of Kubernetes and, as a Pod, every pod template. schemas.yaml has the kinds of training
jobs, and rules of ours that a schema can say. No cluster is needed.
"""

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from errors import UserError, refuse
from scripts.kubernetes.render import quantity
from scripts.launch.platforms import did_you_mean
from steps import Step
from yaml_text import StrictLoader, parse_yaml

CORE = {"PersistentVolumeClaim": "v1", "Service": "v1", "Job": "batch/v1", "Deployment": "apps/v1"}
TRAINING = {
    "DeepSpeedJob": "batch.tensorstack.dev/v1beta1",
    "PyTorchJob": "kubeflow.org/v1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
    "MPIJob": "kubeflow.org/v2beta1",
}
PROCESSES = {
    "DeepSpeedJob": "config.slotsPerWorker",
    "PyTorchJob": "nprocPerNode",
    "TrainJob": "trainer.numProcPerNode",
    "MPIJob": "slotsPerWorker",
}


def check_file(path: Path) -> tuple[int, list[str]]:
    """Return the number of documents in a file, and a sentence for each thing that is wrong with them.

    Raise UserError for a file that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise UserError(f"{path}: {reason}; name a manifest or a folder with some.") from error
    # Kubernetes reads YAML 1.1: defaultMode: 0644 is octal there.
    documents = [one for one in parse_yaml(text, path, StrictLoader) if one is not None]
    sentences = [] if documents else [f"{path}: no document in it."]
    for number, document in enumerate(documents, 1):
        metadata = document.get("metadata") if isinstance(document, dict) else None
        title = f"{document.get('kind', '?')} {metadata.get('name', '')}" if isinstance(metadata, dict) else "?"
        sentences += [f"{path}, document {number} ({title}): {sentence}" for sentence in problems(document)]
    return len(documents), sentences


def problems(document: Any) -> list[str]:
    """Return what is wrong with a document. Wrong fields are told alone: the other rules read those fields.

    Raise UserError where the packages that know the schemas are missing.
    """
    if not isinstance(document, dict):
        return ["not a manifest; a document has apiVersion, kind, metadata and spec."]
    kind, version = document.get("kind"), document.get("apiVersion")
    known = CORE | TRAINING
    if version is None or known.get(str(kind)) != version:
        there = ", ".join(f"{kind} ({version})" for kind, version in known.items())
        return [f"apiVersion {version} with kind {kind} is not known here{did_you_mean(str(kind), known)}; known are {there}."]
    if not isinstance(document.get("metadata"), dict) or not isinstance(document.get("spec"), dict):
        return ["metadata and spec with their fields are needed."]
    try:
        own = schema_errors(own_schemas()[kind], document)
        try:
            found = [*wrong_fields(document), *own]
        except (AttributeError, TypeError, KeyError):  # no pods can be found where a number stands for a section
            found = own or ["spec: a section has a value of another type than its kind has."]
        if not found:
            found = [error for spec in pods(document) for error in schema_errors(own_schemas()["Pod"], spec)]
    except ImportError as error:
        raise UserError(f"check needs {error.name}: pip install kubernetes-validate jsonschema") from error
    return found or [sentence for spec in pods(document) for sentence in pod_problems(document, spec)]


def wrong_fields(document: dict[str, Any]) -> Iterator[str]:
    """Yield the fields of Kubernetes' own kinds and of pods that do not exist or have a value of the wrong type."""
    import kubernetes_validate

    wrapped = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec} for spec in pods(document)]
    for one in [document] if document["kind"] in CORE else wrapped:
        try:  # strict=False would let unknown fields pass
            kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            yield sentence_of(error)


def schema_errors(schema: dict[str, Any], value: Any) -> list[str]:
    """Return a sentence for each error of a JSON schema: its own ``say`` where it has one."""
    import jsonschema

    return [sentence_of(error) for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]


def sentence_of(error: Any) -> str:
    """Return a validation error as field and message, with a near name for a field that does not exist."""
    near = ""
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        near = "".join(did_you_mean(name, known) for name in error.instance if name not in known)
    return f"{error.json_path.removeprefix('$').lstrip('.')}: {error.schema.get('say') or error.message}{near}."


@cache
def own_schemas() -> dict[str, Any]:
    """Return the content of schemas.yaml."""
    import yaml

    return yaml.safe_load((Path(__file__).parent / "schemas.yaml").read_text(encoding="utf-8"))


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pod specs of a document. That of a TrainJob is what it adds to its runtime, with `trainer` as container."""
    spec, found = document["spec"], []

    def walk(value: Any) -> None:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for one in inner:
            if isinstance(one, dict) and isinstance(one.get("spec"), dict) and "containers" in one["spec"]:
                found.append(one["spec"])
            else:
                walk(one)

    if document["kind"] != "TrainJob":
        walk(spec)
        return found
    walk(spec.get("runtimePatches"))
    walk([spec.get("podTemplateOverrides")])
    found += [{key: value for key, value in one.items() if key != "targetJobs"} for one in spec.get("podSpecOverrides", [])]
    added = found[0] if found else {"containers": []}
    trainer = spec.get("trainer", {})
    main = {key: value for key, value in trainer.items() if key in ("image", "command", "args", "env")}
    main |= {"name": "node", "resources": trainer.get("resourcesPerNode", {})}
    for one in added["containers"]:
        main |= {key: value for key, value in one.items() if key not in main}
    return [{**added, "containers": [main]}]


def pod_problems(document: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    """Yield what shows only when fields of a pod are read together: volumes, devices, processes, memory."""
    containers = [*spec["containers"], *spec.get("initContainers", [])]
    volumes = {one["name"]: one for one in spec.get("volumes", [])}
    main = next((one for one in containers if one["name"] == "pytorch"), containers[0])
    mounts = {one["mountPath"].rstrip("/"): one["name"] for one in main.get("volumeMounts", [])}
    for name in {mount["name"] for one in containers for mount in one.get("volumeMounts", [])} - volumes.keys():
        yield f"mounts {name!r}, which is no volume of the pod{did_you_mean(name, volumes)}."
    if not any("persistentVolumeClaim" in volumes.get(name, {}) for name in mounts.values()):
        yield "no PVC is mounted, so models and checkpoints would be lost with the pod; add one to volumes and volumeMounts."
    try:
        requests, limits = (
            {name: quantity(value) for name, value in main.get("resources", {}).get(key, {}).items()}
            for key in ("requests", "limits")
        )
    except UserError as error:
        yield f"container {main['name']}: {error}"
        return
    for name in requests.keys() | limits.keys():
        if "/" in name and requests.get(name) != limits.get(name):
            yield f"{name} must be the same in requests and limits; found {requests.get(name)} and {limits.get(name)}."
    if document["kind"] in TRAINING and main["name"] != "launcher":
        yield from training_problems(document, volumes.get(mounts.get("/dev/shm", ""), {}), limits)


def training_problems(document: dict[str, Any], shared: dict[str, Any], limits: dict[str, float]) -> Iterator[str]:
    """Yield problems of a pod that trains: processes unlike devices, no memory limit, a /dev/shm too small or too large."""
    field = PROCESSES[document["kind"]]
    processes: Any = document["spec"]
    for key in field.split("."):
        processes = processes.get(key, {})
    devices = int(sum(count for name, count in limits.items() if "/" in name and not re.search("rdma|sriov", name)))
    if processes == {}:
        yield f"spec.{field} is missing; say how many processes a pod runs: one for each device."
    elif devices and str(processes) not in (str(devices), "auto", "gpu"):
        yield f"spec.{field} is {processes}, but a pod has {devices} devices in its limits; make them equal."
    memory = shared.get("emptyDir", {})
    if "memory" not in limits:
        yield "no memory in the limits; without one, offloading can take the node down. Give one."
    elif memory.get("medium") != "Memory":
        yield "/dev/shm has 64 MB, too little for data workers and NCCL; mount an emptyDir with medium Memory there."
    elif quantity(memory.get("sizeLimit", "8E")) > limits["memory"]:
        yield f"/dev/shm may hold {memory.get('sizeLimit', 'anything')}, above the memory limit that it counts into."


def check_memory(job: SimpleNamespace, step: Step) -> None:
    """Raise UserError if the memory limit of a pod is below what a step needs on a host with its /dev/shm."""
    from scripts.plan.section import UnknownModel, plan_section, platform_machine

    machine = platform_machine(job.platform, nodes=job.nodes, per_node=job.processes)
    try:
        planned = plan_section(job.recipe, step.section, job.platform, machine=machine, flags=job.flags)
    except UnknownModel:
        print(f"# step {step.choice}: its models are not known to scripts.plan, so memory is not checked", file=sys.stderr)
        return
    needed, shared = planned.plan.on_host / 2**30, quantity(job.shm) / 2**30
    refuse(
        needed + shared > job.memory_gib,
        f"step {step.choice} needs {needed:.0f} GiB on each host and {shared:.0f} GiB for /dev/shm, but a pod has "
        f"{job.memory_gib} GiB; give --memory {int(needed + shared) + 1}Gi or more, or see "
        f"python -m scripts.plan --config {job.recipe.path} --step {step.choice}.",
    )
