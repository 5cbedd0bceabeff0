"""Starts every multi-rank program: connects the ranks, monitors them, and turns storage errors into user errors."""

import contextlib
import errno
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from megachat.activity import announced
from megachat.config import Config
from megachat.device import collective_backend, gpu_id
from megachat.errors import UserError
from megachat.job.agreement import RankFacts, meet_ranks
from megachat.job.failure_monitor import FailureMonitor
from megachat.job.launch import LaunchEnvironment, choose_device, rank_0_address
from megachat.job.monitor_hub import RESUME_HINT
from megachat.parallel.build import start_collectives
from megachat.parallel.mesh import Mesh, build_mesh

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_STORAGE |= {errno.ESTALE, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_SLOW_SHARE = 0.9  # of parallel.timeout_s, so that the failure monitor reports a stall before torch times out


@contextlib.contextmanager
def join_job(
    environment: LaunchEnvironment, config: Config, facts: RankFacts, folder: Path, *, restart_hint: str = RESUME_HINT
) -> Iterator[tuple[Mesh, FailureMonitor]]:
    """Joins the other ranks, and leaves torch.distributed when the block ends without an error. All ranks enter it
    once.

    facts: from agreement.rank_facts. folder: where stall.txt is written; also reported if storage fails. restart_hint:
    what the user does once the cause of a failure is fixed. Raises UserError.
    """
    device = choose_device(environment)
    if gpu := gpu_id(device):
        facts = {**facts, "gpu": {"id": gpu}}
    with FailureMonitor(environment.rank, restart_hint=restart_hint) as monitor:
        first = environment.rank == 0
        with (
            announced(f"connecting {environment.world_size} ranks", shown=first and environment.world_size > 1),
            meet_ranks(environment, facts, config.parallel.rendezvous_s),
        ):
            mesh = start_mesh(config, device)
        limits = {"stall_s": config.parallel.stall_s, "slow_s": _SLOW_SHARE * config.parallel.timeout_s}
        monitor.connect(mesh, address=rank_0_address(), folder=folder, **limits)
        try:
            yield mesh, monitor
        except OSError as error:
            if error.errno not in _STORAGE:
                raise
            raise UserError(
                f"rank {mesh.world.rank} could not read or write {error.filename or folder} ({error.strerror}): "
                f"free space there or make it accessible, then {restart_hint}"
            ) from error
        end_collectives()


def start_mesh(config: Config, device: torch.device) -> Mesh:
    """Starts torch.distributed, builds the mesh and seeds torch. All ranks call it once."""
    start_collectives(device, collective_backend(device), timedelta(seconds=config.parallel.timeout_s))
    mesh = build_mesh(device, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
    torch.manual_seed(random_seed(config.run.seed, 0, mesh.world.rank))
    return mesh


def random_seed(seed: int, step: int, rank: int) -> int:
    """Returns the seed of torch's global generator, one stream per rank.

    Without it a process would start from an arbitrary seed.
    """
    return hash((seed, step, rank)) % 2**63


def end_collectives() -> None:
    """Leaves torch.distributed in order, so that no rank takes the exit of another one for a failure."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
