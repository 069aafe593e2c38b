"""scripts/doctor: judgements of played facts, tools that fail or hang, and the whole command."""

import json
import socket
import time
from pathlib import Path
from threading import Barrier, Event
from types import SimpleNamespace

import pytest

from errors import UserError
from scripts.doctor import __main__ as doctor
from scripts.doctor import cluster, machine, probe, versions
from scripts.doctor.result import MARK, Check, Situation, ask
from scripts.launch.commands import build_environment
from scripts.launch.options import Options
from scripts.launch.platforms import load_platforms, platform_named
from scripts.plan.known import config_of
from scripts.plan.section import plan_section
from training.utils.flags.parse import parse
from training.utils.flags.recipe import Recipe
from training.utils.flags.steps import SFTArguments
from training.utils.memory.arithmetic import Machine
from training.utils.memory.fit import section_plan
from training.utils.run.environment import free_port

pytestmark = pytest.mark.fast

GIB = 2**30


def packages(*numbers: str) -> dict[str, str]:
    return dict(zip(("torch", "transformers", "deepspeed"), numbers, strict=True))


VERSIONS = packages("2.4.0", "5.0.0", "0.14.4")
CPU = {"platform": "cpu", "torch_device": "cpu", "backend": "gloo", "cards": [], "build": {"cuda": None, "hip": None}}
CARD = {"name": "A100", "chip": "sm80", "total": 80 * GIB, "free": 79 * GIB}
CUDA = {"platform": "cuda", "torch_device": "cuda", "backend": "nccl", "cards": [CARD, CARD], "build": {"cuda": "12.4"}}


def situation(name: str | None = None, environ: dict[str, str] | None = None, recipe: dict | None = None, **facts) -> Situation:
    """Return a situation on a platform, with the facts as a probe gives them."""
    sections = Recipe("recipe.yaml", recipe) if recipe else None
    return Situation(environ or {}, 2.0, platform_named(name) if name else None, recipe=sections, facts=facts)


def states(checks: list[Check] | Check) -> dict[str, str]:
    """Return name -> state. No name stands twice, and all but good news comes with advice."""
    checks = [checks] if isinstance(checks, Check) else checks
    found = {check.name: check.state for check in checks}
    assert len(found) == len(checks)
    assert all(check.todo for check in checks if check.state in ("warn", "fail"))
    return found


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path):
    answer = ask(["sh", "-c", f"sleep 300 & echo $! > {tmp_path}/child; wait"], 0.5, {"PATH": "/usr/bin:/bin"})
    assert answer == (None, "no answer within 0.5 seconds")
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    while child.exists() and child.read_text().split()[2] != "Z":  # the test's own limit ends it
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("script", "answer", "why"),
    [
        (f"echo noise; echo '{MARK}{{\"a\": 1}}'", {"a": 1}, ""),
        (f"echo '{MARK}{{}}'; echo '{MARK}{{\"error\": \"RuntimeError: x\"}}'", None, "RuntimeError: x"),
        ("printf 'Traceback (most recent call last):\\n  File\\nValueError: y\\n' >&2", None, "ValueError: y"),
        ("echo 'Permission denied' >&2; echo more >&2; exit 255", None, "Permission denied"),
        ("exit 3", None, "exit code 3"),
    ],
)
def test_answers_and_reasons(script, answer, why):
    assert ask(["sh", "-c", script], 60, {"PATH": "/usr/bin:/bin"}) == (answer, why)


@pytest.mark.parametrize(
    ("platform", "facts", "expected"),
    [
        (None, CPU, {"detected": "ok"}),
        (None, {"error": "no torch"}, {"detected": "fail"}),
        (None, CUDA, {"detected": "ok", "card 0": "ok", "card 1": "ok"}),
        ("single_node", CUDA | {"cards": [CARD | {"free": 40 * GIB}]}, {"detected": "ok", "card 0": "warn"}),
        ("single_node", CUDA | {"cards_error": "busy", "cards": []}, {"detected": "ok", "cards": "fail"}),
        ("single_node", CPU, {"detected": "fail"}),
        ("cpu", CPU | {"refused": "DS_ACCELERATOR=npu, but …"}, {"detected": "fail"}),
        ("dcu_z100l", CUDA, {"detected": "warn"}),
    ],
)
def test_platform(platform, facts, expected):
    assert states(machine.check_platform(situation(platform, **facts))) == expected


