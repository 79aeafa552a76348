"""Is this process part of a job on several machines? Read from the environment. Pure.

There a server per machine would silently repeat all the work on each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

_Environ: TypeAlias = Mapping[str, str]


def multi_node_reason(environ: Mapping[str, str]) -> str | None:
    """Tell what kind of job on several machines this is; None: none that is known.

    Args:
        environ: The environment.

    Returns:
        A phrase for a message, such as "a Slurm job on 4 nodes".
    """
    for check in _CHECKS:
        reason = check(environ)
        if reason:
            return reason
    return None


def _count(environ: _Environ, *names: str) -> int:
    """Read the first of these variables that is a number; 0 if none is."""
    for name in names:
        text = environ.get(name, "").strip()
        if text.isascii() and text.isdigit():
            return int(text)
    return 0


def _slurm(environ: _Environ) -> str | None:
    nodes = _count(environ, "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    if nodes > 1:
        return f"a Slurm job on {nodes} nodes"
    if environ.get("SLURM_ARRAY_JOB_ID") and environ.get("SLURM_ARRAY_TASK_COUNT") != "1":
        return "a Slurm job array"
    return None


def _kubernetes(environ: _Environ) -> str | None:
    is_pod = bool(environ.get("KUBERNETES_SERVICE_HOST"))
    return "an indexed Kubernetes job" if is_pod and "JOB_COMPLETION_INDEX" in environ else None


def _mpi(environ: _Environ) -> str | None:
    for all_name, local_name in (
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_SIZE", "MPI_LOCALNRANKS"),
    ):
        here = _count(environ, local_name)
        if here and _count(environ, all_name) > here:
            return "an MPI job on several nodes"
    return None


def _torchrun(environ: _Environ) -> str | None:
    if "LOCAL_WORLD_SIZE" not in environ:
        return None
    is_wide = _count(environ, "WORLD_SIZE") > _count(environ, "LOCAL_WORLD_SIZE")
    return "a torchrun job on several nodes" if is_wide else None


def _other_arrays(environ: _Environ) -> str | None:
    """Recognise arrays and wide jobs of further schedulers."""
    if environ.get("PBS_ARRAY_INDEX") or environ.get("PBS_ARRAYID"):
        return "a PBS job array"
    if environ.get("SGE_TASK_ID", "undefined") != "undefined" or _count(environ, "NHOSTS") > 1:
        return "a Grid Engine job on several nodes or an array"
    if _count(environ, "LSB_JOBINDEX") > 0 or len(set(environ.get("LSB_HOSTS", "").split())) > 1:
        return "an LSF job on several nodes or an array"
    if environ.get("AWS_BATCH_JOB_ARRAY_INDEX") or _count(environ, "AWS_BATCH_JOB_NUM_NODES") > 1:
        return "an AWS Batch job on several nodes or an array"
    if _count(environ, "CLOUD_RUN_TASK_COUNT") > 1:
        return "a Cloud Run job of several tasks"
    return None


_CHECKS: Final[tuple[Callable[[_Environ], str | None], ...]] = (
    _slurm,
    _kubernetes,
    _mpi,
    _torchrun,
    _other_arrays,
)
