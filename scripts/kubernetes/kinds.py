"""A training job as each of the four kinds wants it: TensorStack's DeepSpeedJob, Kubeflow's PyTorchJob, TrainJob, MPIJob.

All run the same program on the same volume with the same environment; what differs is who starts the processes.
DeepSpeedJob: the operator runs `deepspeed` on the first pod over its own hostfile. PyTorchJob, TrainJob: every pod runs
torchrun, which reads PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR … that the operator sets. MPIJob: a launcher without
cards runs mpirun, which starts one torchrun on each worker; so no mpi4py is needed and all ranks come from torchrun.
"""

from __future__ import annotations

import shlex

from errors import UserError
from scripts.kubernetes.pod import MODULES, SECTIONS
from scripts.kubernetes.render import (
    GRACE,
    PORT,
    TITLES,
    TRAINER_VERSIONS,
    WORK,
    Document,
    Job,
    Words,
    container,
    environment,
    formers,
    in_pod,
    metadata,
    placement,
    resources,
    rights,
    step_flags,
    training_pod,
    training_resources,
    user,
    volumes,
    waiting,
)

LAUNCHER_NEEDS = ("PATH", "LD_LIBRARY_PATH")  # what the image sets and a session over ssh would lack


def training(job: Job, steps: list[str]) -> Document:
    """The job that runs one step, or several in order."""
    for step in steps:
        job.folder(SECTIONS[step])  # UserError if the recipe lacks it
    name = SECTIONS[steps[0]] if len(steps) == 1 else "train"
    return BUILDERS[job.settings.kind](job, name, steps)


def title(steps: list[str]) -> str:
    """Such as ``step 2 (reward model)``."""
    if len(steps) > 1:
        return f"steps {', '.join(steps[:-1])} and {steps[-1]} in order"
    name = TITLES[SECTIONS[steps[0]]]
    return f"step {steps[0]} ({name})" if steps[0].isdigit() else name


def deepspeed_job(job: Job, name: str, steps: list[str]) -> Document:
    """batch.tensorstack.dev/v1beta1: one step by config.run.module; several, or in a vendor's environment, by a command."""
    config: Document = {"slotsPerWorker": job.processes}
    pod = training_pod(job, "worker", None)
    if len(steps) == 1 and not job.vendor_env:
        config |= {"localRank": True, "run": {"module": Words([MODULES[SECTIONS[steps[0]]], *step_flags(job)])}}
        config["otherArgs"] = Words([f"--master_port={PORT}"])
        if folders := formers(job, steps[0]):
            pod = {"initContainers": [waiting(job, folders)], **pod}
    else:
        launcher = ["deepspeed", "--hostfile", "/t9k/hostfile", f"--master_port={PORT}", "--module"]
        config["customCommand"] = shlex.join(in_pod(job, steps, launcher))
    spec: Document = {"runPolicy": {"backoffLimit": job.settings.retries, "cleanUpPolicy": "Unfinished"}, "config": config}
    if job.settings.queue or job.settings.priority is not None:
        asked = {"queue": job.settings.queue, "priority": job.settings.priority}
        spec = {"scheduler": {"t9kScheduler": {key: value for key, value in asked.items() if value is not None}}, **spec}
    spec["worker"] = {"replicas": job.nodes, "restartPolicy": "OnFailure", "template": {"spec": pod}}
    described = metadata(job, name, name)
    return {"apiVersion": "batch.tensorstack.dev/v1beta1", "kind": "DeepSpeedJob", "metadata": described, "spec": spec}


def run_policy(job: Job) -> Document:
    """Retries and clean-up of the two older kinds of Kubeflow."""
    if job.settings.priority is not None:
        raise UserError("--priority is a number for a DeepSpeedJob only; leave it out, and set a priorityClass by hand.")
    found: Document = {"backoffLimit": job.settings.retries, "cleanPodPolicy": "Running"}
    if job.settings.queue:
        found["schedulingPolicy"] = {"queue": job.settings.queue}
    return found


def pytorch_job(job: Job, name: str, steps: list[str]) -> Document:
    """kubeflow.org/v1. nprocPerNode is a string there, the container is named pytorch, and so is its port."""
    command = in_pod(job, steps, ["torchrun", "-m"])
    port = [{"name": "pytorchjob-port", "containerPort": 23456}]

    def replica(count: int) -> Document:
        template = {"spec": training_pod(job, "pytorch", command, ports=port)}
        return {"replicas": count, "restartPolicy": "OnFailure", "template": template}

    replicas = {"Master": replica(1), **({"Worker": replica(job.nodes - 1)} if job.nodes > 1 else {})}
    spec = {"nprocPerNode": str(job.processes), "runPolicy": run_policy(job), "pytorchReplicaSpecs": replicas}
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": metadata(job, name, name), "spec": spec}


