"""What is wrong with a manifest: fields that do not exist, types, and what only shows when fields are read together.

A cluster drops an unknown field or refuses it, and starts a pod whose processes, devices and memory do not belong
together; each sentence here says what was found, what was expected and what to do. Needs no cluster and no schemas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.kubernetes.fields import METADATA, SPECS, Shape
from scripts.kubernetes.render import quantity
from scripts.launch.platforms import did_you_mean

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
# The longest that an operator or controller appends to a document's name; a pod's name and host name have 63 characters.
SUFFIXES = {
    "DeepSpeedJob": "-worker-99", "PyTorchJob": "-worker-99", "MPIJob": "-launcher-abcde", "TrainJob": "-node-0-99-abcde",
    "Job": "-abcde", "Deployment": "-0123456789-abcde",
}  # fmt: skip
TRAINING = ("DeepSpeedJob", "PyTorchJob", "TrainJob", "MPIJob")
# Where operators mount or write files of their own.
RESERVED = {
    "DeepSpeedJob": ("/root/.ssh", "/t9k/hostfile", "/root/.deepspeed_env"),
    "MPIJob": ("/root/.ssh", "/etc/mpi"),
}
# Set by operators and launchers for each process; a value of the pod would be the same for all.
OF_THE_LAUNCHER = re.compile(r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|PET_.*|OMPI_MCA_.*)")
PLAIN = {"str": str, "int": int, "bool": bool}
SAID = {"str": "a text", "int": "a whole number", "bool": "true or false", "quantity": "a quantity such as 64Gi or 8"}


@dataclass(frozen=True)
class Pod:
    """One kind of pod of a document. trains: it is one that gets the devices, and main is its container."""

    place: str
    spec: dict[str, Any]
    main: dict[str, Any]
    trains: bool = False


def check_file(path: Path) -> tuple[int, list[str]]:
    """Number of documents in a file, and what is wrong with them."""
    import yaml

    try:
        documents = [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one is not None]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a manifest or a folder with some.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error}).") from error
    if not documents:
        return 0, [f"{path}: no document in it."]
    found = []
    for number, document in enumerate(documents, 1):
        name = document.get("metadata", {}).get("name", "") if isinstance(document, dict) else ""
        kind = document.get("kind", "?") if isinstance(document, dict) else "?"
        found += [f"{path}, document {number} ({kind} {name}): {sentence}" for sentence in problems(document)]
    return len(documents), found


def problems(document: Any) -> list[str]:
    """What is wrong with one document, a sentence each. Wrong fields are told alone: the other rules read those fields."""
    if not isinstance(document, dict):
        return ["not a manifest; a document has apiVersion, kind, metadata and spec."]
    key = (document.get("apiVersion"), document.get("kind"))
    if key not in SPECS:
        known = [f"{kind} ({version})" for version, kind in SPECS]
        near = did_you_mean(str(key[1]), [kind for _, kind in SPECS])
        return [f"apiVersion {key[0]} with kind {key[1]} is not known here{near}; known are {', '.join(known)}."]
    shape = {"apiVersion": "str", "kind": "str", "metadata": METADATA, "spec": SPECS[key], "status": "any"}
    if found := list(misshapen(document, shape, "")):
        return found
    if not document.get("metadata", {}).get("name") or not document.get("spec"):
        return ["metadata.name and spec are needed."]
    found = list(bad_names(document))
    pods = list(pods_of(document))
    for pod in pods:
        found += bad_pod(pod, document["kind"])
    if document["kind"] in TRAINING:
        found += bad_training(document, pods)
    return found


def misshapen(value: Any, shape: Shape, place: str) -> Iterator[str]:
    """Sentences for fields that do not exist and values of the wrong type."""
    if shape == "any":
        return
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{place}: expected fields, found {value!r}."
            return
        for name, inner in value.items():
            inside = f"{place}.{name}".lstrip(".")
            if name not in shape and "*" not in shape:
                yield f"{inside}: no such field{did_you_mean(name, shape)}; there are {', '.join(shape)}."
            else:
                yield from misshapen(inner, shape.get(name, shape.get("*")), inside)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{place}: expected a list, found {value!r}."
            return
        for index, inner in enumerate(value):
            yield from misshapen(inner, shape[0], f"{place}[{index}]")
    elif shape == "quantity":
        try:
            quantity(value)
        except UserError:
            yield f"{place}: {value!r} is no quantity; write 64Gi, 500m or 8."
    elif shape == "port":
        if not isinstance(value, (int, str)) or isinstance(value, bool):
            yield f"{place}: expected a port's number or name, found {value!r}."
    elif not isinstance(value, PLAIN[shape]) or (shape == "int" and isinstance(value, bool)):
        hint = "; put it in quotes" if shape == "str" and isinstance(value, (int, float, bool)) else ""
        yield f"{place}: expected {SAID[shape]}, found {value!r}{hint}."


def bad_names(document: dict[str, Any]) -> Iterator[str]:
    """Names that Kubernetes refuses, now or when an operator has appended to them."""
    described = document["metadata"]
    for field in ("name", "namespace"):
        if field in described and not LABEL.fullmatch(described[field]):
            yield f"metadata.{field} {described[field]!r}: small letters, digits and dashes only (DNS-1123)."
    longest = 63 - len(SUFFIXES.get(document["kind"], ""))
    if len(described["name"]) > longest:
        yield f"metadata.name has {len(described['name'])} characters; its pods append to it, so {longest} at most."


def pods_of(document: dict[str, Any]) -> Iterator[Pod]:
    """The pods that a document leads to."""
    kind, spec = document["kind"], document["spec"]
    if kind == "DeepSpeedJob":
        inner = pod_spec(spec.get("worker", {}))
        containers = inner.get("containers") or [{}]
        main = next((one for one in containers if one.get("name") == "worker"), containers[0])
        yield Pod("worker", inner, main, trains=True)
    elif kind in ("PyTorchJob", "MPIJob"):
        for role, replica in spec.get("pytorchReplicaSpecs" if kind == "PyTorchJob" else "mpiReplicaSpecs", {}).items():
            inner = pod_spec(replica)
            containers = inner.get("containers") or [{}]
            named = [one for one in containers if one.get("name") == "pytorch"] if kind == "PyTorchJob" else []
            yield Pod(role, inner, (named or containers)[0], trains=role != "Launcher")
    elif kind == "TrainJob":
        yield patched_pod(spec)
    elif "template" in spec:
        inner = pod_spec(spec)
        yield Pod("template", inner, (inner.get("containers") or [{}])[0])


def pod_spec(holder: dict[str, Any]) -> dict[str, Any]:
    """The pod inside a template."""
    return holder.get("template", {}).get("spec", {})


def patched_pod(spec: dict[str, Any]) -> Pod:
    """The pod of a TrainJob: what `trainer` says and what its patches add to the container named node."""
    patch: dict[str, Any] = {}
    for one in spec.get("runtimePatches", []):
        for replicated in one.get("trainingRuntimeSpec", {}).get("template", {}).get("spec", {}).get("replicatedJobs", []):
            if replicated.get("name") == "node":
                patch = pod_spec(replicated.get("template", {}).get("spec", {}))
    for one in spec.get("podTemplateOverrides", []):
        patch = one.get("spec", {})
    for one in spec.get("podSpecOverrides", []):
        patch = one
    trainer = spec.get("trainer", {})
    added = next((one for one in patch.get("containers", []) if one.get("name") == "node"), {})
    main = {"name": "node", **{key: trainer[key] for key in ("image", "command", "args", "env") if key in trainer}}
    main |= {"resources": trainer.get("resourcesPerNode", {}), "volumeMounts": added.get("volumeMounts", [])}
    return Pod("trainer", {"containers": [main], "volumes": patch.get("volumes", [])}, main, trains=True)


def bad_pod(pod: Pod, kind: str) -> Iterator[str]:
    """Rules of every pod: containers, images, variables, volumes, resources."""
    if not pod.spec.get("containers"):
        yield f"{pod.place}: no containers."
        return
    names = [volume.get("name") for volume in pod.spec.get("volumes", [])]
    claims = {one["name"] for one in pod.spec.get("volumes", []) if one.get("persistentVolumeClaim", {}).get("claimName")}
    for one in [*pod.spec["containers"], *pod.spec.get("initContainers", [])]:
        place = f"{pod.place}, container {one.get('name', '?')}"
        if not LABEL.fullmatch(one.get("name", "")):
            yield f"{place}: a container needs a name of small letters, digits and dashes."
        image = one.get("image", "")
        tag = image.rpartition("/")[2].partition(":")[2]
        if not image or (not (tag and tag != "latest") and "@sha256:" not in image):
            yield f"{place}: image {image!r}; name one with a tag other than latest, or a restart may run other code."
        variables = [variable.get("name", "") for variable in one.get("env", [])]
        for name in variables:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                yield f"{place}: {name!r} is no name of a variable."
            elif OF_THE_LAUNCHER.fullmatch(name) and kind in TRAINING:
                yield f"{place}: the variable {name} is set for each process by the operator or launcher; take it out."
        if twice := {name for name in variables if variables.count(name) > 1}:
            yield f"{place}: {', '.join(sorted(twice))} is set twice; keep one."
        yield from bad_mounts(one, names, place, RESERVED.get(kind, ()))
        yield from bad_resources(one.get("resources", {}), place)
    mounted = {mount.get("name") for mount in pod.main.get("volumeMounts", [])}
    if not claims & mounted:
        yield (
            f"{pod.place}: no PVC is mounted in container {pod.main.get('name', '?')}, so models and checkpoints would be lost "
            "with the pod; add a persistentVolumeClaim to volumes and volumeMounts."
        )


def bad_mounts(one: dict[str, Any], names: list[str], place: str, reserved: tuple[str, ...]) -> Iterator[str]:
    """Mounts without volume, twice at one path, or where the operator puts files of its own."""
    paths = [mount.get("mountPath", "").rstrip("/") for mount in one.get("volumeMounts", [])]
    for mount in one.get("volumeMounts", []):
        path = mount.get("mountPath", "")
        if mount.get("name") not in names:
            yield f"{place}: mounts {mount.get('name')!r}, which is no volume of the pod{did_you_mean(mount.get('name'), names)}."
        if not path.startswith("/"):
            yield f"{place}: mountPath {path!r} is not absolute."
        for taken in reserved:
            if f"{path.rstrip('/')}/".startswith(f"{taken}/") or taken.startswith(f"{path.rstrip('/')}/"):
                yield f"{place}: a mount at {path} hides {taken}, which the operator needs; mount it elsewhere."
    if twice := {path for path in paths if paths.count(path) > 1}:
        yield f"{place}: two mounts at {', '.join(sorted(twice))}."


def bad_resources(resources: dict[str, Any], place: str) -> Iterator[str]:
    """Requests above limits; accelerators that are not the same whole number in both."""
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for name in dict.fromkeys([*requests, *limits]):
        if "/" in name:
            if name not in limits or (name in requests and quantity(requests[name]) != quantity(limits[name])):
                yield (
                    f"{place}: {name} is {requests.get(name)} in requests and {limits.get(name)} in limits; an accelerator must "
                    "be the same in both."
                )
            elif not quantity(limits[name]).is_integer() or quantity(limits[name]) < 1:
                yield f"{place}: {limits[name]} of {name}; whole devices only."
        elif name in requests and name in limits and quantity(requests[name]) > quantity(limits[name]):
            yield f"{place}: requests {requests[name]} of {name}, above its limit {limits[name]}."


def accelerators(container: dict[str, Any]) -> int:
    """Devices in the limits; network adapters (rdma/…) are none."""
    limits = container.get("resources", {}).get("limits", {})
    devices = [count for name, count in limits.items() if "/" in name and not re.search("rdma|sriov", name)]
    return int(sum(map(quantity, devices)))


def bad_training(document: dict[str, Any], pods: list[Pod]) -> Iterator[str]:
    """Rules of training jobs: processes, devices, memory, the way they find each other."""
    kind, spec = document["kind"], document["spec"]
    training = [pod for pod in pods if pod.trains]
    if not training:
        yield "no pods that train; add their replicas."
        return
    field, processes = {
        "DeepSpeedJob": ("spec.config.slotsPerWorker", spec.get("config", {}).get("slotsPerWorker")),
        "PyTorchJob": ("spec.nprocPerNode", spec.get("nprocPerNode")),
        "TrainJob": ("spec.trainer.numProcPerNode", spec.get("trainer", {}).get("numProcPerNode")),
        "MPIJob": ("spec.slotsPerWorker", spec.get("slotsPerWorker")),
    }[kind]
    for pod in training:
        devices = accelerators(pod.main)
        if processes is None:
            yield f"{field} is missing; say how many processes a pod runs: one for each of its {devices or 'shares of the cores'}."
        elif devices and str(processes) != str(devices) and processes not in ("auto", "gpu"):
            yield f"{field} is {processes}, but {pod.place} has {devices} devices in its limits; make them equal."
        yield from bad_memory(pod)
    yield from {
        "DeepSpeedJob": bad_deepspeed_job, "PyTorchJob": bad_pytorch_job, "TrainJob": bad_train_job, "MPIJob": bad_mpi_job,
    }[kind](spec, training)  # fmt: skip


def bad_memory(pod: Pod) -> Iterator[str]:
    """No limit, or a /dev/shm that is missing, without limit or above the pod's."""
    limit = pod.main.get("resources", {}).get("limits", {}).get("memory")
    if limit is None:
        yield f"{pod.place}: no memory in its limits; without one, offloading can take the node down. Give one."
        return
    mounts = {one.get("mountPath", "").rstrip("/"): one["name"] for one in pod.main.get("volumeMounts", [])}
    mount = mounts.get("/dev/shm")
    volume = next((one for one in pod.spec.get("volumes", []) if one.get("name") == mount), {})
    shared = volume.get("emptyDir")
    if mount is None or shared is None or shared.get("medium") != "Memory":
        yield f"{pod.place}: /dev/shm has 64 MB, too little for data workers and NCCL; mount an emptyDir with medium Memory there."
    elif "sizeLimit" not in shared:
        yield f"{pod.place}: the emptyDir at /dev/shm has no sizeLimit; give one below the memory limit {limit}."
    elif quantity(shared["sizeLimit"]) > quantity(limit):
        yield f"{pod.place}: /dev/shm may hold {shared['sizeLimit']}, above the memory limit {limit} that it counts into."


