"""Steps under a real Slurm and mpirun. Needs root, and slurm-wlm, munge and openmpi-bin of Debian.

The short tests run by default where those are installed; those that train: scripts/test.sh -m cluster.
"""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from scripts.launch.checks import AS_ROOT
from steps import STEPS, Step
from tests.launching import REPOSITORY, logged, succeed, write_pairs
from tests.slurm import MISSING, Cluster, is_installed, slurm
from tests.tiny import tiny_checkpoint, tiny_reward_model
from training.utils.engine.checkpoint import whole_checkpoints
from training.utils.run.environment import free_port
from training.utils.run.metrics import read_lines

pytestmark = pytest.mark.skipif(not is_installed(), reason=MISSING)
trains = pytest.mark.cluster
PLAIN = [sys.executable, "-m", "training.step1_sft.main", "--config", "recipe.yaml"]
STEP = {step.section: step for step in STEPS}


def recipe(folder: Path) -> dict:
    """Return a few optimizer steps of each step on the models and data of the folder."""
    common = {
        "data_path": [str(folder / "pairs.jsonl")], "data_split": "1,1,1", "dtype": "fp32", "logging_steps": 1, "seed": 7,
        "save_steps": 2,
    }  # fmt: skip
    trained = common | {
        "model_name_or_path": str(folder / "base"), "max_seq_len": 64, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "zero_stage": 2, "max_steps": 24,
    }  # fmt: skip
    ppo = common | {
        "actor_model_name_or_path": str(folder / "base"), "critic_model_name_or_path": str(folder / "scores"),
        "max_prompt_seq_len": 48, "max_answer_seq_len": 8, "per_device_generation_batch_size": 2,
        "per_device_training_batch_size": 2, "eval_prompts": 4, "max_steps": 5,
    }  # fmt: skip
    return {"launch": {"platform": "cpu"}, "sft": trained, "reward": trained, "dpo": trained, "ppo": ppo}


@pytest.fixture(scope="module")
def daemons(tmp_path_factory):
    """Slurm alone."""
    with slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.env["SANBU_NODE_TIMEOUT"] = "300"  # the tests stop processes for a while
        cluster.env |= dict.fromkeys(AS_ROOT, "1")
        yield cluster


@pytest.fixture(scope="module")
def cluster(daemons):
    """Slurm, with models, data and a recipe in the folder that its jobs run in."""
    tiny_reward_model(tiny_checkpoint(daemons.folder / "base", "llama"), daemons.folder / "scores")
    write_pairs(daemons.folder / "pairs.jsonl", 200)
    (daemons.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(daemons.folder)))
    return daemons


def unbroken(cluster: Cluster, step: Step) -> Path:
    """Return the folder of a run of two processes that nothing has stopped."""
    folder = cluster.folder / f"unbroken-{step.section}"
    if not folder.exists():
        succeed(step.module, ["--config", str(cluster.folder / "recipe.yaml"), "--output_dir", str(folder)], processes=2)
    return folder


def curve(folder: Path) -> list[tuple[int, dict]]:
    """Return the metrics that do not depend on the clock, with their steps."""
    records, _ = read_lines(folder / "metrics.jsonl")
    return [(record["step"], {name: record[name] for name in record if "second" not in name}) for record in records]


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the models in a folder of output."""
    files = [file for file in folder.rglob("model.safetensors") if "checkpoints" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def steps_done(cluster: Cluster, output: str) -> int:
    """Return the optimizer steps that a run has logged."""
    file = cluster.folder / output / "metrics.jsonl"
    return sum(any(name.startswith("train/") for name in record) for record in read_lines(file)[0]) if file.is_file() else 0


def ranks_of(**names: str) -> list[psutil.Process]:
    """Return the processes of a run, in the order of their ranks, whose environment has these values."""
    found = {}
    for process in psutil.process_iter():
        environ = environ_of(process)
        if "RANK" in environ and names.items() <= environ.items():
            found[environ["RANK"]] = process
    return [found[rank] for rank in sorted(found)]


def environ_of(process: psutil.Process) -> dict[str, str]:
    """Return the environment of a process; {} for one that is gone."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


