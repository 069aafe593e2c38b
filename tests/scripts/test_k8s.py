"""Manifests: the committed set is the rendered one, strict schemas take it, and what is wrong with a manifest is found."""

import copy
import json
import re
import shlex
from functools import cache

import jsonschema
import pytest
import yaml

from errors import UserError
from scripts.kubernetes import __main__ as k8s
from scripts.kubernetes import pod
from scripts.kubernetes import render as render_parts
from scripts.kubernetes.checks import problems
from scripts.kubernetes.fields import SPECS, TEMPLATE
from scripts.kubernetes.memory import host_gib
from scripts.kubernetes.render import quantity
from scripts.launch.platforms import load_platforms
from training.utils.flags.recipe import load_recipe

FULL = {"PyTorchJob": "pytorchjob-v1", "TrainJob": "trainjob-v1alpha1", "MPIJob": "mpijob-v2beta1"}


@cache
def job(kind: str, recipe: str, *flags: str):
    """A job as the command line makes it."""
    words = ["render", "--kind", kind, "--recipe", str(k8s.ROOT / "configs" / f"{recipe}.yaml"), *flags]
    return k8s.make_job(k8s.build_parser().parse_args(words))


def manifest(kind: str, recipe: str = "multi_node/opt-13b", steps: tuple[str, ...] = ("2",), flags: tuple[str, ...] = ()):
    """One training document, the caller's to change."""
    (documents,) = k8s.render(job(kind, recipe, *flags), list(steps)).values()
    return copy.deepcopy(documents[0])


@cache
def committed() -> tuple[dict, ...]:
    """Every committed document."""
    return tuple(one for path in sorted(k8s.COMMITTED.rglob("*.yaml")) for one in yaml.safe_load_all(path.read_text()))


def trainer_of(document: dict) -> dict:
    """The container that trains, wherever the kind keeps it."""
    spec = document["spec"]
    if document["kind"] == "TrainJob":
        return spec["trainer"]
    if document["kind"] == "DeepSpeedJob":
        return spec["worker"]["template"]["spec"]["containers"][0]
    replicas = spec.get("pytorchReplicaSpecs") or spec["mpiReplicaSpecs"]
    return replicas["Master" if "Master" in replicas else "Worker"]["template"]["spec"]["containers"][0]


def templates(document: dict) -> list[dict]:
    """Every pod template in a document."""
    found = []

    def walk(value) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                if name == "template" and "containers" in (inner or {}).get("spec", {}):
                    found.append(inner)
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(document)
    return found


# ------------------------------------------------------------------------------------------------------ the committed set


def test_the_committed_set_is_what_would_be_rendered(capsys):
    assert k8s.main(["set", "--check"]) == 0, capsys.readouterr().out
    assert k8s.main(["check", str(k8s.COMMITTED)]) == 0
    assert len(committed()) > 60


@pytest.fixture(scope="module")
def schemas(shared_dir) -> dict[str, dict]:
    """The CRDs' schemas, with no unknown field allowed anywhere."""
    return {kind: json.loads((shared_dir / "schemas" / f"{name}.json").read_text()) for kind, name in FULL.items()}


def pod_template(schemas: dict[str, dict]) -> dict:
    """The full schema of a pod template, as the PyTorchJob's CRD has it."""
    replicas = schemas["PyTorchJob"]["properties"]["spec"]["properties"]["pytorchReplicaSpecs"]
    return replicas["additionalProperties"]["properties"]["template"]


def test_strict_schemas_take_every_document(schemas):
    checkers = {kind: jsonschema.Draft202012Validator(schema) for kind, schema in schemas.items()}
    template = jsonschema.Draft202012Validator(pod_template(schemas))
    seen: dict[str, int] = {}
    for document in committed():
        kind = document["kind"]
        if kind in checkers:
            wrong = [f"{error.json_path}: {error.message}" for error in checkers[kind].iter_errors(document)]
            assert not wrong, (document["metadata"]["name"], wrong[:3])
        for one in templates(document):
            wrong = [f"{error.json_path}: {error.message}" for error in template.iter_errors(one)]
            assert not wrong, (document["metadata"]["name"], wrong[:3])
        seen[kind] = seen.get(kind, 0) + 1
    assert all(seen.get(kind, 0) >= 4 for kind in (*FULL, "DeepSpeedJob")), seen
    # The schemas are as strict as they should be.
    document = manifest("pytorchjob")
    trainer_of(document)["comand"] = []
    assert list(checkers["PyTorchJob"].iter_errors(document))


