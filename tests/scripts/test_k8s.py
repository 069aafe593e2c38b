"""Manifests: the committed set is the rendered one, the schemas of others take it, and wrong manifests and flags are refused."""

import copy
import json
import math
import re
import shlex
from dataclasses import replace
from functools import cache

import jsonschema
import pytest
import yaml

from inference.server.__main__ import parse as parse_server_flags
from scripts.kubernetes import __main__ as k8s
from scripts.kubernetes import check, pod
from scripts.kubernetes.render import SERVER_GIB, make_job, quantity, render, server_needs
from scripts.launch.platforms import load_platforms, platform_named
from steps import STEPS
from training.utils.flags.recipe import Recipe, load_recipe

FULL = {"PyTorchJob": "pytorchjob-v1", "TrainJob": "trainjob-v1alpha1", "MPIJob": "mpijob-v2beta1"}
RECIPE = "configs/single_gpu/opt-1.3b.yaml"


@cache
def files(kind: str, recipe: str = "multi_node/opt-13b", *flags: str) -> dict[str, list[dict]]:
    """Return file name -> documents, as the command line renders them."""
    words = ["render", "--kind", kind, "--recipe", str(k8s.ROOT / "configs" / f"{recipe}.yaml"), *flags]
    texts = render(make_job(k8s.build_parser().parse_args(words)))
    return {name: list(yaml.safe_load_all(text)) for name, text in texts.items()}


def manifest(kind: str, recipe: str = "multi_node/opt-13b", step: str = "steps/step2_reward.yaml", *flags: str) -> dict:
    """Return one training document that the caller may change."""
    return copy.deepcopy(files(kind, recipe, *flags)[step][0])


@cache
def committed() -> tuple[dict, ...]:
    """Return every committed document."""
    paths = sorted(k8s.COMMITTED.rglob("*.yaml"))
    return tuple(one for path in paths for one in yaml.safe_load_all(path.read_text(encoding="utf-8")))


def trainer_of(document: dict) -> dict:
    """Return the container that trains, wherever the kind keeps it."""
    spec = document["spec"]
    if document["kind"] == "TrainJob":
        return spec["trainer"]
    if document["kind"] == "DeepSpeedJob":
        return spec["worker"]["template"]["spec"]["containers"][0]
    replicas = spec.get("pytorchReplicaSpecs") or spec["mpiReplicaSpecs"]
    return replicas["Master" if "Master" in replicas else "Worker"]["template"]["spec"]["containers"][0]


def test_the_server_s_memory_is_planned_only_for_the_manifests_that_name_it(monkeypatch):
    """The plan imports torch and transformers, 3 s."""
    planned = []
    values = {"memory_gib": 1, "more": []}
    monkeypatch.setattr("scripts.kubernetes.render.server_values", lambda job: planned.append(job.model) or values)
    k8s.set_texts(k8s.build_parser())
    assert len(planned) == sum("6-serve.yaml" in names for _, _, names in k8s.SETS) == 1


def test_the_committed_set_is_what_would_be_rendered_and_valid(capsys):
    assert k8s.main(["set", "--check"]) == 0, capsys.readouterr().out
    assert k8s.main(["check", str(k8s.COMMITTED)]) == 0
    assert "18 documents in 17 files, 0 problems" in capsys.readouterr().out


def test_the_operators_own_schemas_take_every_kind(shared_dir):
    """The full schemas of the CRDs, with unknown fields forbidden; ours have no field or type that the CRD lacks."""
    schemas = {kind: json.loads((shared_dir / "schemas" / f"{name}.json").read_text()) for kind, name in FULL.items()}
    documents = [one for one in committed() if one["kind"] in FULL]
    documents += [manifest(name, "dcu_z100l/chatglm-6b", "3-train.yaml") for name in ("pytorchjob", "trainjob", "mpijob")]
    for document in documents:
        errors = jsonschema.Draft202012Validator(schemas[document["kind"]]).iter_errors(document)
        assert not [f"{error.json_path}: {error.message}" for error in errors], document["metadata"]["name"]

    def compare(ours: dict, full: dict) -> None:
        assert ours.get("type", full.get("type")) == full.get("type")
        for name, inner in ours.get("properties", {}).items():
            if name not in ("Launcher", "Master", "template", "minResources", "podSpecOverrides", "podTemplateOverrides"):
                compare(inner, full["properties"][name])
        if isinstance(ours.get("additionalProperties"), dict):
            compare(ours["additionalProperties"], full["additionalProperties"])

    for kind, schema in schemas.items():
        compare(check.own_schemas()[kind]["properties"]["spec"], schema["properties"]["spec"])