def stopped(cluster: Cluster, step: Step, output: str, steps: int, *asked: str) -> tuple[str, list[psutil.Process]]:
    """Submit the batch file for two nodes, and stop its two processes once they have made some steps, 0: once they are there.

    So it does not depend on the speed of the machine what they have done when they are told to end. Returns job and processes.
    """
    words = ["--num_gpus", "1", "--master_port", str(free_port())]
    job = cluster.submit(step.room, str(cluster.folder / "recipe.yaml"), *words, "--output_dir", output, asked=asked)
    ends = time.monotonic() + 300
    while steps_done(cluster, output) < steps or len(ranks_of(SLURM_JOB_ID=job)) < 2:
        assert time.monotonic() < ends and cluster.state(job)[0] in ("PENDING", "RUNNING"), cluster.log(job)[-6000:]
        time.sleep(0.02)
    processes = ranks_of(SLURM_JOB_ID=job)
    for process in processes:
        process.suspend()
    return job, processes


# --- short ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("starter", ["srun -N2 -n2", "mpirun --oversubscribe -np 2"])
def test_ranks_come_from_the_starter(daemons, starter):
    """Two tasks are one run, also with no launcher of ours."""
    words = starter.split()
    if not shutil.which(words[0]):
        pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    program = "import os; from training.utils.run.ranks import adopt_ranks; adopt_ranks(); "
    program += f"os.write(1, (' '.join(map(os.environ.get, {names})) + chr(10)).encode())"  # whole lines, also beside another task
    done = daemons.run(*words, sys.executable, "-c", program)
    ranks = sorted(line.split() for line in done.stdout.splitlines())
    local = [["0", "1"], ["0", "1"]] if words[0] == "srun" else [["0", "2"], ["1", "2"]]  # mpirun: both on this host
    assert [rank[:4] for rank in ranks] == [["0", "2", *local[0]], ["1", "2", *local[1]]], done.stdout + done.stderr
    assert ranks[0][4:] == ranks[1][4:] and ranks[0][4] == "127.0.0.1"


def test_one_process_in_a_shell_of_salloc_is_refused(daemons):
    done = daemons.run("salloc", "-n2", *PLAIN[:3], "--model_name_or_path", "a", "--data_path", "b", "--output_dir", "salloc")
    assert done.returncode == 2 and "put srun before the command" in done.stderr, done.stderr
    assert not (daemons.folder / "salloc").exists()


TOLD = """
import os, pathlib
from scripts.launch.processes import run_step
task = "trap 'sleep 1.5; echo saved >told-$SLURM_NODEID; exit 0' TERM; echo ready; while true; do sleep 0.1; done"
run_step(["srun", "-N2", "-n2", "bash", "-c", task], dict(os.environ), pathlib.Path("told.log"))
"""


def test_the_launcher_leaves_the_tasks_of_srun_time_to_save(daemons):
    """Srun itself would kill them."""
    folder = daemons.folder
    salloc = subprocess.Popen(["salloc", "-N2", sys.executable, "-c", TOLD], cwd=folder, env=daemons.env, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 60
    while not (folder / "told.log").is_file() or (folder / "told.log").read_text().count("ready\n") < 2:
        assert salloc.poll() is None and time.monotonic() < ends
        time.sleep(0.1)
    psutil.Process(salloc.pid).children()[0].send_signal(signal.SIGTERM)
    assert salloc.wait(60) != 0
    assert [(folder / f"told-{node}").read_text() for node in (0, 1)] == ["saved\n"] * 2


# --- steps that train -------------------------------------------------------------------------------------------------


@trains
def test_tasks_of_srun_and_of_mpirun_train_what_torchrun_trains(cluster):
    two = ["--max_steps", "3"]
    starters = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())],
        "srun": ["srun", "-N2", "-n2", sys.executable],
        "mpirun": ["mpirun", "--oversubscribe", "-np", "2", sys.executable],
    }
    losses = {}
    for name, words in starters.items():
        if shutil.which(words[0]):
            done = cluster.run(*words, *PLAIN[1:], *two, "--output_dir", name)
            assert done.returncode == 0 and done.stdout.count(f"Saved to {name}") == 1, done.stdout[-3000:] + done.stderr[-3000:]
            losses[name] = logged(cluster.folder / name, "train/loss")
    assert len(losses["srun"]) == 3 and len({tuple(values) for values in losses.values()}) == 1, losses
    assert not list((cluster.folder / "srun").rglob("earlier-*"))


