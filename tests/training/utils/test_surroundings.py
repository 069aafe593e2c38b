"""Ranks that OpenMPI gives are those that torch and DeepSpeed read; other launchers' are left alone."""

from training.utils.surroundings import adopt_mpi_ranks

MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip


def test_a_process_of_mpirun_knows_its_rank():
    environ = dict(MPI)
    adopt_mpi_ranks(environ)
    assert environ == MPI | {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}


def test_what_another_launcher_said_stands():
    for environ in ({"RANK": "2", **MPI}, {}):
        before = dict(environ)
        adopt_mpi_ranks(environ)
        assert environ == before