@pytest.mark.parametrize(
    ("platform", "installed", "tools", "expected"),
    [
        (None, packages("2.13.0+cpu", "5.23.0", "0.19.8"), {}, "ok ok ok"),
        (None, packages("2.4.0", "5.0.0", "0.14.2"), {}, "ok ok warn"),
        (None, packages("2.4.0", "5.0.0", "0.14.3"), {}, "ok ok fail"),
        (None, packages("2.4.1+das.dtk2504", "5.0.0", "0.14.2+das.dtk2504"), {}, "ok ok ok"),
        (None, packages("2.4.1+das.dtk2504", "5.23.0", "0.14.2+das.dtk2504"), {}, "ok fail ok"),
        (None, packages("2.5.1", "5.15.1", "0.19.8"), {}, "ok ok ok"),
        (None, packages("2.5.1", "5.20.2", "0.19.8"), {}, "ok fail ok"),
        (None, {"torch": "9.0.0", "deepspeed": "0.13.0"}, {}, "warn fail fail"),
        ("single_node", {}, {"driver": "535", "toolkit": "12.1"}, "ok"),
        ("single_node", {}, {"driver": "535", "toolkit": "11.8"}, "warn"),
        ("single_node", {}, {"driver": None, "toolkit": None}, "warn"),
        ("dcu_z100l", {"torch": "2.4.1+das.opt2.dtk2504"}, {"driver": "6.2.26", "toolkit": "25.04.1"}, "ok ok"),
        ("dcu_z100l", {"torch": "2.4.1+das.opt2.dtk2504"}, {"driver": "5.16.29", "toolkit": "25.04"}, "fail ok"),
        ("dcu_z100l", {"torch": "2.4.1+das.opt2.dtk2504"}, {"driver": "6.2.26", "toolkit": "24.04"}, "ok fail"),
        ("dcu_z100l", {"torch": "2.3.0+das.dtk2504"}, {"driver": "6.2.26", "toolkit": "25.04"}, "ok warn"),
        ("dcu_z100l", {"torch": "2.4.1+cu121"}, {"driver": None, "toolkit": None}, "warn warn"),
        ("ascend_910", {"torch": "2.9.0+cpu", "torch_npu": "2.9.0"}, {"toolkit": "8.5.0"}, "ok ok"),
        ("ascend_910", {"torch": "2.5.1", "torch_npu": "2.4.0"}, {"toolkit": "8.0.RC3"}, "fail ok"),
        ("ascend_910", {"torch": "2.4.0", "torch_npu": "2.4.0.post4"}, {"toolkit": "8.0.0"}, "ok warn"),
        ("ascend_910", {"torch": "2.4.0", "torch_npu": "2.4.0"}, {"toolkit": "3.0"}, "ok warn"),
        ("ascend_910", {"torch": "2.4.0", "torch_npu": "2.4.0"}, {"toolkit": None}, "ok warn"),
        ("ascend_910", {"torch": "2.4.0"}, {"toolkit": "8.0.0"}, "fail"),
    ],
)
def test_versions_that_go_together(platform, installed, tools, expected):
    """expected: the states of what the platform's vendor has a table for, else of the three packages."""
    broken = {"deepspeed": "ImportError"} if installed.get("deepspeed") == "0.14.3" else {}
    here = situation(platform, versions=installed, tools=tools, build={"cuda": "12.4"}, **{"import": broken})
    found = states(versions.check_versions(here))
    own = {name: state for name, state in found.items() if (name in VERSIONS) == (platform is None)}
    assert " ".join(own.values()) == expected


def test_versions_of_toolkits_and_drivers(tmp_path, monkeypatch):
    (tmp_path / "dtk/.info").mkdir(parents=True)
    (tmp_path / "dtk/.info/version").write_text("25.04.1\n")
    (tmp_path / "cann/aarch64-linux").mkdir(parents=True)
    (tmp_path / "cann/aarch64-linux/ascend_toolkit_install.info").write_text("package_name=toolkit\nversion=8.0.RC3\n")
    (tmp_path / "rocm-smi").write_text("#!/bin/sh\necho ===; echo 'Driver version: 6.2.26'\n")
    (tmp_path / "rocm-smi").chmod(0o755)
    for name, value in (("ROCM_HOME", "dtk"), ("ASCEND_TOOLKIT_HOME", "cann")):
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe.tools("dcu") == {"toolkit": "25.04.1", "driver": "6.2.26"}
    assert probe.tools("npu") == {"toolkit": "8.0.RC3", "driver": None}
    (tmp_path / "rocm-smi").unlink()
    assert probe.dcu_driver() is None