@trains
@pytest.mark.parametrize(
    ("section", "words", "steps"),
    [
        ("sft", None, 3),
        ("sft", None, 0),
        ("reward", ["--batch", "--signal=TERM"], 3),
        ("dpo", ["--signal=TERM"], 3),
        ("ppo", [], 1),
    ],
)
def test_a_job_that_is_told_to_end_goes_on_to_the_same_end(cluster, section, words, steps):
    """By its time limit (None) or by scancel: the batch file, the tasks, or both. With 0 steps: while it loads."""
    step, output = STEP[section], f"told-{section}-{steps}"
    job, processes = stopped(cluster, step, output, steps, "--time=10", "--signal=B:TERM@60")
    if words is None:  # two minutes from now; Slurm looks at its limits every 30 s, and so signals up to 30 s early
        started = psutil.Process(processes[0].pid).create_time()
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={int(time.time() - started) // 60 + 2}")
    else:
        cluster.run("scancel", *words, job)
    cluster.until(job, "RUNNING", "COMPLETING", "CANCELLED", "FAILED", text="death signal")
    for process in processes:
        process.resume()
    code = cluster.until(job, "FAILED", "CANCELLED", text="" if words == [] else "--resume continues")
    text, saved = cluster.log(job), list(whole_checkpoints(cluster.folder / output / "checkpoints"))
    done = steps_done(cluster, output)
    assert [int(folder.name.removeprefix("step-")) for folder in saved][:1] == [done][:steps] and done >= steps, text[-6000:]
    assert not re.search(rf'File "{REPOSITORY}/(?!\.venv/)', text), text[-6000:]  # torchrun's traceback is not ours
    assert "error: step" not in text, text[-6000:]
    if words == []:  # Slurm keeps a cancelled job from the queue
        words = ["--num_gpus", "1", "--master_port", str(free_port())]
        job = cluster.submit(step.room, str(cluster.folder / "recipe.yaml"), *words, "--output_dir", output)
    else:
        assert code == "143:0", text[-6000:]
        assert cluster.run("scontrol", "requeue", job).returncode == 0
        cluster.start_again(job, "TimeLimit=60")
    cluster.until(job, "COMPLETED")
    assert ("Resumed" in cluster.log(job)) == (steps > 0), cluster.log(job)
    assert curve(cluster.folder / output) == curve(unbroken(cluster, step))
    assert weights(cluster.folder / output) == weights(unbroken(cluster, step)) != {}


@trains
@pytest.mark.parametrize("meeting", ["--master_port={}", "--rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{}"], ids=["port", "c10d"])
def test_torchrun_restarts_from_the_newest_checkpoint(cluster, request, meeting):
    """--max-restarts 1 starts the same words again, without --resume; the end is that of a run that was not killed."""
    output = f"again-{request.node.callspec.id}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1"]
    words = [*torchrun, *meeting.format(free_port()).split(), *PLAIN[1:], "--output_dir", output]
    again = subprocess.Popen(words, cwd=cluster.folder, env=cluster.env)
    while steps_done(cluster, output) < 7:
        assert again.poll() is None
        time.sleep(0.02)
    next(one for one in psutil.Process(again.pid).children() if environ_of(one).get("RANK") == "1").kill()
    assert again.wait(300) == 0
    assert curve(cluster.folder / output) == curve(unbroken(cluster, STEP["sft"]))
    names = {folder.name for folder in (cluster.folder / output / "checkpoints").iterdir()}
    assert "step-00000024" in names and not any(name.startswith("earlier") for name in names), names


@trains
def test_a_lost_node_sends_the_job_back_to_the_queue(cluster):
    job, processes = stopped(cluster, STEP["sft"], "lost", 3)
    processes[1].kill()
    processes[0].resume()
    cluster.start_again(job)
    cluster.until(job, "COMPLETED", text="Resumed")
    text = cluster.log(job)
    assert "is lost: the connection to it ended" in text and "the job goes back to the queue" in text, text[-6000:]
    said = text[: text.index("the job goes back")].splitlines()[-6:]
    assert any("it said: node 1" in line or ("it said:" in line and "is lost" in line) for line in said), said
    assert curve(cluster.folder / "lost") == curve(unbroken(cluster, STEP["sft"]))


@trains
def test_a_port_that_is_taken_is_told_with_the_flag(cluster):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["--num_gpus", "1", "--master_port", port, "--output_dir", "taken"]
        job = cluster.submit("step1_sft", str(cluster.folder / "recipe.yaml"), *words)
        cluster.until(job, "FAILED")
    assert f"--master_port {port}: address already in use" in cluster.log(job), cluster.log(job)[-6000:]
