"""What the launcher's environment says about this job, read without importing MPI.

A launcher and an MPI library that do not understand each other start several copies of a world of
one rank, each of which believes that it is alone. Only the launcher's variables give that away.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hpcml.errors import UserError

APART = "MPIR_CVAR_NOLOCAL"
"""Set to 1, MPICH takes each rank for a node of its own, and all messages to UCX or libfabric."""


@dataclass(frozen=True)
class Launch:
    """The job as its launcher describes it. None where the launcher does not say."""

    launcher: str | None
    """mpiexec, srun, flux, jsrun; None for a process started by hand."""
    size: int
    """Processes started together; 1 without a launcher."""
    rank: int | None
    """The rank the launcher had in mind, a hint only: MPI decides."""
    local_rank: int | None
    """Position among the processes of this machine."""
    local_size: int | None
    """Processes on this machine."""
    variable: str | None
    """The variable that told the size."""


@dataclass(frozen=True)
class _Dialect:
    launcher: str
    size: str
    rank: str
    local_rank: str
    local_size: str


# The first whose size is set counts: what an mpiexec sets is closer to the process than what the
# batch system around it set, and a step is closer than the allocation it runs in.
_DIALECTS = (
    _Dialect(
        "mpiexec (Open MPI)",
        *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    _Dialect(
        "mpiexec (MVAPICH)",
        *("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
        *("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ),
    _Dialect("mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Dialect(
        "jsrun",
        *("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
        *("JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    ),
    _Dialect("flux run", "FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID", ""),
    _Dialect("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
    _Dialect("srun", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
    _Dialect("srun", "SLURM_NPROCS", "SLURM_PROCID", "SLURM_LOCALID", ""),
)


def read(environ: Mapping[str, str] = os.environ) -> Launch:
    """What the environment says about the job."""

    def number(name: str) -> int | None:
        text = environ.get(name, "")
        return int(text) if text.isdecimal() else None

    for dialect in _DIALECTS:
        size = number(dialect.size)
        if size is None:
            continue
        launcher = dialect.launcher
        local_rank, local_size = number(dialect.local_rank), number(dialect.local_size)
        if dialect.size == "PMI_SIZE" and "SLURM_STEP_ID" in environ and local_size is None:
            # Slurm's own PMI-2 plug-in; it names the local rank in its own way.
            launcher, local_rank = "srun", number("SLURM_LOCALID")
        return Launch(launcher, size, number(dialect.rank), local_rank, local_size, dialect.size)
    return Launch(None, 1, None, None, None, None)


def check_world(size: int, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse a world of one rank of which the launcher started several copies.

    Raises `UserError`. A world of several ranks is never refused: then the two have understood each
    other, even if the job uses fewer ranks than the allocation has.
    """
    job = read(environ)
    if size > 1 or job.size <= 1:
        return
    assert job.variable is not None, "a size without its variable"
    if job.variable.startswith("SLURM_"):
        remedy = (
            "use 'srun --mpi=pmi2' (or the type of your MPI; see 'srun --mpi=list') or 'mpiexec'; "
            f"if one process is meant, as in a plain line of an sbatch script, unset {job.variable}"
        )
    else:
        remedy = (
            "start with the mpiexec that belongs to the MPI library mpi4py uses; "
            f"if one process is meant, unset {job.variable}"
        )
    raise UserError(
        f"{job.variable}={job.size}, but the MPI world has 1 rank: {job.launcher} and the MPI "
        f"library do not match, and each of {job.size} copies would run the whole job: {remedy}"
    )


def apart(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether MPICH is told that no two ranks are on one node."""
    return environ.get(APART, "").lower() in ("1", "true", "yes", "on")


def without_launcher(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without the launcher's variables, for child jobs of a rank.

    `MPI_Init` fails in a child process that inherits them.
    """
    prefixes = ("PMI_", "PMIX_", "MPI_LOCAL", "HYDI_", "HYDRA_", "OMPI_COMM_", "OMPI_UNIVERSE_")
    return {name: value for name, value in environ.items() if not name.startswith(prefixes)}