def test_our_list_of_fields_holds_no_invention(schemas):
    def compare(shape, full: dict, place: str) -> None:
        if isinstance(shape, list):
            compare(shape[0], full["items"], place)
        elif isinstance(shape, dict):
            for name, inner in shape.items():
                if "properties" not in full:  # a CRD may leave a part open
                    open_part = full.get("additionalProperties", full.get("x-kubernetes-preserve-unknown-fields"))
                    assert open_part is not None or place.endswith("metadata"), place
                    if isinstance(open_part, dict):
                        compare(inner, open_part, f"{place}.{name}")
                elif (place, name) not in newer:
                    assert name in full["properties"], f"{place}.{name} is no field"
                    compare(inner, full["properties"][name], f"{place}.{name}")
        elif shape in ("int", "bool", "str"):
            wanted = {"int": "integer", "bool": "boolean", "str": "string"}[shape]
            assert full.get("type", wanted) == wanted, f"{place}: {full.get('type')}"

    # In the Trainer's newest CRD the older ways to patch pods are gone; tests below look at them.
    newer = {("TrainJob", "podTemplateOverrides"), ("TrainJob", "podSpecOverrides")}
    for (_, kind), shape in SPECS.items():
        if kind in schemas:
            compare(shape, schemas[kind]["properties"]["spec"], kind)
    compare(TEMPLATE, pod_template(schemas), "template")


# The predecessor's ten manifests (predecessors.md 1.10): nodes x devices, model of step 1.
COUNTERPARTS = {
    "single_gpu/opt-1.3b": (1, 1, "facebook/opt-1.3b"),
    "single_node/opt-13b": (1, 8, "facebook/opt-13b"),  # there 4 cards of a node; the recipe takes all 8
    "multi_node/opt-66b": (2, 8, "facebook/opt-66b"),
}


