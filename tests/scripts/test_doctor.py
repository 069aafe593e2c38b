"""scripts/doctor: tools that answer, fail and hang; versions; dtypes; memory, disk; and the whole command once for real."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from errors import UserError
from scripts.docs import memory_table
from scripts.doctor import __main__ as doctor
from scripts.doctor import machine
from scripts.doctor.result import MARK, Check, Output, Situation, run_tool, worst
from scripts.doctor.software import (
    ask_tools,
    check_compiler,
    check_drivers,
    check_dtype,
    check_nvcc,
    check_platform,
    check_toolkit,
    check_torch_build,
)
from scripts.doctor.versions import check_packages
from scripts.launch.platforms import platform_named
from scripts.plan import __main__ as plan
from training.utils.run.environment import free_port

NVIDIA = "0, NVIDIA A100-SXM4-80GB, 535.104.05, 81920, 3\n1, NVIDIA A100-SXM4-80GB, 535.104.05, 81920, 3\n"
ROCM = "============ System Management Interface ============\nDriver version: 6.2.26\n=====================================\n"
NPU = """+------------------------------------------------------------------------------------------------+
| npu-smi 23.0.rc2                 Version: 23.0.rc2                                              |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 91.5        45                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          4181 / 65536         |
| 1     910B3               | OK            | 90.1        44                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          4181 / 65536         |
+===========================+===============+====================================================+
"""
VENDORS = {"single_node": "nvidia-smi", "dcu_z100l": "rocm-smi", "ascend_910": "npu-smi"}


@pytest.fixture
def bin_dir(tmp_path, monkeypatch):
    """bin_dir(name, script) puts a program on a PATH that has nothing else of the kind; bin_dir.environ is the environment."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    def says(name: str, text: str, code: int = 0) -> None:
        (folder / f"{name}.txt").write_text(text)
        add(name, f"/bin/cat {folder}/{name}.txt; exit {code}")

    add.says = says
    add.environ = {"PATH": str(folder)}
    return add


def situation(name: str | None = None, environ: dict[str, str] | None = None, /, **facts) -> Situation:
    return Situation(environ or {}, 2.0, platform_named(name) if name else None, facts=facts)


def states(checks: list[Check]) -> dict[str, str]:
    """name -> state; no name twice."""
    found = {check.name: check.state for check in checks}
    assert len(found) == len(checks)
    return found


