"""Ranks that srun and mpirun give are those that torch reads; other launchers' are left alone, and odd ones refused."""

import pytest

from errors import UserError
from training.utils.run.ranks import adopt_ranks, check_alone

pytestmark = pytest.mark.fast

MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"), "5184", strict=True)}
# As Slurm 22.05 sets them for the last of 7 tasks on 4 nodes.
SRUN = {
    "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3", "SLURM_STEP_NUM_TASKS": "7", "SLURM_NTASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "solo", "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0",
}  # fmt: skip


def adopted(environ: dict[str, str]) -> dict[str, str]:
    """What was added to the variables."""
    after = dict(environ)
    adopt_ranks(after)
    return {name: value for name, value in after.items() if environ.get(name) != value}


def test_a_process_of_mpirun_knows_its_rank():
    where = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert adopted(MPI | where) == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}
    with pytest.raises(UserError, match=r"several hosts.*scripts\.launch"):
        adopted(MPI)
    alone = adopted(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "PMIX_NAMESPACE": "77"})
    assert alone["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(alone["MASTER_PORT"]) < 32768


def test_a_task_of_srun_knows_its_rank():
    found = adopted(SRUN)
    assert int(found.pop("MASTER_PORT")) in range(20000, 32768)
    assert found == {"RANK": "6", "LOCAL_RANK": "0", "WORLD_SIZE": "7", "LOCAL_SIZE": "1", "MASTER_ADDR": "solo"}
    assert adopted(SRUN)["MASTER_PORT"] != adopted(SRUN | {"SLURM_JOB_ID": "13"})["MASTER_PORT"]
    assert adopted(SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})["LOCAL_SIZE"] == "2"


def test_what_another_launcher_said_stands():
    ranks = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert adopted(ranks | MPI) == adopted(ranks | SRUN) == adopted({}) == adopted({"SLURM_NTASKS": "1"}) == {}


def test_one_process_in_an_allocation_of_several_is_refused():
    with pytest.raises(UserError, match="allocation of 2 tasks: put srun before the command"):
        check_alone({"SLURM_NTASKS": "2"})
    for environ in ({}, {"SLURM_NTASKS": "1"}, SRUN, {"SLURM_NTASKS": "2", "RANK": "0"}):
        check_alone(environ)