@pytest.mark.parametrize("recipe", COUNTERPARTS)
@pytest.mark.parametrize("step", ["step1_sft", "step2_reward", "step3_ppo"])
def test_nine_training_jobs_have_their_counterpart(recipe, step):
    nodes, devices, model = COUNTERPARTS[recipe]
    folder = k8s.COMMITTED / "deepspeedjob" / recipe
    document = yaml.safe_load((folder / "steps" / f"{step}.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("batch.tensorstack.dev/v1beta1", "DeepSpeedJob")
    assert document["spec"]["worker"]["replicas"] == nodes
    assert document["spec"]["config"]["slotsPerWorker"] == devices
    assert trainer_of(document)["resources"]["limits"]["nvidia.com/gpu"] == str(devices)
    module, *flags = document["spec"]["config"]["run"]["module"]
    assert module == f"training.{step}.main"
    path = flags[flags.index("--config") + 1].replace("/opt/sanbu", str(k8s.ROOT))
    assert pod.read_recipe(path)["sft"]["model_name_or_path"] == model
    assert trainer_of(document)["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


def test_the_deploy_job_has_its_counterpart():
    document = yaml.safe_load((k8s.COMMITTED / "deepspeedjob/single_gpu/opt-1.3b/5-chat.yaml").read_text())
    inner = document["spec"]["template"]["spec"]
    (main,) = inner["containers"]
    assert main["resources"]["limits"]["nvidia.com/gpu"] == "1" and main["stdin"] and main["tty"]
    assert (k8s.ROOT / main["command"][1].removeprefix("/opt/sanbu/")).is_file()
    trained = pod.read_recipe(str(k8s.ROOT / "configs/single_gpu/opt-1.3b.yaml"))["ppo"]["output_dir"]
    assert main["command"][2:] == ["--path", trained]
    assert not (k8s.COMMITTED / "deepspeedjob/multi_node/opt-66b/5-chat.yaml").exists()  # 132 GB do not go on one card


def test_a_step_waits_for_what_it_reads():
    inner = manifest("deepspeedjob", "single_node/opt-13b", ("3",))["spec"]["worker"]["template"]["spec"]
    recipe = pod.read_recipe(str(k8s.ROOT / "configs/single_node/opt-13b.yaml"))
    (first,) = inner["initContainers"]
    assert first["command"][first["command"].index("--folder") + 1 :] == [recipe[name]["output_dir"] for name in ("sft", "reward")]
    assert not any("/" in name for name in first["resources"]["limits"])
    assert "initContainers" not in manifest("deepspeedjob", "single_node/opt-13b", ("1",))["spec"]["worker"]["template"]["spec"]


# -------------------------------------------------------------------------------------- commands, read by their own parsers


def commands() -> list[list[str]]:
    """Every command line of ours in the committed set, split into words."""
    found = []
    for document in committed():
        text = document["spec"].get("config", {}).get("customCommand")
        found += [shlex.split(text)] if text else []
        inner = [one for template in templates(document) for one in template["spec"]["containers"]]
        inner += [one for template in templates(document) for one in template["spec"].get("initContainers", [])]
        inner += [document["spec"]["trainer"]] if document["kind"] == "TrainJob" else []
        found += [one["command"] for one in inner if "command" in one]
    return [words[words.index("python") :] for words in found if "scripts.pod" in words]


def test_the_commands_are_accepted_by_those_who_read_them(monkeypatch):
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    launchers = set()
    for words in commands():
        cut = words.index("--") if "--" in words else len(words)
        args = pod.build_parser().parse_args(words[3:cut])
        launcher = [word.replace("$OMPI_COMM_WORLD_RANK", "1") for word in words[cut + 1 :]]
        if args.command != "run":
            continue
        launchers.add(launcher[0])
        for step in args.step:
            module = [pod.MODULES[pod.SECTIONS[step]], "--config", args.recipe, *pod.USUAL_FLAGS]
            if launcher[0] == "torchrun":
                seen = get_args_parser().parse_args([*launcher[1:], *module])
                assert seen.module and seen.training_script == module[0] and seen.training_script_args == module[1:]
            else:
                seen = parse_args([*launcher[1:], *module])
                assert seen.module and seen.user_script == module[0] and seen.master_port == 29517
                assert seen.hostfile == "/t9k/hostfile"
    assert launchers == {"torchrun", "deepspeed"}


def test_every_platform_gets_its_own_devices_and_variables():
    for name, platform in load_platforms().items():
        document = manifest("pytorchjob", f"{name}/opt-1.3b", ("1",))
        main = trainer_of(document)
        variables = {one["name"]: one["value"] for one in main["env"]}
        for variable, value in {**platform.env, **(platform.env_several_nodes if platform.nodes > 1 else {})}.items():
            assert variables[variable] == value.replace("${USER}", "sanbu")
        assert variables["DS_ACCELERATOR"] == platform.accelerator
        devices = {key: value for key, value in main["resources"]["limits"].items() if "/" in key}
        wanted = {} if platform.accelerator == "cpu" else {platform.kubernetes["resource"]: str(platform.devices)}
        assert devices == wanted and document["spec"]["nprocPerNode"] == str(platform.devices)
        assert set(platform.kubernetes["host_paths"]) <= {mount["mountPath"] for mount in main["volumeMounts"]}
        assert main["image"] == platform.kubernetes["image"]
        memory = int(main["resources"]["limits"]["memory"].removesuffix("Gi"))
        assert platform.host_memory_gib / 2 <= memory <= platform.host_memory_gib


@pytest.mark.parametrize("kind", ["deepspeedjob", "pytorchjob", "mpijob", "trainjob"])
def test_pods_with_cards_go_to_the_nodes_that_are_named(kind, schemas):
    where = ("--node-selector", "pool=a100", "example.com/zone=b", "--toleration", "nvidia.com/gpu", "team=nlp:NoSchedule")
    files = k8s.render(job(kind, "single_node/opt-13b", *where))
    document = files["3-train.yaml"][0]
    assert problems(document) == []
    if document["kind"] in schemas:
        assert not list(jsonschema.Draft202012Validator(schemas[document["kind"]]).iter_errors(document))
    selector = {"pool": "a100", "example.com/zone": "b"}
    tolerations = [
        {"key": "nvidia.com/gpu", "operator": "Exists"},
        {"key": "team", "operator": "Equal", "value": "nlp", "effect": "NoSchedule"},
    ]
    words = json.dumps({"nodeSelector": selector, "tolerations": tolerations})[1:-1]
    placed = {name: json.dumps(found).count(words) for name, found in files.items()}
    assert placed["3-train.yaml"] == placed["5-chat.yaml"] == 1, "workers, not MPIJob's launcher, which has no card"
    assert placed["2-download.yaml"] == placed["4-tensorboard.yaml"] == 0


PATCHES = [
    ("2.0", "podSpecOverrides"), ("2.1", "podTemplateOverrides"), ("2.2", "runtimePatches"), ("2.3", "runtimePatches"),
]  # fmt: skip


@pytest.mark.parametrize("version, field", PATCHES)
def test_a_trainjob_patches_pods_as_its_version_does(version, field):
    document = manifest("trainjob", flags=("--trainer-version", version))
    assert {"podSpecOverrides", "podTemplateOverrides", "runtimePatches"} & document["spec"].keys() == {field}
    assert problems(document) == []
    (patch,) = document["spec"][field]
    if version >= "2.2":
        assert ("terminationGracePeriodSeconds" in str(patch)) == (version == "2.3")  # the CRD of 2.2 refuses it
        (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        inner, target = replicated["template"]["spec"]["template"]["spec"], replicated["name"]
    else:
        inner, target = (patch if version == "2.0" else patch["spec"]), patch["targetJobs"][0]["name"]
        # What these versions cannot say; their CRDs refuse it.
        assert set(inner) - {"targetJobs"} == {"containers", "volumes"} and set(inner["containers"][0]) == {"name", "volumeMounts"}
    assert target == inner["containers"][0]["name"] == "node"
    assert {mount["mountPath"] for mount in inner["containers"][0]["volumeMounts"]} == {"/workspace", "/dev/shm"}


# ------------------------------------------------------------------------------------------------------------ wrong input


def change(document: dict, path: str, value) -> None:
    """Set one field; a value of None removes it. T stands for the training container."""
    *places, last = path.split("/")
    for place in places:
        document = trainer_of(document) if place == "T" else document[int(place) if place.isdigit() else place]
    last = int(last) if last.isdigit() else last
    if value is None:
        del document[last]
    else:
        document[last] = value


POD = "spec/worker/template/spec"
BROKEN = [
    ("deepspeedjob", f"{POD}/containers/0/comand", ["x"], "did you mean command"),
    ("deepspeedjob", f"{POD}/containers/0/env/0/value", 1, "put it in quotes"),
    ("deepspeedjob", "spec/config/slotPerWorker", 8, "did you mean slotsPerWorker"),
    ("deepspeedjob", "spec/config/run/python", "main.py", "expected a list"),
    ("deepspeedjob", "spec/config/run/exec", ["x"], "exactly one of"),
    ("deepspeedjob", "spec/config/run", {}, "exactly one of"),
    ("deepspeedjob", "spec/config/slotsPerWorker", 4, "8 devices in its limits"),
    ("deepspeedjob", "spec/config/otherArgs", [], "--master_port"),
    ("deepspeedjob", "spec/config/otherArgs", ["--master_port=1", "--no_local_rank"], "field of its own"),
    ("deepspeedjob", "spec/elastic", {"enabled": True}, "no elastic training"),
    ("deepspeedjob", f"{POD}/containers/0/volumeMounts/1/mountPath", "/root/.ssh", "hides /root/.ssh"),
    ("deepspeedjob", f"{POD}/containers/0/volumeMounts/1/mountPath", "/tmp/shm", "/dev/shm has 64 MB"),
    ("deepspeedjob", f"{POD}/volumes/1/emptyDir/sizeLimit", "2Ti", "above the memory limit"),
    ("deepspeedjob", f"{POD}/volumes/0", {"name": "work", "emptyDir": {}}, "no PVC is mounted"),
    ("deepspeedjob", f"{POD}/volumes", [], "no PVC is mounted"),
    ("deepspeedjob", f"{POD}/containers/0/volumeMounts/0/name", "worK", "did you mean work"),
    ("deepspeedjob", f"{POD}/containers/0/resources/requests/nvidia.com~gpu", None, None),
    ("deepspeedjob", f"{POD}/containers/0/resources/requests/memory", "2Ti", "above its limit"),
    ("deepspeedjob", f"{POD}/containers/0/resources/limits/memory", "lots", "is no quantity"),
    ("deepspeedjob", f"{POD}/containers/0/resources/limits/memory", None, "no memory in its limits"),
    ("deepspeedjob", f"{POD}/containers/0/image", "sanbu", "a tag other than latest"),
    ("deepspeedjob", f"{POD}/containers/0/image", "host:5000/sanbu:latest", "a tag other than latest"),
    ("deepspeedjob", f"{POD}/containers/0/env/0/name", "RANK", "set for each process"),
    ("deepspeedjob", "metadata/name", "opt-1.3b", "DNS-1123"),
    ("deepspeedjob", "metadata/name", "x" * 60, "its pods append to it"),
    ("deepspeedjob", "kind", "DeepspeedJob", "did you mean DeepSpeedJob"),
    ("pytorchjob", "spec/nprocPerNode", 8, "expected a text"),
    ("pytorchjob", "spec/nprocPerNode", None, "is missing"),
    ("pytorchjob", "T/name", "worker", "must be named pytorch"),
    ("pytorchjob", "T/ports", [], "pytorchjob-port"),
    ("pytorchjob", "spec/pytorchReplicaSpecs/Master/replicas", 2, "exactly 1"),
    ("trainjob", "spec/trainer/numProcPerNode", "8", "expected a whole number"),
    ("trainjob", "spec/trainer/numProcPerNode", 4, "make them equal"),
    ("trainjob", "spec/runtimePatches", None, "no PVC is mounted"),
    ("trainjob", "spec/podSpecOverrides", [], "different versions"),
    ("trainjob", "spec/runtimeRef/name", "", "torch-distributed"),
    ("mpijob", "spec/slotsPerWorker", 2, "make them equal"),
    ("mpijob", "spec/mpiReplicaSpecs/Worker/replicas", 3, "there are 3 workers"),
    ("mpijob", "spec/mpiReplicaSpecs/Launcher/replicas", 2, "exactly 1"),
    ("mpijob", "T/volumeMounts/1/mountPath", "/etc/mpi", "hides /etc/mpi"),
]


@pytest.mark.parametrize("kind, path, value, said", BROKEN, ids=[f"{kind} {path} {value}"[:70] for kind, path, value, _ in BROKEN])
def test_what_is_wrong_is_found(kind, path, value, said):
    document = manifest(kind)
    assert problems(document) == []
    if path.endswith("nvidia.com~gpu"):
        main = trainer_of(document)
        main["resources"]["requests"]["nvidia.com/gpu"] = "4"
        said = "must be the same in both"
    else:
        change(document, path, value)
    assert any(said in sentence for sentence in problems(document)), problems(document)


def test_check_names_file_and_document(tmp_path, capsys):
    good, bad = manifest("pytorchjob"), manifest("mpijob")
    del bad["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["volumes"][0]
    (tmp_path / "two.yaml").write_text(k8s.to_yaml([good, bad]))
    assert k8s.main(["check", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "two.yaml, document 2 (MPIJob sanbu-opt-13b-reward): Worker: no PVC is mounted" in told and "document 1" not in told
    (tmp_path / "two.yaml").write_text("a: [1\nb: 2\n")
    assert k8s.main(["check", str(tmp_path)]) == 2 and "two.yaml, line 2: not valid YAML" in capsys.readouterr().err


RECIPE = "configs/single_gpu/opt-1.3b.yaml"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--kind", "pytorchjobs", "--recipe", RECIPE], "did you mean pytorchjob"),
        (["--kind", "mpijob", "--recipe", "dcu_z100l/opt-1.3"], "did you mean opt-1.3b"),
        (["--kind", "mpijob", "--recipe", RECIPE, "--step", "4"], "--step 4 is unknown"),
        (["--kind", "mpijob", "--recipe", RECIPE, "--pvc", ""], "--pvc is empty"),
        (["--kind", "mpijob", "--recipe", RECIPE, "--memory", "much"], "no quantity"),
        (["--kind", "mpijob", "--recipe", RECIPE, "--memory", "2Gi", "--shm", "4Gi"], "above the memory limit"),
        (["--kind", "mpijob", "--recipe", RECIPE, "--image", "sanbu"], "a tag other than latest"),
        (["--kind", "mpijob", "--recipe", RECIPE, "--name", "Opt_1.3b"], "such as opt-1-3b"),
        (["--kind", "mpijob", "--recipe", RECIPE, "--name", "x" * 48], "shorter --name"),
        (["--kind", "mpijob", "--recipe", RECIPE, "--priority", "5"], "DeepSpeedJob only"),
        (["--kind", "mpijob", "--recipe", RECIPE, "--flags=--max_step 3"], "did you mean --max_steps"),
        (["--kind", "trainjob", "--recipe", RECIPE, "--trainer-version", "1.9"], "--trainer-version 1.9"),
        (["--kind", "trainjob", "--recipe", RECIPE, "--queue", "q"], "no field for --queue"),
        (["--kind", "mpijob", "--recipe", RECIPE, "--node-selector", "pool"], "--node-selector pool: write KEY=VALUE"),
        (["--kind", "mpijob", "--recipe", RECIPE, "--toleration", "a=b:Never"], "--toleration a=b:Never: write KEY"),
    ],
)
def test_render_refuses_in_one_sentence(words, said, capsys, repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert k8s.main(["render", *words]) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.startswith("error: ") and told.err.count("\n") == 1 and not told.out


@pytest.mark.parametrize("kind, recipe", k8s.SETS)
def test_pods_have_the_memory_that_the_plan_asks_for(kind, recipe):
    made = job(kind, recipe)
    needed = host_gib(made, "3")  # PPO takes most of a host: four models, and optimizers that live there
    assert needed is not None and 1 < needed <= made.memory_gib - quantity(made.shm) / 2**30


def test_a_pod_with_too_little_memory_is_refused(capsys):
    """The S0 scripts keep both optimizers of 6.2e9 weights on the host: 16 bytes a weight each, 184 GiB (hardware.md 7.5)."""
    recipe = str(k8s.ROOT / "configs/dcu_z100l/chatglm-6b.yaml")
    words = ["render", "--kind", "deepspeedjob", "--recipe", recipe, "--step", "3", "--memory", "150Gi"]
    assert k8s.main(words) == 2
    told = capsys.readouterr().err
    assert "but a pod has 150 GiB" in told and int(told.split("--memory ")[1].split("Gi")[0]) > 184


def test_a_recipe_is_checked_before_a_pod_reads_it(tmp_path, capsys):
    recipe = tmp_path / "own.yaml"
    content = yaml.safe_dump(load_recipe(str(k8s.ROOT / RECIPE)), sort_keys=False)
    recipe.write_text(content.replace("max_seq_len", "max_seq_lenn", 1))
    words = ["render", "--kind", "pytorchjob", "--recipe", str(recipe), "--recipe-in-pod", "/workspace/own.yaml"]
    assert k8s.main(words) == 2 and "did you mean --max_seq_len" in capsys.readouterr().err
    recipe.write_text(content)
    assert k8s.main(words[:-2]) == 2 and "--recipe-in-pod" in capsys.readouterr().err
    assert k8s.main([*words, "--out", str(tmp_path / "out"), "--namespace", "team"]) == 0
    made = list(yaml.safe_load_all((tmp_path / "out/3-train.yaml").read_text()))
    assert "/workspace/own.yaml" in trainer_of(made[0])["command"] and made[0]["metadata"]["namespace"] == "team"
    assert "step3_ppo.yaml" in {path.name for path in (tmp_path / "out/steps").iterdir()}


def test_on_the_terminal_the_chain_stands_without_the_single_steps(capsys):
    assert k8s.main(["render", "--kind", "deepspeedjob", "--recipe", str(k8s.ROOT / RECIPE)]) == 0
    kinds = [document["kind"] for document in yaml.safe_load_all(capsys.readouterr().out)]
    assert kinds == ["PersistentVolumeClaim", "Job", "DeepSpeedJob", "Deployment", "Service", "Deployment"]


def test_quantities():
    assert [quantity(text) for text in ("500m", "8", 8, "64Gi", "2Ti", "1k", "1.5M")] == [0.5, 8, 8, 2**36, 2**41, 1000, 1.5e6]
    with pytest.raises(UserError):
        quantity("64 GB")


def test_the_two_guides_name_the_same_commands_and_they_are_understood(repository):
    texts = [(repository / "docs" / name).read_text(encoding="utf-8") for name in ("en/kubernetes.md", "zh/kubernetes.md")]
    ours = ("python -m", "kubectl", "docker")
    english, chinese = ([line.split("#")[0].strip() for line in text.splitlines() if line.startswith(ours)] for text in texts)
    assert english == chinese and len(english) == 7
    for line in english:
        if line.startswith("python"):
            made = k8s.make_job(k8s.build_parser().parse_args(shlex.split(line)[3:]))
            names = {one["metadata"]["name"] for documents in k8s.render(made).values() for one in documents}
            objects = [word for line in english for word in line.split() if re.match("(job|service|deployment)/", word)]
            assert len(objects) == 3 and {word.split("/")[1] for word in objects} <= names
        for file in [word for word in line.split() if word.endswith(".Dockerfile")]:
            assert (repository / file).is_file()


@pytest.mark.parametrize(
    "recipe, resource, wanted", [("dcu_z100l/chatglm-6b", "hygon.com/dcu", "8"), ("single_node/opt-1.3b", "nvidia.com/gpu", "1")]
)
def test_whoever_sees_all_cards_asks_for_all(recipe, resource, wanted):
    """/dev/dri shows every card of the host: with one asked for, two dialogues and a training would meet on card 0."""
    (chat,) = render_parts.chat(job("pytorchjob", recipe))
    asked = chat["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert asked["requests"][resource] == asked["limits"][resource] == wanted