def train_job(job: Job, name: str, steps: list[str]) -> Document:
    """trainer.kubeflow.org/v1alpha1 over the runtime torch-distributed. What has volumes is called otherwise in each version."""
    version = job.settings.trainer_version
    if job.settings.queue or job.settings.priority is not None:
        raise UserError("A TrainJob has no field for --queue or --priority; queueing systems read a label of theirs, so add that.")
    found, mounts = volumes(job)
    patch: Document = {**placement(job), "containers": [{"name": "node", "volumeMounts": mounts}], "volumes": found}
    if version in ("2.2", "2.3"):  # from here on it may say who the processes are; before it is the image's user
        patch = {
            **placement(job),
            "securityContext": user(job),
            **({"terminationGracePeriodSeconds": GRACE} if version == "2.3" else {}),  # 30 in those before
            "containers": [{"name": "node", "securityContext": rights(job, training=True), "volumeMounts": mounts}],
            "volumes": found,
        }
        template = {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {"spec": patch}}}}]}}
        patches = {"runtimePatches": [{"manager": "sanbu/render", "trainingRuntimeSpec": {"template": template}}]}
    elif version == "2.1":
        patches = {"podTemplateOverrides": [{"targetJobs": [{"name": "node"}], "spec": patch}]}
    elif version == "2.0":
        patches = {"podSpecOverrides": [{"targetJobs": [{"name": "node"}], **patch}]}
    else:
        raise UserError(f"--trainer-version {version} is not known; use {', '.join(TRAINER_VERSIONS)} (2.3 for later ones).")
    trainer = {
        "image": job.image,
        "command": Words(in_pod(job, steps, ["torchrun", "-m"])),
        "env": environment(job),
        "numNodes": job.nodes,
        "numProcPerNode": job.processes,
        "resourcesPerNode": training_resources(job),
    }
    runtime = {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": job.settings.runtime}
    spec = {"runtimeRef": runtime, "trainer": trainer, **patches}
    described = metadata(job, name, name)
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": described, "spec": spec}


def mpi_job(job: Job, name: str, steps: list[str]) -> Document:
    """kubeflow.org/v2beta1. mpirun starts one process a worker; a session over ssh has no variables, so -x sends them."""
    described = metadata(job, name, name)
    full = described["name"]
    # The operator names the first worker so, and gives its pods a service of the job's name.
    master = f"{full}-worker-0.{full}"
    torchrun = [
        "torchrun", f"--nnodes={job.nodes}", f"--nproc_per_node={job.processes}", "--node_rank=$OMPI_COMM_WORLD_RANK",
        f"--master_addr={master}", f"--master_port={PORT}", "-m",
    ]  # fmt: skip
    sent = [word for one in (*LAUNCHER_NEEDS, *(variable["name"] for variable in environment(job))) for word in ("-x", one)]
    mpirun = ["mpirun", "--allow-run-as-root", "-np", str(job.nodes), "--map-by", "ppr:1:node", "--bind-to", "none", *sent]
    found, mounts = volumes(job, devices=False)
    launcher = {
        "securityContext": user(job),
        "terminationGracePeriodSeconds": GRACE,
        "containers": [
            container(
                job, "launcher", [*mpirun, *in_pod(job, steps, torchrun)], env=environment(job),
                resources=resources(job, 0, 2, 1), volumeMounts=mounts[:1],
            )
        ],
        "volumes": found[:1],
    }
    worker = training_pod(job, "worker", ["/usr/sbin/sshd", "-De"])
    spec = {
        "slotsPerWorker": job.processes,
        "mpiImplementation": "OpenMPI",
        "sshAuthMountPath": "/root/.ssh",
        "launcherCreationPolicy": "WaitForWorkersReady",
        "runPolicy": run_policy(job),
        "mpiReplicaSpecs": {
            "Launcher": {"replicas": 1, "restartPolicy": "OnFailure", "template": {"spec": launcher}},
            "Worker": {"replicas": job.nodes, "restartPolicy": "OnFailure", "template": {"spec": worker}},
        },
    }
    return {"apiVersion": "kubeflow.org/v2beta1", "kind": "MPIJob", "metadata": described, "spec": spec}


BUILDERS = {"deepspeedjob": deepspeed_job, "pytorchjob": pytorch_job, "trainjob": train_job, "mpijob": mpi_job}
__all__ = ["BUILDERS", "WORK", "title", "training"]