def bad_deepspeed_job(spec: dict[str, Any], training: list[Pod]) -> Iterator[str]:
    """One way to start, a port, and no elasticity, which DeepSpeed has given up."""
    config = spec.get("config", {})
    command = config.get("customCommand")
    ways = [name for name in ("python", "module", "exec") if config.get("run", {}).get(name)]
    if len(ways) + bool(command) != 1:
        found = ", ".join([*(f"run.{way}" for way in ways), *(["customCommand"] if command else [])]) or "none"
        yield f"spec.config: {found}; give exactly one of run.python, run.module and run.exec, or a customCommand."
    words = " ".join([*config.get("otherArgs", []), command or ""])
    if "--master_port" not in words:
        yield "spec.config.otherArgs: no --master_port=N; two jobs on one node would meet at DeepSpeed's 29500."
    for word in ("--no_local_rank", "--autotuning", "--module", "--no_python"):
        if any(one.startswith(word) for one in config.get("otherArgs", [])):
            yield f"spec.config.otherArgs: {word} has a field of its own in config; use that."
    if spec.get("elastic", {}).get("enabled"):
        yield "spec.elastic: DeepSpeed 0.19.8 has no elastic training any more; take it out."
    if spec.get("worker", {}).get("replicas", 0) < 1:
        yield "spec.worker.replicas: at least 1."