def chip(name: str, table: list[str], **more) -> dict:
    return {"chip": name, "table": table, "works": {"fp16": True, "bf16": True}, "first_ascend": False, "attention": "sdpa"} | more


@pytest.mark.parametrize(
    ("found", "asked", "expected"),
    [
        (chip("gfx906", ["fp16", "fp32"]), "bf16", {"probe": "ok", "recipe": "fail"}),
        (chip("gfx906", ["fp16", "fp32"]), "auto", {"probe": "ok"}),
        (chip("sm80", ["bf16", "fp16", "fp32"], works={"fp16": True, "bf16": False}), "fp16", {"probe": "warn"}),
        (chip("Ascend910ProA", ["fp16", "fp32"], first_ascend=True), "auto", {"probe": "ok", "overflow": "warn"}),
    ],
)
def test_dtypes(found, asked, expected):
    here = situation(recipe={"launch": {}, "sft": {"dtype": "fp16"}, "ppo": {"dtype": asked}}, dtypes=found)
    assert states(machine.check_dtype(here)) == expected
    assert states(machine.check_dtype(situation(dtypes_error="RuntimeError: driver"))) == {"probe": "fail"}


@pytest.fixture(scope="module")
def small_plan(llama):
    """Return the plan of a tiny network in 16 bits with offloaded optimizer states."""
    words = f"--model_name_or_path {llama} --data_path x --output_dir x --zero_stage 2 --offload_optimizer --max_seq_len 64"
    computer = Machine(8, 8, 80.0 * GIB, 512.0 * GIB)
    args = parse(SFTArguments, words.split())
    return section_plan(args, {"model": config_of(str(llama))}, computer, dtype="fp16", attention="sdpa")


@pytest.mark.parametrize(("share", "state"), [(2.1, "ok"), (1.5, "warn"), (0.5, "fail")])
def test_disk(tmp_path, monkeypatch, small_plan, share, state):
    """Count 12 bytes a weight in a checkpoint, two of them at the moment of writing, and the model itself."""
    needed = machine.disk_bytes(small_plan, 1)
    assert needed == (2 * 12 + 2) * small_plan.memory.network("model").weights.total
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=share * needed))
    sections = ("sft", "reward", "dpo")
    flags = {name: {"output_dir": str(tmp_path / "new" / name), "save_total_limit": 1} for name in sections}
    checks = machine.check_disk(situation(recipe=flags), dict.fromkeys(sections, small_plan))
    assert states(checks) == {"checkpoints": state} and str(tmp_path) in checks[0].why
    assert states(machine.check_shm(tmp_path)) == {"/dev/shm": "warn"}  # a few MB of it are free
    assert states(machine.check_shm(tmp_path / "none")) == {"/dev/shm": "skip"}


