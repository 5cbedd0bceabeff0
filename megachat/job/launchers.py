"""Which launcher started this process, from its environment variables: rank, number of ranks, rank on this host.

It uses the standard library only, because errors before torch is loaded are reported by rank too.
"""

import ipaddress
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megachat.errors import UserError

_USE_ANOTHER = "start the ranks with torchrun, deepspeed, mpirun or srun"
_SET_ALL = f"set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of every rank, or {_USE_ANOTHER}"
TORCH = "RANK and WORLD_SIZE"  # of torchrun, deepspeed and many others
_COMPLETE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """A rank as its launcher set it. local_rank and local_size (this host's ranks) are None where it does not say."""

    launcher: str
    rank: int
    world: int
    local_rank: int | None
    local_size: int | None


@dataclass(frozen=True)
class _Variables:
    """The variables of one launcher. Several names in a string: the first that is set counts."""

    launcher: str
    rank: str
    world: str
    local_rank: str = ""
    local_size: str = ""
    sign: str = ""  # set by this launcher only; default: rank


# In this order: a launcher inside another one's job comes first, as Hydra (MPICH, Intel MPI) inside a Slurm allocation.
# Flux, PALS and srun set PMI_RANK as well, and Open MPI and srun PMIX_RANK.
_LAUNCHERS = (
    _Variables("mpirun", *(f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Variables("MVAPICH", *(f"MV2_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Variables("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    _Variables("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    _Variables("PALS", "PALS_RANKID", "PALS_SIZE PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE PMI_LOCAL_SIZE"),
    _Variables("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", sign="MPI_LOCALRANKID"),
    _Variables("srun", "SLURM_PROCID", "SLURM_NTASKS SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    _Variables("a PMI launcher", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    _Variables("a PMIx launcher", "PMIX_RANK", ""),
)
_TORCH = _Variables(TORCH, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE LOCAL_SIZE")
_PODS = ("PET_NNODES", "PET_NPROC_PER_NODE")  # set by Kubeflow, read by torchrun


def find_launch(env: Mapping[str, str]) -> Launch | None:
    """Returns what the launcher of this process set, None for a process that was started alone.

    Raises UserError for values that are no ranks, and for a launcher that does not say how many ranks there are:
    otherwise every rank would train alone.
    """
    if all(name in env for name in _COMPLETE):
        return _read_variables(_TORCH, env)
    alone = None
    for variables in _LAUNCHERS:
        if (variables.sign or variables.rank) in env and not (alone and not variables.world):
            launch = _read_variables(variables, env)
            if launch.world > 1:
                return launch
            alone = alone or launch
    one_rank = "RANK" in env or env.get("WORLD_SIZE", "1") != "1"
    # RANK of a pod with several ranks is the pod's number, and WORLD_SIZE the number of all ranks
    for_torchrun = _PODS[1:] if one_rank else _PODS if alone is None else ()
    if "LOCAL_RANK" not in env and any(
        env.get(name, "1") not in ("", "1", "auto", "cpu", "gpu") for name in for_torchrun
    ):
        raise UserError(
            f"{' and '.join(name for name in _PODS if name in env)} of this pod are for torchrun: start "
            "`torchrun launch/pretrain.py ...` in it, not python"
        )
    return _read_variables(_TORCH, env) if one_rank else alone


def _read_variables(variables: _Variables, env: Mapping[str, str]) -> Launch:
    rank_name, world_name, local_name, size_name = (
        next((name for name in names.split() if name in env), "")
        for names in (variables.rank, variables.world, variables.local_rank, variables.local_size)
    )
    if not rank_name or not world_name:
        lacks, has = ("this process's rank", world_name) if world_name else ("the number of ranks", rank_name)
        raise UserError(f"{has} of {variables.launcher} is set, but no variable has {lacks}: {_SET_ALL}")
    world = number(world_name, env[world_name], 1)
    rank = number(rank_name, env[rank_name])
    if rank >= world:
        raise UserError(f"{rank_name} is {rank} and {world_name} is {world}: ranks are numbered from 0 to {world - 1}")
    local = number(local_name, env[local_name]) if local_name else None
    size = number(size_name, env[size_name], 1) if env.get(size_name) else _local_size(variables.launcher, world, env)
    if size is not None and not size_name:
        size = min(world, max(size, (local or 0) + 1))
    if local is not None and local >= min(world, size or world):
        of = f"{size_name} {size}" if size_name else f"{world_name} {world}"
        raise UserError(f"{local_name} is {local}, of {of}: it is numbered from 0 on each host")
    return Launch(variables.launcher, rank, world, local, size)


def _local_size(launcher: str, world: int, env: Mapping[str, str]) -> int | None:
    """Returns how many ranks are on this host, from variables that describe the whole job; None if there are none."""
    if launcher == "flux" and env.get("FLUX_JOB_NNODES", "").isdecimal():
        return math.ceil(world / max(1, int(env["FLUX_JOB_NNODES"])))
    if launcher != "srun":
        return None
    counts = []  # SLURM_TASKS_PER_NODE looks like "4(x2),1"
    for part in env.get("SLURM_TASKS_PER_NODE", "").split(",") if "SLURM_NODEID" in env else ():
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1) if tasks else []
    return counts[int(env["SLURM_NODEID"])] if counts else int(env.get("SLURM_NTASKS_PER_NODE", "1"))


def number(name: str, value: str, least: int = 0, most: int = 999_999) -> int:
    """Returns the value of the environment variable `name`; raises UserError for other text than such a number."""
    if not re.fullmatch("[0-9]{1,9}", value) or not least <= int(value) <= most:
        raise UserError(f"{name} is {value[:40]!r}, not a whole number from {least} to {most}: correct or unset it")
    return int(value)


def check_master(address: str, port: str) -> int:
    """Returns MASTER_PORT as a number; raises UserError where it or MASTER_ADDR cannot be where rank 0 listens."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        labels = address.removesuffix(".").split(".")
        if not all(re.fullmatch(r"\w[\w-]{0,62}", label, re.ASCII) for label in labels):
            raise UserError(
                f"MASTER_ADDR is {address[:80]!r}, neither an IP address nor a host name (labels of 1 to 63 letters, "
                "digits and hyphens between dots): set it to rank 0's host, without a port"
            ) from None
    return number("MASTER_PORT", port, 1, 65535)


def launcher_rank() -> int:
    """Returns this process's rank as its launcher set it; 0 without a launcher, or where it set no number."""
    for name in dict.fromkeys(variables.rank for variables in (_TORCH, *_LAUNCHERS)):
        if re.fullmatch("[0-9]{1,9}", os.environ.get(name, "")):
            return int(os.environ[name])
    return 0


def launcher_world() -> int:
    """Returns the number of ranks that the launcher of this process started, 1 without a launcher."""
    launch = find_launch(os.environ)
    return launch.world if launch else 1


def completion_requested() -> bool:
    """Returns whether argcomplete's part in the shell has started this process, to ask for completions."""
    return "_ARGCOMPLETE" in os.environ


def no_color_requested() -> bool:
    """Returns whether the user or the terminal wants no colors (NO_COLOR, see no-color.org; TERM=dumb)."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
