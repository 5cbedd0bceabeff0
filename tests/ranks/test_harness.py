"""The process harness itself: results in order, failures named, hangs ended."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from megachat.parallel.mesh import build_mesh
from tests.harness import RankError, run_ranks
from tests.limits import slowness


def _whoami(offset):
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return offset + dist.get_rank(), int(os.environ["LOCAL_RANK"]), torch.get_num_threads(), total


def _mesh():
    mesh = build_mesh(torch.device("cpu"), tensor=2)
    return mesh.data.ranks, mesh.tensor.ranks, mesh.pipeline.size


def _one_raises():
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def _one_dies():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def _one_sleeps():
    if dist.get_rank() == 1:
        time.sleep(6000)
    dist.barrier()


def test_results_come_in_rank_order():
    for rank, (shifted, local, threads, total) in enumerate(run_ranks(_whoami, 3, 10)):
        assert (shifted, local, threads) == (10 + rank, rank, 1)
        assert total.item() == 3.0


def test_the_mesh_can_be_built():
    assert run_ranks(_mesh, 4) == [((0, 2), (0, 1), 1), ((1, 3), (0, 1), 1), ((0, 2), (2, 3), 1), ((1, 3), (2, 3), 1)]


def test_a_failure_names_rank_and_reason():
    with pytest.raises(RankError, match="(?s)rank 1 of 3.*_one_raises.*the reason"):
        run_ranks(_one_raises, 3)


def test_a_dead_process_is_reported():
    with pytest.raises(RankError, match="rank 1 of 2:\nthe process died"):
        run_ranks(_one_dies, 2)


def test_a_hang_ends_with_the_stacks():
    with pytest.raises(RankError, match="(?s)no answer from ranks .0, 1. of 2.*_one_sleeps"):
        run_ranks(_one_sleeps, 2, timeout_s=6 * slowness())
