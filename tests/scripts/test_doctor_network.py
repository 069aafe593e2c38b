"""scripts/doctor: hostfile, hosts behind a played ssh, ports, interfaces, and the variables of the shell."""

import socket
import sys
import time

import pytest

from scripts.doctor import network
from scripts.doctor.environment import (
    check_env_file,
    check_forwarded,
    check_interfaces,
    check_spelling,
    check_visible,
    interface_matches,
)
from scripts.doctor.network import check_address, check_hostfile, check_hosts, check_ports
from scripts.doctor.result import Situation
from scripts.launch.commands import Options
from scripts.launch.platforms import load_platforms, platform_named

VERSIONS = {"torch": "2.4.0", "deepspeed": "0.14.4", "transformers": "5.0.0"}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """cluster(ssh script) -> a situation with two hosts; without a script there is no ssh on its PATH."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(script: str | None = None, platform: str = "multi_node", environ: dict | None = None, **options) -> Situation:
        if script is not None:
            (folder / "ssh").write_text(f"#!/bin/bash\n{script}\n")
            (folder / "ssh").chmod(0o755)
        hosts = {"node-1": 1, "node-2": 1}
        made = Options(platform_named(platform), hosts=hosts, master_addr="127.0.0.1", **options)
        tools = {"PATH": str(folder), "HOME": str(tmp_path / "home")}
        return Situation(tools | (environ or {}), 5.0, platform_named(platform), made, facts={"versions": VERSIONS})

    return make


def host_states(situation: Situation) -> dict[str, str]:
    """host -> what is said of it, which is one thing here."""
    checks = [check for check in check_hosts(situation, situation.options.hosts) if check.name != "master address"]
    assert all(check.todo for check in checks if check.state == "fail")
    return {check.name: f"{check.state}: {check.why}" for check in checks}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


# --- hostfile ---------------------------------------------------------------------------------------------------------


def test_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("node-1 slots=8\n# spare\n\nnode-2 slots=4\n")
    check, hosts = check_hostfile(str(path), True)
    assert (check.state, hosts) == ("ok", {"node-1": 8, "node-2": 4})
    assert "12 processes" in check.why
    for text, words in (("node-1 slots=8\nnode-2 slot=8\n", "line 2"), ("a slots=1\na slots=1\n", "second time"),
                        ("\n", "no host")):  # fmt: skip
        path.write_text(text)
        check, hosts = check_hostfile(str(path), True)
        assert (check.state, hosts) == ("fail", {})
        assert words in check.why
    assert check_hostfile(str(tmp_path / "none"), False)[0].state == "fail"
    assert check_hostfile(None, False)[0].state == "skip"


# --- hosts ------------------------------------------------------------------------------------------------------------

# Runs what it is asked for here, in place of the host, with the versions that VERSIONS says.
HERE = f"""export PATH=/usr/bin:/bin
said=$(bash -c "${{@: -1}}")
echo "$said" | sed -E "/^{network.SAYS}version/d"
for pair in torch=2.4.0 deepspeed=0.14.4 transformers=5.0.0; do echo "{network.SAYS}version ${{pair%=*}} ${{pair#*=}}"; done"""


def test_hosts_that_answer(cluster):
    """The question is a shell's, and the way back to the master's port is walked."""
    found = host_states(cluster(HERE, master_port=free_port()))
    assert found.keys() == {"node-1", "node-2"}
    assert all(said.startswith("ok: answers, and the way back") for said in found.values()), found


@pytest.mark.parametrize(
    ("script", "words"),
    [("echo 'Permission denied (publickey).' >&2; exit 255", "Permission denied"),
     ("echo 'ssh: Could not resolve hostname node-2' >&2; exit 255", "resolve"), ("exec /bin/sleep 300", "within 0.4 seconds"),
     (HERE.replace("deepspeed=0.14.4", "deepspeed=0.15.0"), "deepspeed 0.15.0, here 0.14.4"),
     (HERE.replace('echo "$said"', 'echo "${said/folder yes/folder no}"'), "no folder"),
     (HERE.replace('echo "$said"', 'echo "${said/python yes/python no}"'), f"no {sys.executable}"),
     (HERE.replace('echo "$said"', 'echo "${said/port yes/port no}"'), "cannot reach 127.0.0.1")],
)  # fmt: skip
def test_a_host_that_is_not_ready(cluster, script, words):
    """It is named with the reason; the other one is well."""
    only = f'if [[ " $* " != *" node-2 "* ]]; then\n{HERE}\nexit\nfi\n{script}'
    situation = cluster(only, master_port=free_port())
    if "sleep" in script:
        situation.seconds = 0.4
        found = host_states(situation)  # in 0.4 seconds node-1 may be late too
    else:
        found = host_states(situation)
        assert found["node-1"].startswith("ok"), found
    assert found["node-2"].startswith("fail")
    assert words in found["node-2"]


def test_slots_and_clock():
    text = "\n".join(network.SAYS + line for line in ("folder yes", "python yes", "cards 4", "clock 1000", "port yes"))
    text += "".join(f"\n{network.SAYS}version {name} {version}" for name, version in VERSIONS.items())

    def judge(slots: int, now: float) -> list[str]:
        return [check.state for check in network.judge_host("a", slots, network.Output(0, text), VERSIONS, now, "b")]

    assert judge(4, 1001.0) == ["ok"]
    assert judge(8, 1001.0) == ["fail"]
    assert judge(4, 2000.0) == ["warn"]


def test_hosts_are_not_asked(cluster):
    assert "skip" in host_states(cluster())["hosts"]  # no ssh
    assert "skip" in host_states(cluster("exit 1", launcher="torchrun"))["hosts"]


def test_master_address(monkeypatch):
    assert [network.is_here(address) for address in ("127.0.0.1", "192.0.2.1", None)] == [True, False, False]
    assert check_address("127.0.0.1", True, True)[0].state == "ok"
    assert check_address("127.0.0.1", False, True)[0].state == "fail"  # the others would call themselves
    assert check_address("127.0.0.1", False, False) == []
    assert [check_address("::1", given, True)[0].state for given in (True, False)] == ["ok", "fail"]
    monkeypatch.setattr(network, "resolved", lambda _: (_ for _ in ()).throw(OSError("Name or service not known")))
    assert check_address("no-such-host", True, True)[0].state == "fail"


# --- ports, interfaces ------------------------------------------------------------------------------------------------


def test_ports(cluster):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (check,) = check_ports(cluster(master_port=port))
        assert check.state == "fail"
        assert str(port) in check.why
        base = {"HCCL_IF_BASE_PORT": str(port)}
        _, check = check_ports(cluster(platform="ascend_910", environ=base))
        assert check.state == "warn"
        assert str(port) in check.why
    assert check_ports(cluster(master_port=port))[0].state == "ok"
    assert check_ports(Situation({}))[0].state == "skip"
    assert network.port_error(99999) == "no port; they go from 1 to 65535"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("eth", ["eth0", "eth1"]), ("=eth1", ["eth1"]), ("^docker,lo", ["eth0", "eth1", "ib0"]), ("ib0,eth1", ["eth1", "ib0"]),
     ("=eth", []), ("^=eth0", ["docker0", "eth1", "ib0", "lo"]), ("bond", [])],
)  # fmt: skip
def test_interface_names(value, expected):
    assert interface_matches(value, ["docker0", "eth0", "eth1", "ib0", "lo"]) == expected


def test_interfaces(cluster):
    here = ["lo", "eth0"]
    assert check_interfaces(cluster(environ={"NCCL_SOCKET_IFNAME": "ib0"}), here).state == "fail"
    assert check_interfaces(cluster(env={"NCCL_SOCKET_IFNAME": "eth"}), here).state == "ok"  # the recipe's
    assert check_interfaces(cluster(environ={"GLOO_SOCKET_IFNAME": "eth"}), here).state == "fail"  # gloo takes whole names
    assert check_interfaces(cluster(platform="ascend_910", environ={"NCCL_SOCKET_IFNAME": "x"}), here).state == "ok"  # not read
    assert check_interfaces(Situation({}), here).state == "skip"


# --- variables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [("CUDA_VISIBLE_DEVICE", "CUDA_VISIBLE_DEVICES"), ("CUDA_VISBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
     ("CUDA_VISIBEL_DEVICES", "CUDA_VISIBLE_DEVICES"), ("CUDAVISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
     ("cuda_visible_devices", "CUDA_VISIBLE_DEVICES"), ("HIP_VISIBLE_DEVICE", "HIP_VISIBLE_DEVICES"),
     ("ASCEND_RT_VISIBLE_DEVICE", "ASCEND_RT_VISIBLE_DEVICES"), ("NCCL_SOCKET_IFNAMES", "NCCL_SOCKET_IFNAME"),
     ("MASTER_ADDRESS", "MASTER_ADDR"), ("DS_ACCELERATER", "DS_ACCELERATOR"),
     ("HSA_FORCE_FINEGRAIN_PCIE", "HSA_FORCE_FINE_GRAIN_PCIE"), ("DEEPSPEED_TIMEOUTS", "DEEPSPEED_TIMEOUT")],
)  # fmt: skip
def test_misspelt_names(name, meant):
    (check,) = check_spelling({name: "0", "PATH": "/bin"})
    assert (check.state, meant in check.todo) == ("warn", True)


def test_names_that_are_meant():
    """What programs do read, and what only looks alike."""
    names = [
        "NCCL_NVB_DISABLE", "NCCL_PXN_DISABLE", "NCCL_CROSS_NIC", "NCCL_IB_TC", "NCCL_ALGO", "HCCL_ALGO",
        "NCCL_MIN_NCHANNELS", "CUDA_CACHE_PATH", "ASCEND_OPP_PATH", "ASCEND_AICPU_PATH", "ROCM_VERSION",
        "OMPI_COMM_WORLD_RANK", "SLURM_NODEID", "HF_TOKEN", "HF_HOME", "KMP_AFFINITY", "RANK", "PORT", "LESS", "HOME",
        "SHELL", "MAIL", "http_proxy", "PYTORCH_VERSION", "NVIDIA_DRIVER_CAPABILITIES", "CUDA_VERSION",
    ]  # fmt: skip
    names += [name for platform in load_platforms().values() for name in (*platform.env, *platform.env_several_nodes)]
    (check,) = check_spelling(dict.fromkeys(names, "1"))
    assert check.state == "ok"


@pytest.mark.parametrize(
    ("platform", "environ", "expected"),
    [("single_node", {"CUDA_VISIBLE_DEVICES": "4,5"}, "ok"), ("single_node", {}, "ok"),
     ("single_node", {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106"}, "fail"),
     ("single_node", {"CUDA_VISIBLE_DEVICES": ""}, "warn"),
     ("single_node", {"CUDA_VISIBLE_DEVICES": "0,0"}, "fail"), ("single_node", {"HIP_VISIBLE_DEVICES": "0"}, "warn"),
     ("dcu_z100l", {"HIP_VISIBLE_DEVICES": "4,5"}, "ok"),
     ("dcu_z100l", {"HIP_VISIBLE_DEVICES": "4", "CUDA_VISIBLE_DEVICES": "4"}, "warn"),
     ("ascend_910", {"ASCEND_RT_VISIBLE_DEVICES": "0,1,10"}, "ok"), ("ascend_910", {"ASCEND_RT_VISIBLE_DEVICES": "1,0"}, "fail"),
     ("ascend_910", {"ASCEND_RT_VISIBLE_DEVICES": "0, 1"}, "fail"),
     ("ascend_910", {"ASCEND_RT_VISIBLE_DEVICES": "0-3"}, "fail"),
     ("ascend_910", {"CUDA_VISIBLE_DEVICES": "0"}, "warn"), ("cpu", {"CUDA_VISIBLE_DEVICES": ""}, "ok")],
)  # fmt: skip
def test_visible_devices(platform, environ, expected):
    checks = check_visible(Situation(environ, platform=platform_named(platform)))
    assert {check.state for check in checks} == {expected}
    assert all(check.todo for check in checks if expected != "ok")


def test_the_repair_of_visible_devices():
    (check,) = check_visible(Situation({"ASCEND_RT_VISIBLE_DEVICES": "10, 2,1"}, platform=platform_named("ascend_910")))
    assert check.todo == "ASCEND_RT_VISIBLE_DEVICES=1,2,10"


def test_forwarded(cluster):
    environ = {"HF_TOKEN": "secret", "NCCL_DEBUG": "INFO", "HF_HOME": 'a"b', "CUDA_VISIBLE_DEVICES": "0", "UNRELATED": "1"}
    checks = check_forwarded(cluster(environ=environ))
    assert [check.state for check in checks] == ["ok", "warn", "warn", "warn"]
    text = " ".join(check.why for check in checks)
    assert all(name in text for name in ("HF_TOKEN", "HF_HOME", "CUDA_VISIBLE_DEVICES"))
    assert not any(name in text for name in ("NCCL_DEBUG", "UNRELATED", "secret"))
    assert [check.state for check in check_forwarded(cluster(env={"NAME": 'a"b'}))] == ["fail"]  # the recipe's must go
    assert [check.state for check in check_forwarded(cluster(launcher="torchrun"))] == ["skip"]
    assert [check.state for check in check_forwarded(Situation({}))] == ["skip"]


def test_lines_of_the_env_file(cluster, tmp_path):
    situation = cluster()
    assert [check.state for check in check_env_file(situation)] == ["skip"]
    path = tmp_path / ".deepspeed_env"
    for text, state, words in (("A=1\nB=2\n", "ok", "2 variables"), ("A=1\n\n# note\n", "warn", "line 2 (blank), line 3 (# note)"),
                               ("A=1\nexport B\n", "fail", "line 2 (export B)")):  # fmt: skip
        path.write_text(text)
        (check,) = check_env_file(situation)
        assert check.state == state
        assert words in check.why
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.deepspeed_env").write_text("C=3\n")
    assert [check.state for check in check_env_file(situation)] == ["ok", "fail"]


def test_ssh_that_never_answers_is_waited_for_once(cluster):
    """All hosts are asked at the same time."""
    situation = cluster("exec /bin/sleep 300", master_port=free_port())
    situation.seconds = 1.0
    situation.options.hosts = {f"node-{index}": 1 for index in range(8)}
    started = time.monotonic()
    assert set(host_states(situation)) == set(situation.options.hosts)
    assert time.monotonic() - started < 6
