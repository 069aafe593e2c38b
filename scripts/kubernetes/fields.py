"""The fields of the manifests that we write, by kind; what is not listed is a misspelt field, or one to add here.

A shape is a word for a plain value (str, int, bool, quantity, port, any), a list with the shape of its items, or a
dictionary of field names; "*" stands for any name. Sources: Kubernetes core v1, batch/v1, apps/v1; the CRDs of Kubeflow's
training operator 1.9, mpi-operator v2beta1 and Trainer 2.0 to 2.3; TensorStack's reference of DeepSpeedJob. A test
compares them with the full schemas.
"""

from __future__ import annotations

from typing import Any

Shape = Any
STRINGS = {"*": "str"}
METADATA = {"name": "str", "namespace": "str", "labels": STRINGS, "annotations": STRINGS, "finalizers": ["str"]}
RESOURCES = {"requests": {"*": "quantity"}, "limits": {"*": "quantity"}, "claims": "any"}
ENV = {"name": "str", "value": "str", "valueFrom": "any"}
MOUNT = {
    "name": "str", "mountPath": "str", "readOnly": "bool", "recursiveReadOnly": "str", "subPath": "str", "subPathExpr": "str",
    "mountPropagation": "str",
}  # fmt: skip
PROBE = {
    "exec": "any", "failureThreshold": "int", "grpc": "any", "httpGet": "any", "initialDelaySeconds": "int",
    "periodSeconds": "int", "successThreshold": "int", "tcpSocket": "any", "terminationGracePeriodSeconds": "int",
    "timeoutSeconds": "int",
}  # fmt: skip
CONTAINER_RIGHTS = {
    "allowPrivilegeEscalation": "bool", "appArmorProfile": "any", "capabilities": {"add": ["str"], "drop": ["str"]},
    "privileged": "bool", "procMount": "str", "readOnlyRootFilesystem": "bool", "runAsGroup": "int", "runAsNonRoot": "bool",
    "runAsUser": "int", "seLinuxOptions": "any", "seccompProfile": "any", "windowsOptions": "any",
}  # fmt: skip
POD_RIGHTS = {
    "appArmorProfile": "any", "fsGroup": "int", "fsGroupChangePolicy": "str", "runAsGroup": "int", "runAsNonRoot": "bool",
    "runAsUser": "int", "seLinuxOptions": "any", "seccompProfile": "any", "supplementalGroups": ["int"],
    "supplementalGroupsPolicy": "str", "sysctls": "any", "windowsOptions": "any",
}  # fmt: skip
CONTAINER = {
    "name": "str", "image": "str", "imagePullPolicy": "str", "command": ["str"], "args": ["str"], "workingDir": "str",
    "env": [ENV], "envFrom": "any", "resources": RESOURCES, "resizePolicy": "any", "restartPolicy": "str",
    "ports": [{"name": "str", "containerPort": "int", "hostIP": "str", "hostPort": "int", "protocol": "str"}],
    "volumeMounts": [MOUNT], "volumeDevices": "any", "securityContext": CONTAINER_RIGHTS, "lifecycle": "any",
    "livenessProbe": PROBE, "readinessProbe": PROBE, "startupProbe": PROBE, "stdin": "bool", "stdinOnce": "bool",
    "terminationMessagePath": "str", "terminationMessagePolicy": "str", "tty": "bool",
}  # fmt: skip
VOLUME = {
    "name": "str", "persistentVolumeClaim": {"claimName": "str", "readOnly": "bool"},
    "emptyDir": {"medium": "str", "sizeLimit": "quantity"}, "hostPath": {"path": "str", "type": "str"}, "configMap": "any",
    "secret": "any", "projected": "any", "downwardAPI": "any", "csi": "any", "ephemeral": "any",
    "nfs": {"server": "str", "path": "str", "readOnly": "bool"},
}  # fmt: skip
TOLERATION = {"key": "str", "operator": "str", "value": "str", "effect": "str", "tolerationSeconds": "int"}
POD = {
    "activeDeadlineSeconds": "int", "affinity": "any", "automountServiceAccountToken": "bool", "containers": [CONTAINER],
    "dnsConfig": "any", "dnsPolicy": "str", "enableServiceLinks": "bool", "hostAliases": "any", "hostIPC": "bool",
    "hostNetwork": "bool", "hostPID": "bool", "hostname": "str", "imagePullSecrets": [{"name": "str"}],
    "initContainers": [CONTAINER], "nodeName": "str", "nodeSelector": STRINGS, "preemptionPolicy": "str", "priority": "int",
    "priorityClassName": "str", "readinessGates": "any", "restartPolicy": "str", "runtimeClassName": "str",
    "schedulerName": "str", "securityContext": POD_RIGHTS, "serviceAccountName": "str", "setHostnameAsFQDN": "bool",
    "shareProcessNamespace": "bool", "subdomain": "str", "terminationGracePeriodSeconds": "int", "tolerations": [TOLERATION],
    "topologySpreadConstraints": "any", "volumes": [VOLUME],
}  # fmt: skip
TEMPLATE = {"metadata": METADATA, "spec": POD}
REPLICA = {"replicas": "int", "restartPolicy": "str", "template": TEMPLATE}
SCHEDULING = {
    "minAvailable": "int", "minResources": {"*": "quantity"}, "priorityClass": "str", "queue": "str",
    "scheduleTimeoutSeconds": "int",
}  # fmt: skip
RUN_POLICY = {
    "activeDeadlineSeconds": "int", "backoffLimit": "int", "cleanPodPolicy": "str", "managedBy": "str",
    "schedulingPolicy": SCHEDULING, "suspend": "bool", "ttlSecondsAfterFinished": "int",
}  # fmt: skip
IDLE = [{"type": "str", "skipInitContainer": "bool", "command": ["str"]}]
RESUME = [{**IDLE[0], "args": ["str"]}]
# What a TrainJob may change of its runtime's pods.
PATCHED_CONTAINER = {"name": "str", "env": [ENV], "volumeMounts": [MOUNT]}
PATCHED_POD = {
    "serviceAccountName": "str", "nodeSelector": STRINGS, "tolerations": [TOLERATION], "volumes": [VOLUME],
    "initContainers": [PATCHED_CONTAINER], "containers": [PATCHED_CONTAINER], "schedulingGates": [{"name": "str"}],
}  # fmt: skip
PATCHED_POD_21 = {**PATCHED_POD, "affinity": "any", "imagePullSecrets": [{"name": "str"}]}
PATCHED_CONTAINER_22 = {**PATCHED_CONTAINER, "securityContext": CONTAINER_RIGHTS}
PATCHED_POD_22 = {
    **PATCHED_POD_21, "containers": [PATCHED_CONTAINER_22], "initContainers": [PATCHED_CONTAINER_22],
    "securityContext": POD_RIGHTS, "terminationGracePeriodSeconds": "int",  # the last one from 2.3 on
}  # fmt: skip
TARGETS = [{"name": "str"}]
RUNTIME_PATCH = {
    "template": {
        "metadata": METADATA,
        "spec": {
            "replicatedJobs": [
                {
                    "name": "str",
                    "template": {
                        "metadata": METADATA,
                        "spec": {"template": {"metadata": METADATA, "spec": PATCHED_POD_22}},
                    },
                }
            ]
        },
    }
}

