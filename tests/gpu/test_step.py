"""What only a GPU has in a step: rows staged beside it, the update as a CUDA graph, and waits of the host."""

import numpy as np
import pytest
import torch

from megachat.data.staging import staging_for
from megachat.optim.partition import Phase
from megachat.planning.plan import resolve_plan
from megachat.train.build import build_training_model
from megachat.train.step import set_schedules
from tests.gpu.test_model import mesh  # noqa: F401
from tests.training import SMALL_VOCAB, random_rows, small_config, take_step


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_staged_rows_are_those_of_their_step_while_the_gpu_is_behind(device):
    staging, rows, sums = staging_for(device, (48, 2049)), np.empty((48, 2049), dtype=np.int64), []
    work = torch.randn(4096, 4096, device="cuda")
    for step in range(30):
        rows[:] = step
        staging.start(rows)
        taken = staging.take()
        work = (work @ work).clamp(-1, 1)  # keeps the stream busy, so that the host is steps ahead
        sums.append(taken.sum() + 0 * work[0, 0].long())
    assert [one.item() for one in sums] == [step * rows.size for step in range(30)]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_update_is_equal_to_the_bit(compute, compiled, mesh):  # noqa: F811
    """The same update with the graph, and without a capture."""
    weights = []
    for captured in (False, True):
        torch.manual_seed(0)
        precision = {"compute": compute, "compile": compiled, "optimizer_graph": True, "attention": "sdpa"}
        config = small_config(precision=precision, optimizer={"clip_norm": 0.2})
        training = build_training_model(
            config, resolve_plan(config, 1, SMALL_VOCAB), mesh, torch.ones(SMALL_VOCAB).long()
        )
        if not captured:
            training.graph._graph.run = lambda function: function()
        generator, adamw = torch.Generator(mesh.device).manual_seed(1), training.engine.adamw
        for step in range(6):  # gradients of the test, because those of a model on a GPU are not reproducible
            set_schedules(training, step)
            for bucket in training.muon._buckets:
                bucket.gradients.normal_(generator=generator)
            training.muon._phase = Phase.REDUCED  # start_reduce() would clear what no hook has collected
            for index, flat in enumerate(adamw.single_partition_of_fp32_groups):
                adamw.averaged_gradients[index] = [torch.empty_like(flat).normal_(generator=generator)]
            training.graph.step(torch.tensor(0.5**step))
        training.muon.wait_for_gather()
        masters = [flat.clone() for flat in adamw.single_partition_of_fp32_groups]
        weights.append([bucket.weights.clone() for bucket in training.muon._buckets] + masters)
        loss, _, skipped = take_step(training, random_rows(9, 12, 161, SMALL_VOCAB))
        assert np.isfinite(loss) and not skipped
    assert all(map(torch.equal, *weights))


def test_a_step_waits_for_the_gpu_no_more_than_is_listed(mesh):  # noqa: F811
    """tests/ranks/test_no_sync.py lists the waits; torch raises at every other one on a GPU."""
    config = small_config(precision={"compute": "bfloat16", "attention": "sdpa"})
    training = build_training_model(config, resolve_plan(config, 1, SMALL_VOCAB), mesh, torch.ones(SMALL_VOCAB).long())
    rows = [random_rows(step, 12, 161, SMALL_VOCAB).to(mesh.device) for step in range(3)]
    for step in range(2):
        set_schedules(training, step)
        take_step(training, rows[step])
    set_schedules(training, 2)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="called a synchronizing CUDA operation") as waits:
            take_step(training, rows[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in waits if "synchronizing" in str(one.message)]) <= 3  # norm, and the test's loss


def test_the_kernels_that_max_autotune_chooses_compute_the_same(mesh, report):  # noqa: F811
    losses = []
    for mode in ("default", "max-autotune"):
        torch.manual_seed(0)
        precision = {"compute": "bfloat16", "attention": "sdpa", "compile": True, "compile_mode": mode}
        config = small_config(precision=precision)
        training = build_training_model(
            config, resolve_plan(config, 1, SMALL_VOCAB), mesh, torch.ones(SMALL_VOCAB).long()
        )
        for step in range(3):
            set_schedules(training, step)
            loss, *_ = take_step(training, random_rows(step, 12, 161, SMALL_VOCAB).to(mesh.device))
        losses.append(loss)
    report("loss of the third step, default and max-autotune", losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
