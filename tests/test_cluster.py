"""Steps under a real Slurm and mpirun: scripts/test.sh -m cluster. Needs root, and slurm-wlm, munge and openmpi-bin of Debian."""

import re
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from scripts.launch.checks import AS_ROOT
from tests.launching import REPOSITORY, logged, write_pairs
from tests.slurm import MISSING, Cluster, is_installed, slurm
from tests.tiny import tiny_checkpoint
from training.utils.engine.checkpoint import whole_checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(not is_installed(), reason=MISSING)]
FLAGS = {
    "model_name_or_path": "base", "data_path": ["pairs.jsonl"], "data_split": "1,1,1", "dtype": "fp32", "logging_steps": 1,
    "seed": 7, "max_seq_len": 64, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "zero_stage": 2,
}  # fmt: skip
PLAIN = [sys.executable, "-m", "training.step1_sft.main", "--config", "plain.yaml"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Slurm, with a model, data and two recipes in the folder that its jobs run in."""
    folder = tmp_path_factory.mktemp("slurm")
    tiny_checkpoint(folder / "base", "llama")
    write_pairs(folder / "pairs.jsonl", 200)
    (folder / "plain.yaml").write_text(yaml.safe_dump(FLAGS | {"max_steps": 3}))
    recipe = {"launch": {"platform": "cpu"}, "sft": FLAGS | {"output_dir": "sft", "num_train_epochs": 1000, "save_steps": 5}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with slurm(folder) as cluster:
        yield cluster


def steps_done(cluster: Cluster, output: str) -> int:
    """Return the optimizer steps that a run has logged."""
    return len(logged(cluster.folder / output, "train/loss")) if (cluster.folder / output / "metrics.jsonl").is_file() else 0


def begin(cluster: Cluster, output: str, *words: str, steps: int = 7) -> str:
    """Submit the batch file for two nodes, and wait until it has made some steps; returns the job."""
    recipe = str(cluster.folder / "recipe.yaml")
    job = cluster.submit("step1_sft", recipe, output, "--num_gpus", "1", "--master_port", "29711", *words)
    ends = time.monotonic() + 300
    while steps_done(cluster, output) < steps:
        assert time.monotonic() < ends and cluster.state(job)[0] in ("PENDING", "RUNNING"), cluster.log(job)[-6000:]
        time.sleep(0.2)
    return job


def test_tasks_of_srun_and_of_mpirun_are_one_run(cluster, tmp_path):
    """Also with no launcher of ours: today's two processes train what two under torchrun train, into one folder."""
    plain = cluster.run("srun", "-N2", "-n2", *PLAIN, "--output_dir", "srun")
    assert plain.returncode == 0 and plain.stdout.count("Saved to srun") == 1, plain.stdout[-3000:] + plain.stderr[-3000:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29712", *PLAIN[1:]]
    assert cluster.run(*torchrun, "--output_dir", "torchrun").returncode == 0
    losses = {"torchrun": logged(cluster.folder / "torchrun", "train/loss"), "srun": logged(cluster.folder / "srun", "train/loss")}
    if shutil.which("mpirun"):
        cluster.env |= dict.fromkeys(AS_ROOT, "1")
        mpirun = cluster.run("mpirun", "--oversubscribe", "-np", "2", *PLAIN, "--output_dir", "mpirun")
        assert mpirun.returncode == 0 and mpirun.stdout.count("Saved to mpirun") == 1, mpirun.stdout[-3000:] + mpirun.stderr[-3000:]
        losses["mpirun"] = logged(cluster.folder / "mpirun", "train/loss")
    assert len(losses["srun"]) == 3 and len({tuple(values) for values in losses.values()}) == 1, losses
    assert not list((cluster.folder / "srun").rglob("earlier-*"))


def test_one_process_in_a_shell_of_salloc_is_refused(cluster):
    done = cluster.run("salloc", "-n2", *PLAIN, "--output_dir", "salloc")
    assert done.returncode == 2 and "put srun before the command" in done.stderr, done.stderr
    assert not (cluster.folder / "salloc").exists()


@pytest.mark.parametrize("words", [["--batch", "--signal=TERM"], ["--signal=TERM"], []])
def test_a_job_that_is_told_to_end_saves_and_resumes(cluster, words):
    """--batch: what --signal=B:TERM@300 does before the time limit. Without it Slurm signals the step; scancel alone, both."""
    output = "-".join(["told", *(word.strip("-").replace("=", "") for word in words)])
    job = begin(cluster, output)
    cluster.run("scancel", *words, job)
    code = cluster.until(job, "FAILED", "CANCELLED", text="continues" if words else "")
    text = cluster.log(job)
    saved = list(whole_checkpoints(cluster.folder / output / "checkpoints"))
    step = steps_done(cluster, output)
    assert saved and int(saved[0].name.removeprefix("step-")) == step >= 7, text[-6000:]
    assert not re.search(rf'File "{REPOSITORY}/(?!\.venv/)', text), text[-6000:]  # torchrun's traceback is not ours
    assert "error: step" not in text, text[-6000:]
    if not words:  # Slurm keeps a cancelled job from the queue
        return
    assert code == "143:0", text[-6000:]
    assert cluster.run("scontrol", "requeue", job).returncode == 0
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm 22.05 waits two minutes
    cluster.until(job, "RUNNING", text="Resumed")
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    cluster.until(job, "FAILED")
    assert steps_done(cluster, output) > step


def test_torchrun_restarts_from_the_newest_checkpoint(cluster):
    """--max-restarts 1 starts the same words again, without --resume; the losses are those of a run that was not killed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1"]
    step = [*PLAIN[1:], "--max_steps", "30", "--save_steps", "2"]
    whole = cluster.run(*torchrun, "--master_port", "29713", *step, "--output_dir", "unbroken")
    assert whole.returncode == 0, whole.stdout[-3000:] + whole.stderr[-3000:]
    words = [*torchrun, "--master_port", "29714", *step, "--output_dir", "again"]
    again = subprocess.Popen(words, cwd=cluster.folder, env=cluster.env)
    while steps_done(cluster, "again") < 7:
        assert again.poll() is None
        time.sleep(0.02)
    next(one for one in psutil.Process(again.pid).children() if environ_of(one).get("RANK") == "1").kill()
    assert again.wait(300) == 0
    assert logged(cluster.folder / "again", "train/loss") == logged(cluster.folder / "unbroken", "train/loss")
    names = {folder.name for folder in (cluster.folder / "again" / "checkpoints").iterdir()}
    assert "step-00000030" in names and not any(name.startswith("earlier") for name in names), names


def test_a_lost_node_sends_the_job_back_to_the_queue(cluster):
    cluster.env["SANBU_NODE_TIMEOUT"] = "20"
    job = begin(cluster, "lost")
    second = next(
        process for process in psutil.process_iter()
        if process.is_running() and environ_of(process).get("SLURM_NODEID") == "1" and environ_of(process).get("RANK") == "1"
    )  # fmt: skip
    second.kill()
    cluster.until(job, "PENDING", seconds=120)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    cluster.until(job, "RUNNING", text="Resumed", seconds=400)
    text = cluster.log(job)
    assert "is lost: the connection to it ended" in text and "the job goes back to the queue" in text, text[-6000:]
    said = text[: text.index("the job goes back")].splitlines()[-6:]
    assert any("it said: node 1" in line or ("it said:" in line and "is lost" in line) for line in said), said
    cluster.run("scancel", job)
    cluster.until(job, "CANCELLED", "COMPLETED")


def environ_of(process: psutil.Process) -> dict[str, str]:
    """Return the environment of a process; {} for one that is gone."""
    try:
        return process.environ()
    except psutil.Error:
        return {}