# The predecessor's manifests (docs/en/kubernetes.md): nodes x devices, model of step 1.
COUNTERPARTS = {
    "single_gpu/opt-1.3b": (1, 1, "facebook/opt-1.3b"),
    "single_node/opt-13b": (1, 8, "facebook/opt-13b"),  # there 4 cards of a node; the recipe takes all 8
    "multi_node/opt-66b": (2, 8, "facebook/opt-66b"),
}


@pytest.mark.parametrize("recipe", COUNTERPARTS)
def test_nine_training_jobs_have_their_counterpart(recipe):
    nodes, devices, model = COUNTERPARTS[recipe]
    sections = Recipe.read(str(k8s.ROOT / "configs" / f"{recipe}.yaml"))
    assert sections.sections["sft"]["model_name_or_path"] == model
    for step in STEPS[:3]:
        path = k8s.COMMITTED / "deepspeedjob" / recipe / "steps" / f"step{step.choice}_{step.section}.yaml"
        spec, main = yaml.safe_load(path.read_text())["spec"], trainer_of(yaml.safe_load(path.read_text()))
        assert spec["worker"]["replicas"] == nodes and spec["config"]["slotsPerWorker"] == devices
        assert main["resources"]["limits"]["nvidia.com/gpu"] == str(devices)
        assert main["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        flags = ["--config", f"/opt/sanbu/configs/{recipe}.yaml", *pod.USUAL_FLAGS]
        assert spec["config"]["run"]["module"] == [step.module, *flags]
        waiting = [word for one in spec["worker"]["template"]["spec"].get("initContainers", []) for word in one["command"]]
        assert [word for word in waiting if word.startswith("output/")] == sections.inputs(step.section)


def test_the_dialogue_asks_for_the_cards_that_it_sees():
    """/dev/dri shows every card of the host: with one asked for, two dialogues and a training would meet on card 0."""
    for recipe, resource, cards in (("dcu_z100l/chatglm-6b", "hygon.com/dcu", "8"), ("single_gpu/opt-1.3b", "nvidia.com/gpu", "1")):
        (main,) = files("deepspeedjob", recipe)["5-chat.yaml"][0]["spec"]["template"]["spec"]["containers"]
        assert main["resources"]["requests"][resource] == main["resources"]["limits"][resource] == cards
        assert main["stdin"] and main["tty"] and main["command"][-3:-1] == ["/opt/sanbu/chat.py", "--path"]
    assert "5-chat.yaml" not in files("deepspeedjob", "multi_node/opt-66b")  # 132 GB do not go on one card


def test_the_server_is_asked_after_its_health_and_has_time_to_answer():
    """What the manifest and the server must agree on: port, path, key, the time that a request may take."""
    deployment, service = files("deepspeedjob", "single_gpu/opt-1.3b")["6-serve.yaml"]
    spec = deployment["spec"]["template"]["spec"]
    (main,) = spec["containers"]
    words = main["command"][main["command"].index("inference.server") + 1 :]
    args = parse_server_flags(words)
    ports = {one["name"]: one["containerPort"] for one in main["ports"]}
    assert ports == {"http": args.port} and service["spec"]["ports"][0]["targetPort"] == "http"
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert main[probe]["httpGet"] == {"path": "/health", "port": "http"}
    waits = int(main["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > args.timeout + waits
    (key,) = [one for one in main["env"] if one["name"] == "SANBU_API_KEY"]
    assert key["valueFrom"]["secretKeyRef"] == {"name": "sanbu-opt-1-3b-serve", "key": "api-key"}  # no key, no pod
    assert args.host == "0.0.0.0"
    assert next(one for one in main["volumeMounts"] if one["name"] == "work")["readOnly"]
    dcu = files("pytorchjob", "dcu_z100l/chatglm-6b")["6-serve.yaml"][0]["spec"]["template"]["spec"]["containers"][0]
    assert dcu["command"][:2] == ["bash", "/opt/sanbu/scripts/vendor_env.sh"]


def test_the_commands_are_accepted_by_those_who_read_them():
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    seen = set()
    for kind in ("deepspeedjob", "pytorchjob", "trainjob", "mpijob"):
        document = manifest(kind, "multi_node/opt-13b", "3-train.yaml", "--flags=--seed 5 --output_dir 'a b'")
        command = document["spec"].get("config", {}).get("customCommand")
        main = trainer_of(document)
        if kind == "mpijob":
            main = document["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
            assert [main["command"][0], *main["command"][2:4]] == ["mpirun", "-np", "2"]
        words = shlex.split(command) if command else main["command"]
        words = words[words.index("python") + 3 :]
        cut = words.index("--")
        args = pod.build_parser().parse_args(words[:cut])
        assert args.step == ["1", "2", "3"] and shlex.split(args.flags) == ["--seed", "5", "--output_dir", "a b"]
        launcher = [word.replace("$OMPI_COMM_WORLD_RANK", "1") for word in words[cut + 1 :]]
        module = [STEPS[0].module, "--config", args.recipe]
        if launcher[0] == "torchrun":
            parsed = get_args_parser().parse_args([*launcher[1:], *module])
            assert parsed.module and [parsed.training_script, *parsed.training_script_args] == module
        else:
            parsed = parse_args([*launcher[1:], *module])
            assert parsed.module and parsed.user_script == module[0] and parsed.master_port == 29517
        seen.add(launcher[0])
    assert seen == {"torchrun", "deepspeed"}


def test_every_platform_gets_its_own_devices_and_variables():
    for name, platform in load_platforms().items():
        document = manifest("pytorchjob", f"{name}/opt-1.3b", "steps/step1_sft.yaml")
        main = trainer_of(document)
        variables = {one["name"]: one["value"] for one in main["env"]}
        for variable, value in {**platform.env, **(platform.env_several_nodes if platform.nodes > 1 else {})}.items():
            assert variables[variable] == value.replace("${USER}", "sanbu")
        devices = {key: value for key, value in main["resources"]["limits"].items() if "/" in key}
        wanted = {} if platform.accelerator == "cpu" else {platform.kubernetes["resource"]: str(platform.devices)}
        assert devices == wanted and document["spec"]["nprocPerNode"] == str(platform.devices)
        assert set(platform.kubernetes["host_paths"]) <= {mount["mountPath"] for mount in main["volumeMounts"]}
        assert main["image"] == platform.kubernetes["image"]
        memory = int(main["resources"]["limits"]["memory"].removesuffix("Gi"))
        assert platform.host_memory_gib / 2 <= memory <= platform.host_memory_gib


WHERE = ("--node-selector", "pool=a100", "example.com/zone=b", "--toleration", "nvidia.com/gpu", "team=nlp:NoSchedule")
PLACED = {
    "nodeSelector": {"pool": "a100", "example.com/zone": "b"},
    "tolerations": [
        {"key": "nvidia.com/gpu", "operator": "Exists"},
        {"key": "team", "operator": "Equal", "value": "nlp", "effect": "NoSchedule"},
    ],
}


@pytest.mark.parametrize("kind", ["deepspeedjob", "pytorchjob", "mpijob", "trainjob"])
def test_pods_with_cards_go_to_the_nodes_that_are_named(kind):
    found = files(kind, "single_node/opt-13b", *WHERE)
    assert check.problems(found["3-train.yaml"][0]) == []
    count = {name: json.dumps(documents).count(json.dumps(PLACED)[1:-1]) for name, documents in found.items()}
    assert count["3-train.yaml"] == count["5-chat.yaml"] == 1, "workers, not MPIJob's launcher, which has no card"
    assert count["2-download.yaml"] == count["4-tensorboard.yaml"] == 0


@pytest.mark.parametrize(
    "version, field",
    [
        ("2.0", "podSpecOverrides"),
        ("2.1", "podTemplateOverrides"),
        ("2.2", "runtimePatches"),
        ("2.3", "runtimePatches"),
    ],
)
def test_a_trainjob_patches_pods_as_its_version_does(version, field):
    document = manifest("trainjob", "multi_node/opt-13b", "3-train.yaml", "--trainer-version", version)
    assert {"podSpecOverrides", "podTemplateOverrides", "runtimePatches"} & document["spec"].keys() == {field}
    assert check.problems(document) == []
    text = json.dumps(document["spec"][field])
    assert ("securityContext" in text) == (version >= "2.2")  # the CRDs of 2.0 and 2.1 refuse it,
    assert ("terminationGracePeriodSeconds" in text) == (version == "2.3")  # and that of 2.2 this
    assert '"name": "node"' in text and '"/workspace"' in text and '"/dev/shm"' in text


POD = "spec/worker/template/spec"
BROKEN = [
    ("deepspeedjob", f"{POD}/containers/0/comand", ["x"], "did you mean command"),
    ("deepspeedjob", f"{POD}/containers/0/env/0/value", 1, "1 is not of type 'string'"),
    ("deepspeedjob", "spec/config/slotPerWorker", 8, "did you mean slotsPerWorker"),
    ("deepspeedjob", "spec/config/run/python", "main.py", "exactly one of python, module and exec"),
    ("deepspeedjob", "spec/config/customCommand", "x --master_port=1", "exactly one of run and customCommand"),
    ("deepspeedjob", "spec/config/slotsPerWorker", 4, "8 devices in its limits"),
    ("deepspeedjob", "spec/config/otherArgs", [], "--master_port"),
    ("deepspeedjob", "spec/elastic", {"enabled": True}, "no elastic training"),
    ("deepspeedjob", f"{POD}/containers/0/volumeMounts/1/mountPath", "/root/.ssh", "hides /root/.ssh"),
    ("deepspeedjob", f"{POD}/containers/0/volumeMounts/1/mountPath", "/tmp/shm", "/dev/shm has 64 MB"),
    ("deepspeedjob", f"{POD}/volumes/1/emptyDir/sizeLimit", "2Ti", "above the memory limit"),
    ("deepspeedjob", f"{POD}/volumes/0", {"name": "work", "emptyDir": {}}, "no PVC is mounted"),
    ("deepspeedjob", f"{POD}/containers/0/volumeMounts/0/name", "worK", "did you mean work"),
    ("deepspeedjob", f"{POD}/containers/0/resources/requests/nvidia.com~1gpu", "4", "must be the same in requests and limits"),
    ("deepspeedjob", f"{POD}/containers/0/resources/limits/memory", "lots", "is no quantity"),
    ("deepspeedjob", f"{POD}/containers/0/resources/limits/memory", None, "no memory in the limits"),
    ("deepspeedjob", f"{POD}/containers/0/image", "host:5000/sanbu", "a tag other than latest"),
    ("deepspeedjob", f"{POD}/containers/0/env/0/name", "RANK", "set for each process"),
    ("deepspeedjob", "metadata/name", "opt-1.3b", "DNS-1123"),
    ("deepspeedjob", "metadata/name", "x" * 60, "its pods append to it"),
    ("deepspeedjob", "kind", "DeepspeedJob", "did you mean DeepSpeedJob"),
    ("pytorchjob", "spec/nprocPerNode", 8, "8 is not of type 'string'"),
    ("pytorchjob", "spec/nprocPerNod", "8", "did you mean nprocPerNode"),
    ("pytorchjob", "T/name", "worker", "must be named pytorch"),
    ("pytorchjob", "spec/pytorchReplicaSpecs/Master/replicas", 2, "exactly 1"),
    ("pytorchjob", "spec/runPolicy/backoffLimit", "x", "'x' is not of type 'integer'"),
    ("trainjob", "spec/trainer/numProcPerNode", "8", "'8' is not of type 'integer'"),
    ("trainjob", "spec/trainer/numNode", 8, "did you mean numNodes"),
    ("trainjob", "spec/trainer/numProcPerNode", 4, "make them equal"),
    ("trainjob", "spec/runtimePatches", None, "volumes are added by one of"),
    ("trainjob", "spec/podSpecOverrides", [], "volumes are added by one of"),
    ("trainjob", "spec/runtimeRef/name", "", "torch-distributed"),
    ("mpijob", "spec/slotsPerWorker", 2, "make them equal"),
    ("mpijob", "spec/slotsPerWorker", "8", "'8' is not of type 'integer'"),
    ("mpijob", "spec/mpiReplicaSpecs/Launcher/replicas", 2, "exactly 1"),
    ("mpijob", "spec/mpiReplicaSpecs/Launcher/template/spec/containers/0/arg", [], "did you mean args"),
    ("mpijob", "T/volumeMounts/1/mountPath", "/etc/mpi", "/etc/mpi"),
]


@pytest.mark.parametrize("kind, path, value, said", BROKEN, ids=[f"{kind} {path} {value}"[:70] for kind, path, value, _ in BROKEN])
def test_a_wrong_manifest_is_refused(kind, path, value, said):
    document = manifest(kind)
    *places, last = (part.replace("~1", "/") for part in path.split("/"))
    inner = document
    for place in places:
        inner = trainer_of(inner) if place == "T" else inner[int(place) if place.isdigit() else place]
    last = int(last) if last.isdigit() else last
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    assert any(said in sentence for sentence in check.problems(document)), check.problems(document)


def test_check_names_file_and_document(tmp_path, capsys):
    good, bad = manifest("pytorchjob"), manifest("mpijob")
    del bad["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["volumes"][0]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump_all([good, bad]))
    assert k8s.main(["check", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "two.yaml, document 2 (MPIJob sanbu-opt-13b-reward): no PVC is mounted" in told and "document 1" not in told
    (tmp_path / "two.yaml").write_text("a: [1\nb: 2\n")
    assert k8s.main(["check", str(tmp_path)]) == 2 and "two.yaml, line 2: not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--kind", "pytorchjobs"], "did you mean pytorchjob"),
        (["--recipe", "dcu_z100l/opt-1.3"], "did you mean opt-1.3b"),
        (["--step", "4"], "--step 4 is unknown"),
        (["--pvc", ""], "--pvc is empty"),
        (["--memory", "much"], "no quantity"),
        (["--memory", "2Gi", "--shm", "4Gi"], "above the memory limit"),
        (["--image", "sanbu"], "a tag other than latest"),
        (["--name", "Opt_1.3b"], "such as opt-1-3b"),
        (["--name", "x" * 48], "shorter --name"),
        (["--priority", "5"], "DeepSpeedJob only"),
        (["--flags=--max_step 3"], "did you mean --max_steps"),
        (["--kind", "trainjob", "--trainer-version", "1.9"], "--trainer-version 1.9"),
        (["--kind", "trainjob", "--queue", "q"], "no field for --queue"),
        (["--node-selector", "pool"], "--node-selector pool: write KEY=VALUE"),
        (["--toleration", "a=b:Never"], "--toleration a=b:Never: write KEY"),
    ],
)
def test_render_refuses_in_one_sentence(words, said, capsys, repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert k8s.main(["render", "--kind", "mpijob", "--recipe", RECIPE, *words]) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.startswith("error: ") and told.err.count("\n") == 1 and not told.out


def test_pods_have_the_memory_that_the_plan_asks_for(capsys):
    """The S0 scripts keep both optimizers of 6.2e9 weights on the host: 16 bytes a weight each, 184 GiB (hardware.md 7.5)."""
    words = ["render", "--kind", "deepspeedjob", "--recipe", str(k8s.ROOT / "configs/dcu_z100l/chatglm-6b.yaml")]
    check.check_memory(make_job(k8s.build_parser().parse_args(words)), STEPS[2])
    assert k8s.main([*words, "--step", "3", "--memory", "150Gi"]) == 2
    told = capsys.readouterr().err
    assert "but a pod has 150 GiB" in told and int(told.split("--memory ")[1].split("Gi")[0]) > 184


def test_a_server_has_the_memory_of_its_weights_and_cache():
    """OPT-1.3B by hand: 1.316e9 weights; a token of 24 layers keeps 2 x 2,048 numbers in each; a context has 2,048 tokens."""
    card, cpu = (platform_named(name) for name in ("single_gpu", "cpu"))
    assert card.dtype == "bf16" and cpu.dtype == "fp32"
    host, answers = server_needs("facebook/opt-1.3b", card, 16, 2**28)
    assert host == math.ceil(1.316e9 * 2 / 2**30) + SERVER_GIB and answers == 16
    small = replace(card, device_memory_gib=6)
    row = 24 * 2 * 2048 * 2 * (2048 + 64) * (1 + 2 / 24)
    _, answers = server_needs("facebook/opt-1.3b", small, 16, 2**28)
    assert answers == int((0.9 * 6 * 2**30 - 1.316e9 * 2 - 2**28) / row) < 16
    host, answers = server_needs("facebook/opt-1.3b", cpu, 16, 2**28)
    assert answers == 16 and host == math.ceil((1.316e9 * 4 + 2**28 + 16 * 2 * row) / 2**30) + SERVER_GIB


def test_a_recipe_of_ones_own_is_checked_and_rendered(tmp_path, capsys):
    recipe = tmp_path / "own.yaml"
    content = yaml.safe_dump(load_recipe(str(k8s.ROOT / RECIPE)), sort_keys=False)
    recipe.write_text(content.replace("max_seq_len", "max_seq_lenn", 1))
    words = ["render", "--kind", "pytorchjob", "--recipe", str(recipe), "--recipe-in-pod", "/workspace/own.yaml"]
    assert k8s.main(words) == 2 and "did you mean --max_seq_len" in capsys.readouterr().err
    recipe.write_text(content)
    assert k8s.main(words[:-2]) == 2 and "--recipe-in-pod" in capsys.readouterr().err
    assert k8s.main([*words, "--out", str(tmp_path / "out"), "--namespace", "team"]) == 0
    (made,) = yaml.safe_load_all((tmp_path / "out/3-train.yaml").read_text())
    assert "/workspace/own.yaml" in trainer_of(made)["command"] and made["metadata"]["namespace"] == "team"
    assert "step3_ppo.yaml" in {path.name for path in (tmp_path / "out/steps").iterdir()}
    capsys.readouterr()
    assert k8s.main(words) == 0  # to the terminal, without the single steps
    kinds = [document["kind"] for document in yaml.safe_load_all(capsys.readouterr().out)]
    assert kinds == ["PersistentVolumeClaim", "Job", "PyTorchJob", "Deployment", "Service", "Deployment"]


def test_quantities():
    assert [quantity(text) for text in ("500m", "8", 8, "64Gi", "2Ti", "1k", "1.5M")] == [0.5, 8, 8, 2**36, 2**41, 1000, 1.5e6]


def test_the_commands_of_the_guide_are_understood(repository):
    text = (repository / "docs/en/kubernetes.md").read_text(encoding="utf-8")
    lines = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith(("python -m", "kubectl", "docker"))]
    objects = {word.split("/")[1] for line in lines for word in line.split() if re.match("(job|service|deployment)/", word)}
    for line in lines:
        if line.startswith("python -m scripts.k8s render"):
            texts = render(make_job(k8s.build_parser().parse_args(shlex.split(line)[3:]))).values()
            assert objects <= {one["metadata"]["name"] for text in texts for one in yaml.safe_load_all(text)}
        assert all((repository / word).is_file() for word in line.split() if word.endswith(".Dockerfile"))