SPECS: dict[tuple[str, str], Shape] = {
    ("batch.tensorstack.dev/v1beta1", "DeepSpeedJob"): {
        "scheduler": {"t9kScheduler": {"queue": "str", "priority": "int"}},
        "runPolicy": {"activeDeadlineSeconds": "int", "backoffLimit": "int", "cleanUpPolicy": "str"},
        "runMode": {
            "debug": {"enabled": "bool", "replicaSpecs": IDLE},
            "pause": {"enabled": "bool", "resumeSpecs": RESUME},
        },
        "elastic": {"enabled": "bool", "minReplicas": "int", "maxReplicas": "int", "expectedReplicas": "int"},
        "config": {
            "slotsPerWorker": "int",
            "localRank": "bool",
            "autotune": "str",
            "run": {"python": ["str"], "module": ["str"], "exec": ["str"]},
            "otherArgs": ["str"],
            "customCommand": "str",
        },
        "disableCustomEnv": "bool",
        "worker": REPLICA,
    },
    ("kubeflow.org/v1", "PyTorchJob"): {
        "elasticPolicy": "any",
        "nprocPerNode": "str",
        "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA},
        "runPolicy": RUN_POLICY,
    },
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): {
        "activeDeadlineSeconds": "int",
        "initializer": "any",
        "managedBy": "str",
        "runtimeRef": {"name": "str", "apiGroup": "str", "kind": "str"},
        "suspend": "bool",
        "trainer": {
            "image": "str",
            "command": ["str"],
            "args": ["str"],
            "env": [ENV],
            "numNodes": "int",
            "numProcPerNode": "int",
            "resourcesPerNode": RESOURCES,
        },
        "runtimePatches": [{"manager": "str", "trainingRuntimeSpec": RUNTIME_PATCH}],
        "podTemplateOverrides": [{"targetJobs": TARGETS, "metadata": METADATA, "spec": PATCHED_POD_21}],
        "podSpecOverrides": [{"targetJobs": TARGETS, **PATCHED_POD}],
    },
    ("kubeflow.org/v2beta1", "MPIJob"): {
        "launcherCreationPolicy": "str",
        "mpiImplementation": "str",
        "mpiReplicaSpecs": {"Launcher": REPLICA, "Worker": REPLICA},
        "runLauncherAsWorker": "bool",
        "runPolicy": RUN_POLICY,
        "slotsPerWorker": "int",
        "sshAuthMountPath": "str",
    },
    ("v1", "PersistentVolumeClaim"): {
        "accessModes": ["str"],
        "resources": {"requests": {"*": "quantity"}, "limits": {"*": "quantity"}},
        "storageClassName": "str",
        "volumeMode": "str",
        "volumeName": "str",
        "selector": "any",
        "dataSource": "any",
        "dataSourceRef": "any",
        "volumeAttributesClassName": "str",
    },
    ("batch/v1", "Job"): {
        "activeDeadlineSeconds": "int",
        "backoffLimit": "int",
        "completionMode": "str",
        "completions": "int",
        "parallelism": "int",
        "podFailurePolicy": "any",
        "suspend": "bool",
        "template": TEMPLATE,
        "ttlSecondsAfterFinished": "int",
    },
    ("apps/v1", "Deployment"): {
        "minReadySeconds": "int",
        "paused": "bool",
        "progressDeadlineSeconds": "int",
        "replicas": "int",
        "revisionHistoryLimit": "int",
        "selector": {"matchLabels": STRINGS, "matchExpressions": "any"},
        "strategy": {"type": "str", "rollingUpdate": "any"},
        "template": TEMPLATE,
    },
    ("v1", "Service"): {
        "type": "str",
        "selector": STRINGS,
        "ports": [
            {"name": "str", "port": "int", "targetPort": "port", "protocol": "str", "nodePort": "int", "appProtocol": "str"}
        ],
        "clusterIP": "str",
        "externalTrafficPolicy": "str",
        "internalTrafficPolicy": "str",
        "sessionAffinity": "str",
    },
}
