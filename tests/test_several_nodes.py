"""Two nodes with a disk each: steps by every launcher; a node that dies or is cut off; what is left resumes."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from scripts.launch.checks import AS_ROOT
from tests.launching import environment, logged, start, write_pairs
from tests.tiny import tiny_checkpoint, tiny_reward_model
from tests.two_nodes import SILENCE, Job, TwoNodes, launcher, machine_room, ssh_servers, until
from training.utils.engine.checkpoint import whole_checkpoints

pytestmark = pytest.mark.distributed

COMMON = {
    "data_path": ["pairs.jsonl"], "data_split": "1,1,1", "eval_fraction": 0.1, "dtype": "fp32", "logging_steps": 1, "seed": 7,
}  # fmt: skip
TRAINED = {"max_seq_len": 64, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "zero_stage": 3}
RECIPE = {
    "launch": {"platform": "cpu"},
    "sft": COMMON | TRAINED | {"model_name_or_path": "base", "output_dir": "sft", "max_steps": 30, "save_steps": 3},
    "ppo": COMMON | {
        "actor_model_name_or_path": "base", "critic_model_name_or_path": "reward", "output_dir": "ppo", "max_steps": 2,
        "max_prompt_seq_len": 48, "max_answer_seq_len": 8, "per_device_generation_batch_size": 2, "eval_prompts": 4,
        "per_device_training_batch_size": 2, "actor_zero_stage": 3, "critic_zero_stage": 3, "enable_ema": True, "save_steps": 2,
    },
}  # fmt: skip
HOSTS = "node-a slots=1\nnode-b slots=1\n"


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Two nodes; on the disk of each a model, data, the recipe and a hostfile whose names nobody resolves."""
    folder = tmp_path_factory.mktemp("nodes")
    base, pairs = tiny_checkpoint(folder / "base", "llama"), write_pairs(folder / "pairs.jsonl", 200)
    tiny_reward_model(base, folder / "reward")
    with machine_room(folder) as room:
        print("network namespaces" if room.separate else "no network namespaces here: two groups of processes on loopback")
        for node in room.nodes:
            for model in ("base", "reward"):
                shutil.copytree(folder / model, node.folder / model)
            shutil.copy(pairs, node.folder)
            (node.folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
            (node.folder / "hosts").write_text(HOSTS)
        yield room


@pytest.fixture(scope="module")
def whole(room) -> TwoNodes:
    """Step 1 without interruption, into a folder that both nodes see."""
    first = room.nodes[0].folder
    files = {"config": "recipe.yaml", "model_name_or_path": "base", "data_path": "pairs.jsonl"}
    flags = [word for name, file in files.items() for word in (f"--{name}", str(first / file))]
    flags += ["--output_dir", str(first.parent / "shared")]
    done = start("training.step1_sft.main", flags, processes=2, nodes=2)
    assert done.returncode == 0, done.stderr[-6000:]
    (first.parent / "said.txt").write_text(done.stderr)
    return room


def checkpoints(room: TwoNodes, output: str) -> list[list[str]]:
    """Of each node, the whole checkpoints, newest first."""
    return [[found.name for found in whole_checkpoints(node.folder / output / "checkpoints")] for node in room.nodes]


def test_a_folder_that_both_nodes_see(whole):
    shared = whole.nodes[0].folder.parent / "shared"
    assert f"2 nodes; {shared} is shared by all nodes" in (shared.parent / "said.txt").read_text()
    names = {path.name for path in (shared / "checkpoints/step-00000030").rglob("*")}
    assert {"generators-0.pt", "generators-1.pt", "checkpoint.json"} <= names
    assert {file.name for file in shared.glob(".*")} <= {".lock"} and len(logged(shared, "train/loss")) == 30


def test_ppo_with_zero_3_leaves_the_same_models_on_both_disks(room):
    """By DeepSpeed's launcher on each node (--no_ssh), which reads the models on its own disk."""
    said = room.run(lambda node: launcher(room, node, "step3_ppo", "base", "reward", way="no_ssh"))
    assert "2 nodes; ppo is on disks of their own" in said[0]
    first, second = (node.folder for node in room.nodes)
    for model in ("actor", "critic", "actor_ema"):
        weights = [(folder / "ppo" / model / "model.safetensors").read_bytes() for folder in (first, second)]
        assert weights[0] == weights[1], model
        assert (second / "ppo" / model / "tokenizer.json").is_file()
    assert json.loads((first / "ppo/sanbu_done.json").read_text())["flags"]["output_dir"] == "ppo"
    assert (second / "ppo/sanbu_done.json").is_file()
    assert not (second / "ppo/metrics.jsonl").exists()  # metrics are the first node's
    assert {file.name for folder in (first, second) for file in folder.glob("ppo/.*")} <= {".lock"}


def test_a_lost_node_ends_the_other_by_name_and_the_run_resumes(whole, tmp_path):
    """By torchrun: one node is killed, then the cable is pulled, then Slurm brings the run to its end."""
    first, second = whole.nodes

    def again(node, *words):
        return launcher(whole, node, "step1_sft", "cut", "--resume", *words)

    with whole.running(again) as jobs:
        until(lambda: all(checkpoints(whole, "cut")), jobs, "the first checkpoint")
        jobs[1].signal(9)
        killed = time.monotonic()
        assert jobs[0].wait(60) == 75, jobs[0].printed[-6000:]
        print(f"the other node ended {time.monotonic() - killed:.1f} s after the kill")
        name = "node-b" if whole.separate else r"\S+"
        assert re.search(rf"error: node 1 \({name}\) is lost: the connection to it ended", jobs[0].printed), jobs[0].printed[-6000:]

    with whole.running(again) as jobs:
        before = min(found[0] for found in checkpoints(whole, "cut"))
        until(lambda: all(found[0] > before for found in checkpoints(whole, "cut")), jobs, "a further checkpoint")
        whole.cable("down", jobs[1])
        pulled = time.monotonic()
        assert jobs[0].wait(60) == 75, jobs[0].printed[-6000:]
        print(f"the first node ended {time.monotonic() - pulled:.1f} s after the cable was pulled, with a limit of {SILENCE} s")
        silent = rf"error: node 1 \({name}\) is lost: nothing was heard from it for {SILENCE} s"
        assert re.search(silent, jobs[0].printed), jobs[0].printed[-6000:]
        if whole.separate:   # there is nobody to ask on a frozen node
            assert jobs[1].wait(60) == 75 and "error: node 0 (node-a) is lost" in jobs[1].printed, jobs[1].printed[-6000:]
        whole.cable("up", jobs[1])

    # One node has a checkpoint less than the other, as if it had died a moment earlier.
    found = checkpoints(whole, "cut")
    newest = min(found[0][0], found[1][0])
    shutil.rmtree(second.folder / "cut/checkpoints" / newest)
    last = submit(whole, tmp_path, "cut")
    assert last.returncode == 0, last.stdout[-6000:] + last.stderr[-3000:]
    assert "The newest whole checkpoints differ" in last.stdout and "which every node has" in last.stdout
    shared = first.folder.parent / "shared"
    assert logged(first.folder / "cut", "train/loss") == logged(shared, "train/loss")
    assert (second.folder / "cut/model.safetensors").read_bytes() == (shared / "model.safetensors").read_bytes()
    # Of a checkpoint each disk has what its own process needs.
    for node in whole.nodes:
        names = {path.name for path in (node.folder / "cut/checkpoints/step-00000030").rglob("*")}
        assert {name for name in names if name.startswith("generators")} == {f"generators-{node.number}.pt"}


# --- one command on the first node ------------------------------------------------------------------------------------

SERVED = shutil.which("ssh") and shutil.which("sshd", path="/usr/sbin:/usr/bin") and os.geteuid() == 0


@contextmanager
def by_ssh(room: TwoNodes, folder: Path, hosts: str, *words: str, **more: str) -> Iterator[Job]:
    """Step 1, started on the first node for both of them, into a folder that both see."""
    first, before = room.nodes[0], room.nodes[0].env
    (first.folder / "named").write_text(hosts)
    named = ["--hostfile", "named", "--master_addr", room.address, "--master_port", str(room.port), *words]
    with ssh_servers(room, folder) as env:
        first.env = before | env | more
        job = first.start([sys.executable, "-m", "scripts.launch", "step1_sft", "recipe.yaml", str(folder / "out"), *named])
        try:
            yield job
        finally:
            job.signal(9)
            job.process.wait()
            first.env = before


@pytest.mark.skipif(
    not (shutil.which("pdsh") and SERVED),
    reason="pdsh, ssh or sshd is not installed (Debian: pdsh openssh-server), or the tests do not run as root",
)
def test_pdsh_starts_both_nodes_over_ssh(room, tmp_path):
    """DeepSpeed's default way. What the shell has set is sent on to the other node, as the name of the interface."""
    with by_ssh(room, tmp_path, HOSTS, "--max_steps", "2", SANBU_NODE_TIMEOUT="30") as job:
        assert job.wait() == 0, job.printed[-6000:]
    assert "shared by all nodes" in job.printed and len(logged(tmp_path / "out", "train/loss")) == 2
    assert "node-b" in job.printed and "GLOO_SOCKET_IFNAME=" in (tmp_path / "out/deepspeed_env").read_text()


@pytest.mark.cluster
@pytest.mark.skipif(
    not (shutil.which("mpirun") and SERVED),
    reason="mpirun, ssh or sshd is not installed (Debian: openmpi-bin openssh-server), or the tests do not run as root",
)
def test_mpirun_starts_two_processes_on_each_node_and_one_is_killed(room, tmp_path):
    """Placed by turns: ranks 0 and 2 on the first node, 1 and 3 on the second."""
    if not room.separate:
        pytest.skip("two hosts for mpirun need network namespaces")
    words = ["--launcher", "openmpi", "--launcher_args", "--map-by node --mca btl_tcp_if_include eth0", "--max_steps", "3000"]
    with by_ssh(room, tmp_path, HOSTS.replace("=1", "=2"), *words, **dict.fromkeys(AS_ROOT, "1")) as job:
        until(lambda: any(whole_checkpoints(tmp_path / "out/checkpoints")), [job], "the first checkpoint")
        ranks = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(tmp_path / "out") in process.cmdline() and (rank := process.environ().get("OMPI_COMM_WORLD_RANK")):
                    ranks[rank] = process
        assert sorted(ranks) == ["0", "1", "2", "3"]
        ranks["3"].kill()
        assert job.wait(120) == 75, job.printed[-6000:]
    said = job.printed.splitlines()[-4:]
    assert any("it said: node 1 (node-b) is lost" in line for line in said), job.printed[-6000:]


# --- Slurm ------------------------------------------------------------------------------------------------------------

SRUN = """
import json, os, subprocess, sys
words = sys.argv[1:]
command = words[next(place for place, word in enumerate(words) if not word.startswith('-')):]
tasks = []
for number, (prefix, folder, env) in enumerate(json.load(open(os.environ['FAKE_NODES']))):
    env = os.environ | env | {'SLURM_NODEID': str(number), 'SLURM_PROCID': str(number)}
    tasks.append(subprocess.Popen([*prefix, *command], cwd=folder, env=env))
sys.exit(max(task.wait() for task in tasks))
"""


def submit(room: TwoNodes, folder: Path, output: str) -> subprocess.CompletedProcess:
    """The batch file as Slurm runs it on the first node, with an srun that starts one task on each of our nodes."""
    (folder / "bin").mkdir()
    srun = folder / "bin" / "srun"
    srun.write_text(f"#!{sys.executable}\n{SRUN}")
    srun.chmod(0o755)
    (folder / "nodes.json").write_text(json.dumps([[node.prefix, str(node.folder), node.env] for node in room.nodes]))
    repository = Path(__file__).resolve().parents[1]
    spooled = shutil.copy(repository / "scripts/slurm.sbatch", folder / "slurm_script")   # Slurm runs a copy
    first = room.nodes[0]
    env = environment(
        PATH=f"{folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin", SLURM_SUBMIT_DIR=str(first.folder),
        SANBU_ROOT=str(repository), SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node-[a-b]", MASTER_ADDR=room.address,
        FAKE_NODES=str(folder / "nodes.json"), PYTHON=sys.executable, **first.env,
    )  # fmt: skip
    flags = ["--num_gpus", "1", "--master_port", str(room.port)]
    words = ["bash", spooled, "step1_sft", str(first.folder / "recipe.yaml"), output, *flags]
    process = subprocess.Popen(
        [*first.prefix, *words], env=env, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, error = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(words, process.returncode, out, error)


def test_the_batch_file_asks_for_what_the_recipes_use(repository):
    file = repository / "scripts/slurm.sbatch"
    lines = file.read_text().splitlines()
    subprocess.run(["bash", "-n", str(file)], check=True)
    asked = [line.removeprefix("#SBATCH ").strip() for line in lines if line.startswith("#SBATCH")]
    # Slurm stops reading at the first line that is neither a comment nor empty.
    commands = next(place for place, line in enumerate(lines) if line and line[0] != "#")
    assert sum(line.startswith("#SBATCH") for line in lines[:commands]) == len(asked) > 5
    options = dict(word[2:].partition("=")[::2] for word in shlex.split(" ".join(asked)))
    platform = yaml.safe_load((repository / "configs/platforms.yaml").read_text())["multi_node"]
    assert options["nodes"] == str(platform["nodes"]) and options["gres"] == f"gpu:{platform['devices']}"
    assert options["ntasks-per-node"] == "1" and options["signal"].startswith("B:TERM@") and "requeue" in options
    others = {"job-name", "cpus-per-task", "exclusive", "time", "open-mode", "output"}   # `man sbatch` knows them
    assert set(options) == others | {"nodes", "gres", "ntasks-per-node", "signal", "requeue"}


@pytest.mark.parametrize(("code", "restarts", "asks"), [(75, "0", True), (75, "3", False), (2, "0", False), (0, "0", False)])
def test_a_lost_node_sends_the_job_back_to_the_queue(repository, tmp_path, code, restarts, asks):
    for name, program in (("python", f"exit {code}"), ("scontrol", 'echo "asked: $*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    env = environment(
        PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_SUBMIT_DIR=str(repository), SLURM_JOB_ID="12", SLURM_RESTART_COUNT=restarts,
        PYTHON=str(tmp_path / "python"),
    )  # fmt: skip
    words = ["bash", str(repository / "scripts/slurm.sbatch"), "step1_sft", "any.yaml"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and ("asked: requeue 12" in done.stdout) == asks