def test_all_reduce(monkeypatch):
    asked = []

    def played(part, backend, *, situation, launcher):
        asked.append((backend, launcher[3]))
        return None, "RuntimeError: Connection reset"

    monkeypatch.setattr(machine, "probe", played)
    for facts in (CUDA, CUDA | {"cards": [CARD]}, CPU):
        check = machine.check_all_reduce(situation(**facts))
        assert states(check) == {"all-reduce": "fail"} and "Connection reset" in check.why
    assert asked == [("nccl", "2"), ("nccl", "1"), ("gloo", "2")]


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """Return nodes(ssh script) -> a situation with two hosts. Without a script there is no ssh on its PATH."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(script: str | None = None, platform: str = "multi_node", environ: dict | None = None, **options) -> Situation:
        if script is not None:
            (folder / "ssh").write_text(f"#!/bin/bash\n{script}\n")
            (folder / "ssh").chmod(0o755)
        hosts = {"node-1": 1, "node-2": 1}
        made = Options(platform_named(platform), hosts=hosts, **{"master_addr": "127.0.0.1"} | options)
        shell = {"PATH": f"{folder}", "HOME": str(tmp_path / "home"), "USER": "me"} | (environ or {})
        environment = build_environment(made, shell)
        return Situation(shell, 5.0, platform_named(platform), made, environment, facts={"versions": VERSIONS})

    return make


def test_hostfile(nodes, monkeypatch, capsys):
    assert states(cluster.check_hostfile(nodes(), {"node-1": 8, "node-2": 4})) == {"hostfile": "ok"}
    assert states(cluster.check_hostfile(nodes(), {})) == {"hostfile": "warn"}
    assert states(cluster.check_hostfile(Situation({}), {})) == {"hostfile": "skip"}
    Path("hosts").write_text("node-1 slots=8\nnode-2 slot=8\n")
    for file, words in (("hosts", "line 2"), ("none", "No such file")):
        with pytest.raises(UserError, match=words):
            doctor.main(["--hostfile", file])
    monkeypatch.setattr(doctor, "probe", lambda *_, **__: (None, "ModuleNotFoundError: No module named 'torch'"))
    assert doctor.main(["--json"]) == 2
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert "No module named 'torch'" in checks["detected"]["why"]  # and the rest is looked at
    assert checks["all-reduce"]["state"] == "skip" and "/dev/shm" in checks


def test_checks_run_side_by_side_in_a_stable_order_and_one_that_hangs_is_named(monkeypatch, capsys, tmp_path):
    """Each of three waits for the others to begin; the plan never ends."""
    together, for_ever = Barrier(3, timeout=60), Event()
    monkeypatch.setattr(machine, "probe", lambda *_, **__: ({}, "together" if together.wait() < 0 else ""))
    monkeypatch.setattr(doctor.cluster, "check_hosts", lambda *_: [Check("cluster", f"hosts {together.wait() > 2}", "ok", "")])
    monkeypatch.setattr(machine, "plans_of", lambda _: for_ever.wait())

    def played(part, *_, **__):
        return ({"import": {}}, "") if part == "packages" and together.wait() < 3 else (CPU, "")

    monkeypatch.setattr(doctor, "probe", played)
    assert doctor.main(["--timeout", "0.05", "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    late = next(check for check in checks if check["group"] == "memory")
    assert late["state"] == "warn" and "0.5 seconds" in late["why"]
    names = [check["name"] for check in checks if check["group"] in ("communication", "cluster")]
    assert names == ["hostfile", "all-reduce", "port", "hosts False"]


# Answers as a host does, with the versions that VERSIONS says and the way back walked by bash.
ANSWER = json.dumps({"versions": VERSIONS, "cards": 1})[:-1]
HERE = f"""way=${{@: -1}}; port=${{way##* }}; lost=''
(exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null || lost=', "unreachable": "refused"'
printf '%s, "clock": %s%s}}\\n' '{MARK}{ANSWER}' $(/bin/date +%s) "$lost" """


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        ({}, "ok", "answers"),
        ({"versions": VERSIONS | {"deepspeed": "0.15.0"}}, "fail", "deepspeed 0.15.0, here 0.14.4"),
        ({"cards": 4}, "fail", "slots=8, but it has 4 cards"),
        ({"unreachable": "refused"}, "fail", "it cannot reach the master's port: refused"),
        ({"clock": 0.0}, "warn", "its clock"),
    ],
)
def test_a_host_is_judged_by_its_answer(changes, state, words):
    answer = {"versions": VERSIONS, "cards": 8, "clock": time.time()} | changes
    check = cluster.judge_host("node-2", 8, answer, "", VERSIONS)
    assert states(check) == {"node-2": state} and words in check.why


def test_what_a_host_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = probe.host("127.0.0.1", str(server.getsockname()[1]))
    assert states(cluster.judge_host("a", 1, answer, "", probe.versions())) == {"a": "ok"}
    assert "unreachable" in probe.host("127.0.0.1", str(free_port()))


def test_no_host_is_asked_without_ssh(nodes):
    for options in ({}, {"script": "exit 1", "launcher": "torchrun"}):
        here = nodes(**options)
        assert states(cluster.check_hosts(here, here.options.hosts)) == {"hosts": "skip"}


@pytest.mark.parametrize(
    ("given", "hostfile", "state"),
    [
        ("127.0.0.1", ["a", "b"], "ok"),
        ("::1", ["a", "b"], "ok"),
        (None, ["127.0.0.1", "b"], "fail"),  # the others would call themselves
        ("no-such-host.invalid", ["a", "b"], "fail"),
        (None, ["127.0.0.1"], None),
    ],
)
def test_master_address(nodes, given, hostfile, state):
    here = nodes(master_addr=given)
    here.options.hosts = dict.fromkeys(hostfile, 1)
    checks, address = cluster.check_master_address(here, here.options.hosts)
    assert [check.state for check in checks] == ([state] if state else [])
    assert address == (given if state == "ok" else None)


def test_ports(nodes):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert states(cluster.check_ports(nodes(master_port=port))) == {"port": "fail"}
        checks = cluster.check_ports(nodes(platform="ascend_910", environ={"HCCL_IF_BASE_PORT": str(port)}))
        assert states(checks)["HCCL ports"] == "warn"
        assert str(port) in checks[1].why
    assert states(cluster.check_ports(nodes(master_port=port))) == {"port": "ok"}
    assert states(cluster.check_ports(Situation({}))) == {"port": "skip"}


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        ("CUDA_VISIBLE_DEVICE CUDA_VISBLE_DEVICES CUDAVISIBLE_DEVICES cuda_visible_devices", "CUDA_VISIBLE_DEVICES"),
        ("ASCEND_RT_VISIBLE_DEVICE", "ASCEND_RT_VISIBLE_DEVICES"),
        ("NCCL_SOCKET_IFNAMES", "NCCL_SOCKET_IFNAME"),
        ("HSA_FORCE_FINEGRAIN_PCIE", "HSA_FORCE_FINE_GRAIN_PCIE"),
        ("PATH NCCL_NVB_DISABLE HCCL_ALGO CUDA_CACHE_PATH NVIDIA_VISIBLE_DEVICES ASCEND_VISIBLE_DEVICES MASTER_PORT", ""),
        ("TORCH_HCCL_ASYNC_ERROR_HANDLING PYTORCH_NPU_ALLOC_CONF MKL_NUM_THREADS HF_TOKEN HF_HUB_CACHE RANK PORT", ""),
        ("TP_SOCKET_IFNAME NCCL_P2P_DISABLE HCCL_EXEC_TIMEOUT HCCL_CONNECT_TIMEOUT HCCL_EVENT_TIMEOUT http_proxy", ""),
    ],
)
def test_misspelt_names(names, meant):
    """Say nothing of the platforms' own names, of those that programs read, and of those that only look alike."""
    own = [name for platform in load_platforms().values() for name in (*platform.env, *platform.env_several_nodes)]
    assert cluster.check_spelling(dict.fromkeys(own, "1")) == []
    checks = cluster.check_spelling(dict.fromkeys(names.split(), "0"))
    assert [check.todo for check in checks] == ([f"did you mean {meant}?"] * len(names.split()) if meant else [])


@pytest.mark.parametrize(
    ("platform", "environ", "expected"),
    [
        ("single_node", {"CUDA_VISIBLE_DEVICES": "4,5"}, set()),
        ("single_node", {"CUDA_VISIBLE_DEVICES": ""}, {"warn"}),
        ("single_node", {"HIP_VISIBLE_DEVICES": "0"}, {"warn"}),
        ("dcu_z100l", {"HIP_VISIBLE_DEVICES": "4,5"}, set()),
        ("dcu_z100l", {"HIP_VISIBLE_DEVICES": "4", "CUDA_VISIBLE_DEVICES": "4"}, {"warn"}),
        ("ascend_910", {"ASCEND_RT_VISIBLE_DEVICES": "0,1,10"}, set()),
        ("ascend_910", {"ASCEND_RT_VISIBLE_DEVICES": "10, 2,1"}, {"fail"}),
        ("ascend_910", {"ASCEND_RT_VISIBLE_DEVICES": "0-3"}, {"fail"}),
        ("ascend_910", {"CUDA_VISIBLE_DEVICES": "0"}, {"warn"}),
        ("cpu", {"CUDA_VISIBLE_DEVICES": ""}, set()),
    ],
)
def test_visible_devices(platform, environ, expected):
    checks = cluster.check_visible(situation(platform, environ))
    assert {check.state for check in checks} == expected
    assert all(check.todo for check in checks)


def test_forwarded(nodes):
    environ = {"HF_TOKEN": "secret", "NCCL_DEBUG": "INFO", "HF_HOME": 'a"b', "CUDA_VISIBLE_DEVICES": "0", "UNRELATED": "1"}
    check = cluster.check_forwarded(nodes(environ=environ))
    assert (check.state, check.why) == ("warn", "stay here: CUDA_VISIBLE_DEVICES, HF_HOME, HF_TOKEN")
    assert states(cluster.check_forwarded(nodes())) == {"forwarded": "ok"}
    assert states(cluster.check_forwarded(nodes(launcher="torchrun"))) == {"forwarded": "skip"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--platform", "dcu_z100"], "did you mean dcu_z100l"),
        (["--recipe", "dcu_z100l/chatglm-7b"], "did you mean chatglm"),
        (["--recipe", "none.yaml"], "no such file"),
        (["--timeout", "0"], "--timeout"),
        (["--build", "cpu_adam"], "ds_report"),
    ],
)
def test_wrong_flags(flags, words):
    with pytest.raises(UserError, match=words):
        doctor.main(flags)


def test_the_whole_command(llama, monkeypatch, capsys, tmp_path):
    """Look at a recipe for DCUs where there are none. The facts are asked for in this process, and no group is formed."""
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    asked = {}

    def here(part, *words, situation, **_):
        asked[part] = words
        answers = {"facts": probe.facts, "packages": probe.packages, "all_reduce": lambda _: {"processes": 2}}
        return answers[part](*words), ""

    monkeypatch.setattr(doctor, "probe", here)
    monkeypatch.setattr(machine, "probe", here)
    flags = f"model_name_or_path: {llama}, data_path: x, output_dir: {tmp_path / 'out'}, max_seq_len: 64"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"launch: {{platform: dcu_z100l}}\nsft: {{{flags}}}\nreward: {{{flags}, zero_stage: 9}}\n")
    assert doctor.main(["--recipe", str(recipe), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == 2
    checks = {f"{check['group']}: {check['name']}": check for check in report["checks"]}
    assert all(check["todo"] for check in checks.values() if check["state"] in ("warn", "fail"))
    assert asked == {"facts": ("dcu",), "packages": (), "all_reduce": ("gloo",)}
    assert checks["platform: detected"]["state"] == "fail" and "dcu_z100l" in checks["platform: detected"]["why"]
    assert checks["dtype: probe"]["why"].startswith("cpu trains in fp32")
    for name in ("recipe: launch", "communication: all-reduce", "disk: checkpoints"):
        assert checks[name]["state"] == "ok"
    expected = plan_section(Recipe.read(str(recipe)), "sft", platform_named("dcu_z100l")).plan
    sizes = f"{expected.on_card / GIB:.1f} of 30.0 GiB a card, {expected.on_host / GIB:.1f} of 512.0 GiB on the host"
    assert checks["memory: sft"]["why"] == f"computed: {sizes}"
    assert checks["memory: reward"]["state"] == "warn" and "zero_stage" in checks["memory: reward"]["why"]


def test_a_missing_model_is_told_before_the_rest_is_looked_at(llama, monkeypatch, capsys, tmp_path):
    flags = f"data_path: x, output_dir: {tmp_path / 'out'}, max_seq_len: 64"
    recipe = tmp_path / "recipe.yaml"
    sections = f"sft: {{model_name_or_path: {llama}, {flags}}}\nreward: {{model_name_or_path: {tmp_path}/no, {flags}}}\n"
    recipe.write_text(f"launch: {{platform: cpu}}\n{sections}")

    def examine(*_):
        told = capsys.readouterr().err
        assert "memory: reward" in told and "memory: sft" not in told and "make or download the model first" in told
        return []

    monkeypatch.setattr(doctor, "examine", examine)
    assert doctor.main(["--recipe", str(recipe)]) == 0


def test_several_nodes_of_cards(nodes, monkeypatch, capsys, tmp_path):
    """Play torch and ssh: two nodes with two cards each, of which one answers."""
    here = nodes(f'if [[ " $* " == *" node-2 "* ]]; then echo "Permission denied" >&2; exit 255; fi\n{HERE}')
    facts = CUDA | {"versions": VERSIONS, "dtypes": chip("sm80", ["bf16", "fp16", "fp32"]), "tools": {"driver": "535"}}
    monkeypatch.setattr(doctor, "probe", lambda *_, **__: (facts, ""))
    monkeypatch.setattr(machine, "probe", lambda *_, **__: ({}, ""))
    monkeypatch.setattr(cluster, "versions", lambda: VERSIONS)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{here.environ['PATH']}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    words = ["--platform", "multi_node", "--hostfile", "hosts", "--master-addr", "127.0.0.1", "--timeout", "60", "--json"]
    assert doctor.main([*words, "--master-port", str(free_port())]) == 2
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert all(checks[name]["state"] == "ok" for name in ("node-1", "port", "hostfile", "detected"))
    assert [name for name, check in checks.items() if check["state"] == "fail"] == ["node-2"]