def one(checks: list[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def drivers(bin_dir, platform: str | None, seconds: float = 2.0) -> list[Check]:
    return check_drivers(situation(platform), ask_tools(bin_dir.environ, seconds))


# --- tools ------------------------------------------------------------------------------------------------------------


def test_a_tool_that_hangs_is_ended_with_its_children(bin_dir, tmp_path):
    bin_dir("slow", f"/bin/sleep 300 & echo $! > {tmp_path}/child; wait")
    started = time.monotonic()
    output = run_tool(["slow"], 0.5, bin_dir.environ)
    assert time.monotonic() - started < 10
    assert output.code is None
    assert "0.5 seconds" in output.reason
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.05)


def test_tools_that_are_absent_are_skipped(bin_dir):
    assert run_tool(["nvidia-smi"], 1, bin_dir.environ) is None
    assert set(states(drivers(bin_dir, None)).values()) == {"skip"}
    assert states(drivers(bin_dir, "single_node"))["NVIDIA driver"] == "warn"


@pytest.mark.parametrize(
    ("tool", "text", "name", "version", "cards"),
    [("nvidia-smi", NVIDIA, "NVIDIA driver", "535.104.05", "2 cards"), ("rocm-smi", ROCM, "Hygon DCU driver", "6.2.26", ""),
     ("hy-smi", ROCM.replace("Driver version", "Driver Version"), "Hygon DCU driver", "6.2.26", ""),
     ("npu-smi", NPU, "Ascend NPU driver", "23.0.rc2", "2 cards")],
)  # fmt: skip
def test_drivers_that_answer(bin_dir, tool, text, name, version, cards):
    bin_dir.says(tool, text)
    check = one(drivers(bin_dir, None), name)
    assert (check.state, check.why.split()[0]) == ("ok", version)
    assert tool in check.why
    assert cards in check.why


@pytest.mark.parametrize("platform", VENDORS)
@pytest.mark.parametrize("how", ["fails", "garbage", "hangs"])
def test_drivers_that_do_not_answer(bin_dir, platform, how):
    """A failure where the run is meant for them, elsewhere a warning; one line says why."""
    tool = VENDORS[platform]
    if how == "hangs":
        bin_dir(tool, "exec /bin/sleep 300")
    else:
        bin_dir.says(tool, "driver/library mismatch\nmore\n" if how == "fails" else "", 9 if how == "fails" else 0)
    for asked, state in ((platform, "fail"), ("cpu", "warn")):
        (check,) = [check for check in drivers(bin_dir, asked, 0.3) if check.state != "skip"]
        assert check.state == state
        assert {"fails": "mismatch", "garbage": "could be read", "hangs": "0.3 seconds"}[how] in check.why
        assert "\n" not in check.why
        assert tool in check.todo


# --- platform and builds ----------------------------------------------------------------------------------------------

CPU = {"platform": "cpu", "torch_device": "cpu", "backend": "gloo", "cards": [], "build": {"cuda": None, "hip": None}}
CARD = {"name": "A100", "chip": "sm80", "total": 80 * 2**30, "free": 79 * 2**30}
BUILD = {"cuda": "12.4", "hip": None}
CUDA = {"platform": "cuda", "torch_device": "cuda", "backend": "nccl", "cards": [CARD, CARD], "build": BUILD}


def test_platform():
    assert one(check_platform(situation(**CPU)), "detected").state == "ok"
    assert states(check_platform(situation(**CUDA))) == {"detected": "ok", "card 0": "ok", "card 1": "ok"}
    busy = CUDA | {"cards": [CARD, CARD | {"free": 40 * 2**30}]}
    assert states(check_platform(situation("single_node", **busy)))["card 1"] == "warn"
    assert one(check_platform(situation("single_node", **CPU)), "detected").state == "fail"
    contradicted = situation("cpu", {"DS_ACCELERATOR": "npu"}, **CPU, refused="DS_ACCELERATOR=npu, but …")
    assert one(check_platform(contradicted), "detected").state == "fail"
    assert one(check_platform(situation("dcu_z100l", **CUDA)), "detected").state == "warn"
    assert one(check_platform(situation(error="no torch")), "detected").state == "fail"


@pytest.mark.parametrize(
    ("tool", "text", "build", "npu", "state"),
    [("nvidia-smi", NVIDIA, {"cuda": "12.4", "hip": None}, None, "ok"),
     ("nvidia-smi", NVIDIA, {"cuda": None, "hip": None}, None, "fail"),
     ("rocm-smi", ROCM, {"cuda": None, "hip": "5.7"}, None, "ok"), ("rocm-smi", ROCM, {"cuda": "12.1", "hip": None}, None, "fail"),
     ("npu-smi", NPU, {"cuda": None, "hip": None}, None, "fail"), ("none", "", {"cuda": None, "hip": None}, "2.4.0", "warn")],
)  # fmt: skip
def test_torch_build_matches_the_card(bin_dir, tool, text, build, npu, state):
    bin_dir.says(tool, text)
    here = situation(**CPU | {"build": build}, versions={"torch": "2.4.0", "torch_npu": npu})
    assert check_torch_build(here, ask_tools(bin_dir.environ, 2.0)).state == state
    here.environ = {"DS_ACCELERATOR": "cpu"}  # then it is the user's will
    assert check_torch_build(here, ask_tools(bin_dir.environ, 2.0)).state in ("ok", "warn")


@pytest.mark.parametrize(
    ("versions", "broken", "expected"),
    [({"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "transformers": "5.23.0"}, {}, ("ok", "ok", "ok")),
     ({"torch": "2.4.0", "deepspeed": "0.14.4", "transformers": "5.0.0"}, {}, ("ok", "ok", "ok")),
     ({"torch": "2.4.0", "deepspeed": "0.14.2", "transformers": "5.0.0"}, {}, ("ok", "warn", "ok")),
     ({"torch": "2.4.0", "deepspeed": "0.14.3", "transformers": "5.0.0"}, {"deepspeed": "ImportError"}, ("ok", "fail", "ok")),
     ({"torch": "2.4.1+das.dtk2504", "deepspeed": "0.14.2+das.dtk2504", "transformers": "5.0.0"}, {}, ("ok", "ok", "ok")),
     ({"torch": "2.3.0", "deepspeed": "0.14.2", "transformers": "5.0.0"}, {}, ("fail", "ok", "warn")),
     ({"torch": "9.0.0", "deepspeed": "0.13.0", "transformers": None}, {}, ("warn", "fail", "fail"))],
)  # fmt: skip
def test_versions(versions, broken, expected):
    checks = check_packages(situation(versions=versions, **{"import": broken}))
    assert tuple(check.state for check in checks) == expected
    assert all(check.todo for check in checks if check.state != "ok")


@pytest.mark.parametrize(
    ("driver", "toolkit", "torch", "expected"),
    [("6.2.26", "25.04.1", "2.4.1+das.opt2.dtk2504", ("ok", "ok")), ("5.16.29", "25.04", "2.4.1+das.opt2.dtk2504", ("fail", "ok")),
     ("6.2.26", "24.04", "2.4.1+das.opt2.dtk2504", ("ok", "fail")), ("6.2.26", "25.04", "2.4.1+cu121", ("ok", "warn"))],
)  # fmt: skip
def test_dtk(bin_dir, tmp_path, driver, toolkit, torch, expected):
    bin_dir.says("rocm-smi", ROCM.replace("6.2.26", driver))
    (tmp_path / "dtk/.info").mkdir(parents=True)
    (tmp_path / "dtk/.info/version").write_text(f"{toolkit}\n")
    here = situation("dcu_z100l", {"ROCM_PATH": str(tmp_path / "dtk")}, versions={"torch": torch})
    assert tuple(check.state for check in check_toolkit(here, ask_tools(bin_dir.environ, 2.0))) == expected


@pytest.mark.parametrize(
    ("cann", "torch", "npu", "expected"),
    [("8.0.RC3", "2.4.0", "2.4.0", ("ok", "ok")), ("8.5.0", "2.9.0+cpu", "2.9.0", ("ok", "ok")),
     ("8.0.RC3", "2.5.1", "2.4.0", ("fail", "ok")), ("8.0.0", "2.4.0", "2.4.0.post4", ("ok", "warn")),
     ("3.0", "2.4.0", "2.4.0", ("ok", "warn")), ("8.0.0", "2.4.0", None, ("fail",))],
)  # fmt: skip
def test_cann(tmp_path, cann, torch, npu, expected):
    folder = tmp_path / "toolkit/aarch64-linux"
    folder.mkdir(parents=True)
    (folder / "ascend_toolkit_install.info").write_text(f"package_name=Ascend-cann-toolkit\nversion={cann}\n")
    here = situation("ascend_910", {"ASCEND_TOOLKIT_HOME": str(tmp_path / "toolkit")}, versions={"torch": torch, "torch_npu": npu})
    assert tuple(check.state for check in check_toolkit(here, {})) == expected


def test_nvcc(bin_dir):
    here = situation("single_node", bin_dir.environ, **CUDA)
    assert check_nvcc(here).state == "warn"
    bin_dir("nvcc", "echo 'Cuda compilation tools, release 12.1, V12.1.66'")
    assert check_nvcc(here).state == "ok"
    bin_dir("nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    check = check_nvcc(here)
    assert check.state == "warn"
    assert "12.x" in check.todo


# --- dtypes and operators ---------------------------------------------------------------------------------------------


def chip(name: str, table: list[str], **works) -> dict:
    works = {"fp16": True, "bf16": True} | works
    return {"chip": name, "table": table, "works": works, "first_ascend": False, "attention": "sdpa"}


def test_dtypes():
    here = situation(dtypes=chip("gfx906", ["fp16", "fp32"]))
    here.recipe = {"launch": {}, "sft": {"dtype": "fp16"}, "ppo": {"dtype": "bf16"}}
    assert states(check_dtype(here)) == {"probe": "ok", "recipe": "fail", "attention": "ok"}
    assert "fp16" in one(check_dtype(here), "recipe").todo
    here.recipe["ppo"]["dtype"] = "auto"
    assert states(check_dtype(here))["recipe"] == "ok"
    here.facts["dtypes"] = chip("sm80", ["bf16", "fp16", "fp32"], bf16=False)
    check = one(check_dtype(here), "probe")
    assert (check.state, "bf16" in check.why) == ("warn", True)
    here.facts["dtypes"] = chip("Ascend910ProA", ["fp16", "fp32"]) | {"first_ascend": True}
    assert states(check_dtype(here))["overflow"] == "warn"
    assert check_dtype(situation(dtypes_error="RuntimeError: driver"))[0].state == "fail"


def test_which_optimizer(bin_dir):
    plans = {"sft": {"optimizer": "auto", "offload": False}, "ppo": {"optimizer": "auto", "offload": True}}
    here = situation("single_node", bin_dir.environ | {"CUDA_HOME": "/usr"}, **CUDA, ops={"fused_adamw": True})
    checks = check_compiler(here, plans)  # nothing on PATH
    assert one(checks, "builds").state == "warn"
    assert "torch's fused AdamW in place of cpu_adam" in one(checks, "optimizer").why
    assert one(check_compiler(here, {"sft": plans["sft"]}), "builds").state == "ok"  # nothing is to be built
    for tool in ("c++", "ninja"):
        bin_dir(tool, "echo 1")
    checks = check_compiler(here, plans)
    assert one(checks, "builds").state == "ok"
    assert one(checks, "optimizer").why == "DeepSpeed's cpu_adam and torch's fused AdamW"
    here.platform = platform_named("cpu")  # offload has no meaning there
    assert one(check_compiler(here, plans), "optimizer").why == "torch's fused AdamW"


# --- memory, disk, communication --------------------------------------------------------------------------------------

P = 6_173_286_400
PLAN = {"verdict": "fits", "card": 2**34, "host": 2**35, "dtype": "fp16", "weights": {"model": P}, "trained": {"model": P}}
PLAN |= {"keep": 1, "refusal": "", "offload": False, "optimizer": "auto"}


def test_disk(tmp_path, monkeypatch):
    """14 bytes a weight in a checkpoint, two of them at the moment of writing, and the model itself."""
    assert machine.disk_bytes(PLAN) == 2 * 14 * P + 2 * P
    adapters = PLAN | {"dtype": "fp32", "trained": {"model": 1000}, "keep": 0}
    assert machine.disk_bytes(adapters) == 3 * (4 * P + 8000) + 4 * P
    here = situation()
    here.recipe = {name: {"output_dir": str(tmp_path / "new" / name)} for name in ("sft", "reward", "dpo")}
    needed = machine.disk_bytes(PLAN)
    for free, state in ((2.1 * needed, "ok"), (1.5 * needed, "warn"), (0.5 * needed, "fail")):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        (check,) = machine.check_disk(here, {"sft": PLAN, "reward": PLAN, "dpo": PLAN})
        assert check.state == state
        assert str(tmp_path) in check.why


def test_shared_memory(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2**26, "total": 2**26})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    assert machine.check_shm(tmp_path).state == "warn"
    usage.free = 2**33
    assert machine.check_shm(tmp_path).state == "ok"
    assert machine.check_shm(tmp_path / "none").state == "skip"


def test_container_limit(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert machine.container_limit(tmp_path) == 2**30


def test_limits(monkeypatch):
    def limits(soft: int, hard: int):
        monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (soft, hard))
        return states(machine.check_limits(situation("single_node", **CUDA), {"ppo": {"offload": True}}))

    assert limits(1024, 65536) == {"open files": "warn", "locked memory": "warn"}
    assert limits(machine.resource.RLIM_INFINITY, machine.resource.RLIM_INFINITY) == {"open files": "ok", "locked memory": "ok"}
    assert states(machine.check_limits(situation(**CPU), {}))["locked memory"] == "skip"


def test_all_reduce_with_a_wrong_sum_or_none():
    right = Output(0, f"noise\n{MARK}" + json.dumps({"sum": 97920.0, "processes": 2}))  # 3 x (0 + 1 + … + 255)
    wrong = Output(0, MARK + json.dumps({"sum": 32640.0, "processes": 2}))
    assert machine.judge_all_reduce("nccl", 2, [right, right]).state == "ok"
    assert machine.judge_all_reduce("nccl", 1, [wrong]).state == "ok"  # alone it is the sum of one
    check = machine.judge_all_reduce("nccl", 2, [right, wrong])
    assert (check.state, "process 1" in check.why, "NCCL_DEBUG" in check.todo) == ("fail", True, True)
    trace = "Traceback (most recent call last):\n  File\nRuntimeError: Connection reset"
    assert "Connection reset" in machine.judge_all_reduce("gloo", 2, [right, Output(1, "", trace)]).why


# --- the command ------------------------------------------------------------------------------------------------------


def test_exit_codes():
    def code(*states):
        return worst([Check("group", "name", state, "") for state in states])

    assert (code("ok", "skip"), code("ok", "warn", "skip"), code("warn", "fail"), code()) == (0, 1, 2, 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--platform", "dcu_z100"], "did you mean dcu_z100l"), (["--recipe", "dcu_z100l/chatglm-7b"], "did you mean chatglm"),
     (["--recipe", "none.yaml"], "no such file"), (["--timeout", "0"], "--timeout")],
)  # fmt: skip
def test_wrong_flags(flags, words):
    with pytest.raises(UserError, match=words):
        doctor.main(flags)


def test_a_probe_that_says_nothing_is_a_failure_and_the_rest_is_looked_at(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "probe", lambda *_: (None, "ModuleNotFoundError: No module named 'torch'"))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert doctor.main([]) == 2
    text = capsys.readouterr().out
    assert "No module named 'torch'" in text
    assert "skipped communication: all-reduce" in text
    assert "/dev/shm" in text


def test_several_nodes_of_cards(monkeypatch, capsys, tmp_path, bin_dir):
    """The whole command again, where torch and ssh are played: 2 x 2 cards, of which one node answers."""
    bin_dir.says("nvidia-smi", NVIDIA)
    bin_dir("ssh", """case " $* " in *" node-2 "*) echo "Permission denied (publickey)." >&2; exit 255;; esac
        for last; do :; done
        eval "$last\"""")
    trained = chip("sm80", ["bf16", "fp16", "fp32"])
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    facts = CUDA | {"dtypes": trained, "ops": {"fused_adamw": True}, "versions": versions, "import": {}}
    small = PLAN | {"weights": {"model": 1000}, "trained": {"model": 1000}}
    monkeypatch.setattr(doctor, "probe", lambda *_: (facts, ""))
    monkeypatch.setattr(machine, "probe", lambda words, *_: ({"sft": small} if words[0] == "memory" else None, ""))
    asked = {}

    def ranks(backend, count, seconds, environ):
        asked.update(backend=backend, count=count, accelerator=environ["DS_ACCELERATOR"])
        return [Output(0, MARK + json.dumps({"sum": 97920.0}))] * count

    monkeypatch.setattr(machine, "run_ranks", ranks)
    for name in [name for name in os.environ if name.endswith(("VISIBLE_DEVICES", "DS_ACCELERATOR", "MASTER_PORT"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{bin_dir.environ['PATH']}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node-1 slots=2\nnode-2 slots=2\n")
    words = ["--recipe", "multi_node/llama-2-7b", "--hostfile", "hosts", "--master-addr", "127.0.0.1", "--json"]
    words += ["--master-port", str(free_port())]
    assert doctor.main(words) == 2
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert asked == {"backend": "nccl", "count": 2, "accelerator": "cuda"}
    assert "2 hosts, 4 processes" in checks["hostfile"]["why"]
    assert {name: checks[name]["state"] for name in ("node-1", "node-2", "port", "forwarded", "sft", "torch build")} == {
        "node-1": "ok", "node-2": "fail", "port": "ok", "forwarded": "ok", "sft": "ok", "torch build": "ok",
    }  # fmt: skip
    assert [name for name, check in checks.items() if check["state"] == "fail"] == ["node-2"]


def test_memory_tables_of_the_pages(tmp_path, monkeypatch, capsys):
    sizes = SimpleNamespace(plan=SimpleNamespace(on_card=1.25 * 2**30, on_host=40.4 * 2**30))
    found = {"known": {"sft": sizes, "ppo": sizes}, "unknown": {"sft": UserError("x")}}
    monkeypatch.setattr(memory_table, "computed", lambda _: found)
    page = tmp_path / "page_zh.md"
    page.write_text("<!-- memory:begin dcu_z100l -->\nold\n<!-- memory:end -->\n<!-- memory:begin cpu -->\n<!-- memory:end -->\n")
    assert memory_table.main(["--check", str(page)]) == 1
    assert memory_table.main(["--write", str(page)]) == 0
    rows = [line for line in page.read_text().splitlines() if line.startswith("| known")]
    assert rows == ["| known | 1.2 / 40 | – | 1.2 / 40 | – |", "| known | 40.4 | – | 40.4 | – |"]
    assert "unknown" not in page.read_text()
    assert memory_table.main(["--check", str(page)]) == 0
    page.write_text("no table")
    with pytest.raises(UserError, match="memory:begin"):
        memory_table.main(["--check", str(page)])
    with pytest.raises(UserError, match=r"absent\.md: No such file or directory; name an existing page"):
        memory_table.main(["--check", str(tmp_path / "absent.md")])


def test_the_whole_command(bin_dir, capsys, monkeypatch):
    """A recipe for DCUs where there are none: that is said, all else is looked at, and the memory is that of scripts.plan."""
    bin_dir.says("nvidia-smi", "NVIDIA-SMI has failed", 9)
    environ = {name: value for name, value in os.environ.items() if not name.endswith(("DS_ACCELERATOR", "VISIBLE_DEVICES"))}
    environ |= {"PATH": f"{bin_dir.environ['PATH']}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    words = ["--recipe", "configs/dcu_z100l/chatglm-6b.yaml", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.doctor", *words], cwd=root, env=environ, capture_output=True, text=True, timeout=300
    )
    report = json.loads(done.stdout)
    assert (done.returncode, report["exit_code"]) == (2, 2), done.stderr
    checks = {f"{check['group']}: {check['name']}": check for check in report["checks"]}
    assert checks["platform: detected"]["state"] == "fail"
    assert "dcu_z100l" in checks["platform: detected"]["why"]
    assert checks["platform: NVIDIA driver"]["state"] == "warn"  # the run is not meant for it
    assert checks["communication: all-reduce"]["state"] == "ok"
    assert "gloo, 2 processes" in checks["communication: all-reduce"]["why"]
    assert all(check["todo"] for check in checks.values() if check["state"] in ("warn", "fail"))
    plan.main(["--config", words[1], "--json"])
    expected = json.loads(capsys.readouterr().out)["as_given"]
    assert f"{expected['card_total_gib']:.1f} of 30.0 GiB a card" in checks["memory: sft"]["why"]
    planned = [checks[f"memory: {section}"] for section in ("sft", "reward", "ppo", "dpo")]
    assert {check["state"] for check in planned} <= {"ok", "warn"}
    for page in ("en", "zh"):  # python -m scripts.memory_table --write docs/*/hardware/*.md
        text = (root / f"docs/{page}/hardware/dcu.md").read_text(encoding="utf-8")
        cells = next(line for line in text.splitlines() if line.startswith("| chatglm-6b |")).split("|")[2:6]
        assert [cell.split()[0] for cell in cells] == [check["why"].split()[1] for check in planned]
