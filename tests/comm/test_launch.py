"""What the launcher's variables say, and the refusal of copies of a one-rank world."""

from __future__ import annotations

import pytest

from hpcml.comm.launch import check_world, read, without_launcher
from hpcml.errors import UserError
from tests.comm.jobs import Job

HYDRA = dict(PMI_SIZE="4", PMI_RANK="2", MPI_LOCALRANKID="0", MPI_LOCALNRANKS="2")
OPEN_MPI = dict(
    OMPI_COMM_WORLD_SIZE="4",
    OMPI_COMM_WORLD_RANK="3",
    OMPI_COMM_WORLD_LOCAL_RANK="1",
    OMPI_COMM_WORLD_LOCAL_SIZE="2",
)
BATCH = dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0")
STEP = dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="3", SLURM_PROCID="2", SLURM_LOCALID="1")


def test_launchers_are_told_apart() -> None:
    assert read({}).launcher is None and read({}).size == 1 and read({}).rank is None
    hydra = read(HYDRA)
    assert (hydra.launcher, hydra.size, hydra.rank) == ("mpiexec", 4, 2)
    assert (hydra.local_rank, hydra.local_size) == (0, 2)
    open_mpi = read(OPEN_MPI)
    assert (open_mpi.launcher, open_mpi.size, open_mpi.rank) == ("mpiexec (Open MPI)", 4, 3)
    assert (open_mpi.local_rank, open_mpi.local_size) == (1, 2)


def test_what_is_closest_to_the_process_counts() -> None:
    assert read({**BATCH, **STEP}).size == 3
    assert read({**BATCH, **HYDRA}).launcher == "mpiexec"
    assert read({**BATCH, **HYDRA, "PMI_SIZE": "1"}).size == 1
    pmi2 = read({**BATCH, **STEP, "PMI_SIZE": "3", "PMI_RANK": "2"})
    assert (pmi2.launcher, pmi2.size, pmi2.rank, pmi2.local_rank) == ("srun", 3, 2, 1)
    assert read({"PMI_SIZE": "many"}).size == 1


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (BATCH, "SLURM_NTASKS=4"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS=2"),
        ({**BATCH, **STEP}, "SLURM_STEP_NUM_TASKS=3"),
        (HYDRA, "PMI_SIZE=4"),
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE=4"),
    ],
)
def test_several_copies_of_a_world_of_one_are_refused(
    environment: dict[str, str], told: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_world(1, environment)
    message = str(caught.value)
    assert message.startswith(f"{told}, but the MPI world has 1 rank") and "\n" not in message
    assert "if one process is meant" in message and f"unset {told.split('=')[0]}" in message


@pytest.mark.parametrize(
    ("size", "environment"),
    [
        (1, {}),
        (1, {"SLURM_NTASKS": "1"}),
        (1, {**BATCH, "SLURM_STEP_NUM_TASKS": "1"}),  # salloc's interactive step
        (1, {**BATCH, "PMI_SIZE": "1"}),  # mpiexec -n 1 within a larger allocation
        (2, BATCH),  # mpiexec -n 2 within a larger allocation
        (4, HYDRA),
    ],
)
def test_worlds_that_are_as_meant_are_not_refused(size: int, environment: dict[str, str]) -> None:
    check_world(size, environment)


def test_child_jobs_get_no_launcher() -> None:
    assert without_launcher({**HYDRA, **OPEN_MPI, "PATH": "/bin", "MPICH_X": "1"}) == {
        "PATH": "/bin",
        "MPICH_X": "1",
    }


MESH = """
import sys
from hpcml.errors import UserError
if "no-mpi4py" in sys.argv:
    sys.modules["mpi4py"] = None
import hpcml.comm as comm
assert "mpi4py.MPI" not in sys.modules
try:
    print("size", comm.Mesh().size)
except UserError as error:
    print("refused:", error)
"""


def test_a_process_started_by_hand_is_a_world_of_one(job: Job) -> None:
    assert job(0, MESH).communicate(timeout=60)[0] == "size 1\n"
    assert job(0, MESH, "no-mpi4py").communicate(timeout=60)[0] == "size 1\n"


def test_several_processes_without_mpi_are_refused(job: Job) -> None:
    output = job(0, MESH, "no-mpi4py", PMI_SIZE="2").communicate(timeout=60)[0]
    assert output.startswith("refused: PMI_SIZE=2, but mpi4py cannot be used")
    assert output.endswith("pip install 'hpcml[mpich]'\n") and output.count("\n") == 1


def test_a_missing_mpi_library_is_a_world_of_one_too(job: Job) -> None:
    output = job(0, MESH, MPI4PY_LIBMPI="/nowhere/libmpi.so").communicate(timeout=60)[0]
    assert output == "size 1\n"


def test_copies_started_by_slurm_are_refused(job: Job) -> None:
    output = job(0, MESH, **BATCH).communicate(timeout=60)[0]
    assert output.startswith("refused: SLURM_NTASKS=4, but the MPI world has 1 rank")


def test_mpiexec_in_a_larger_allocation_is_fine(job: Job) -> None:
    output = job(2, MESH, **BATCH).communicate(timeout=60)[0]
    assert output.count("size") == 2 and "refused" not in output
