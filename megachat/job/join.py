"""The start of every program of several ranks: found alike, watched, and the errors of storage told as a user's."""

import contextlib
import errno
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from megachat.config import Config
from megachat.device import collective_backend
from megachat.errors import UserError
from megachat.job.agreement import meet_ranks
from megachat.job.failure_monitor import FailureMonitor
from megachat.job.launch import LaunchEnvironment, choose_device, rank_0_address
from megachat.parallel.engine import start_collectives
from megachat.parallel.mesh import Mesh, build_mesh

_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_SLOW_PART = 0.9  # of parallel.timeout_s, so that the watch speaks before torch does


@contextlib.contextmanager
def join_job(
    environment: LaunchEnvironment, config: Config, own_facts: dict, folder: Path, *, then: str
) -> Iterator[tuple[Mesh, FailureMonitor]]:
    """All ranks enter together, once in a process, and leave torch.distributed when the block ends in order.

    own_facts: from `agreement.rank_facts`. folder: where a standing job's table goes, and which is named where storage fails. then: what a user does
    after the job has ended and the cause is gone. Raises UserError.
    """
    device = choose_device(environment)
    with FailureMonitor(environment.rank, then=then) as monitor:
        with meet_ranks(environment, own_facts, config.parallel.rendezvous_s):
            mesh = start_mesh(config, device)
        limits = {"stall_s": config.parallel.stall_s, "slow_s": _SLOW_PART * config.parallel.timeout_s}
        monitor.connect(mesh, address=rank_0_address(), folder=folder, **limits)
        try:
            yield mesh, monitor
        except OSError as error:
            if error.errno not in _STORAGE:
                raise
            raise UserError(
                f"rank {mesh.world.rank} could not read or write {error.filename or folder} ({error.strerror}): "
                f"free space there or make it accessible, then {then}"
            ) from error
        end_collectives()


def start_mesh(config: Config, device: torch.device) -> Mesh:
    """Join the other ranks. All ranks call it once."""
    start_collectives(device, collective_backend(device), timedelta(seconds=config.parallel.timeout_s))
    mesh = build_mesh(device, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
    torch.manual_seed(random_seed(config.run.seed, 0, mesh.world.rank))
    return mesh


def random_seed(seed: int, step: int, rank: int) -> int:
    """For torch's own random numbers, of which each rank has a stream; a new process would otherwise have any."""
    return hash((seed, step, rank)) % 2**63


def end_collectives() -> None:
    """Leave the job in order, so that no rank sees another vanish."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