def bad_pytorch_job(spec: dict[str, Any], training: list[Pod]) -> Iterator[str]:
    """Names that the operator looks for, one master."""
    replicas = spec.get("pytorchReplicaSpecs", {})
    if replicas.get("Master", {}).get("replicas", 1) != 1 or "Master" not in replicas:
        yield "spec.pytorchReplicaSpecs.Master: exactly 1 replica; more pods are Workers."
    for pod in training:
        if pod.main.get("name") != "pytorch":
            yield f"{pod.place}: its container must be named pytorch, found {pod.main.get('name')!r}."
        elif not any(port.get("name") == "pytorchjob-port" for port in pod.main.get("ports", [])):
            yield f"{pod.place}: no port named pytorchjob-port (23456), by which the processes find the master."


def bad_train_job(spec: dict[str, Any], training: list[Pod]) -> Iterator[str]:
    """One of the three ways to add volumes, that of one version."""
    ways = [name for name in ("runtimePatches", "podTemplateOverrides", "podSpecOverrides") if name in spec]
    if len(ways) > 1:
        yield f"spec: {' and '.join(ways)} are of different versions of Trainer; keep that of yours."
    if not spec.get("runtimeRef", {}).get("name"):
        yield "spec.runtimeRef.name: name a runtime such as torch-distributed."
    if spec.get("trainer", {}).get("numNodes", 1) < 1:
        yield "spec.trainer.numNodes: at least 1."


def bad_mpi_job(spec: dict[str, Any], training: list[Pod]) -> Iterator[str]:
    """One launcher, workers, a port."""
    replicas = spec.get("mpiReplicaSpecs", {})
    if replicas.get("Launcher", {}).get("replicas", 1) != 1 or "Launcher" not in replicas:
        yield "spec.mpiReplicaSpecs.Launcher: exactly 1 replica."
        return
    containers = pod_spec(replicas["Launcher"]).get("containers") or [{}]
    words = " ".join([*containers[0].get("command", []), *containers[0].get("args", [])])
    if "master_port" not in words and "mpirun -np" not in words:
        yield "Launcher: neither a master port for torchrun or deepspeed nor mpirun -np; say how the processes start."
    match = re.search(r"-np (\d+) --map-by ppr:1:node", words)
    workers = replicas.get("Worker", {}).get("replicas", 0)
    if match and int(match[1]) != workers:
        yield f"Launcher: mpirun starts {match[1]} processes, one a node, but there are {workers} workers."
