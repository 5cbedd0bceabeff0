"""Sparse tables on grids of data x tensor ranks against plain parameters with dense gradients in one process.

Seen to fail with: contributions of ranks overwritten instead of added, gradients of a cut table taken from the first
tensor rank, no division by the data ranks, a row's count raised by two, rows read before the write of the step before,
gradients kept after a step, requests shifted by one row.
"""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megachat.checkpoint.save import repair_checkpoints_folder, save_checkpoint
from megachat.checkpoint.storage import load_checkpoint
from megachat.optim.row_store import RowStore
from megachat.optim.row_tables import RowTable, RowTables
from megachat.optim.row_update import row_state_shapes, update_rows
from megachat.parallel.collectives import all_reduce
from tests.harness import RankError, run_ranks
from tests.muon import on_cpu
from tests.rows import DenseRows

# rows of several tables: not divided by the ranks, fewer than four ranks, and many that nothing reads
TABLES = [
    RowTable("cut", 13, 8, start=0.5, cut=True),
    RowTable("whole", 13, 6, start=-0.25),
    RowTable("few", 3, 4, cut=True),
    RowTable("large", 301, 4),
]
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))  # data, tensor
SHARES, MICROS, STEPS = 4, 2, 5  # a step's texts are 4 shares of 2 micro-batches, however many data ranks there are
SKIPPED = 2  # the step whose gradient is not finite
BETAS, EPSILON, SCALE = (0.8, 0.995), 1e-10, 2.0**10


def rows_read(table: RowTable, step: int, share: int, micro: int) -> torch.Tensor:
    """int64 [2, 7] with duplicates and -1; equal for tables with equally many rows."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * share + 10 * micro + table.rows)
    index = torch.randint(-1, min(table.rows, 40), (2, 7), generator=generator)
    return index.masked_fill_(torch.tensor(step == 3 and share == 0 and micro == 0), -1)  # a rank that reads nothing


def factor(table: RowTable, step: int, share: int, micro: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step + 7 * share + 31 * micro + table.width)
    return torch.randn(2, 7, table.width, generator=generator)


def lr(step: int) -> float:
    return 0.05 * (step + 1)


def loss(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return ((rows + 1).square() * weights).sum() / (SHARES * MICROS)


# ---- one process, dense


def plain(optimizer: str) -> dict[str, torch.Tensor]:
    """Returns the state by "table/kind" after all steps, computed in float64."""
    state = {}
    for table in TABLES:
        weight = torch.full((table.rows, table.width), table.start, dtype=torch.float64, requires_grad=True)
        dense = DenseRows(weight, rowwise=optimizer == "rowwise")
        for step in range(STEPS):
            read = torch.zeros(table.rows, dtype=torch.bool)
            for share in range(SHARES):
                for micro in range(MICROS):
                    index = rows_read(table, step, share, micro)
                    rows = torch.where(index[..., None] < 0, 0.0, weight[index.clamp_min(0)])
                    loss(rows, factor(table, step, share, micro)).backward()
                    read[index[index >= 0]] = True
            gradient, weight.grad = weight.grad, None
            if step != SKIPPED:
                dense.step(gradient * clipping(step), read, lr=lr(step), betas=BETAS, epsilon=EPSILON)
        kinds = {"exp_avg": dense.first, "exp_avg_sq": dense.second}
        kinds = {"mean_square": dense.second[:, 0]} if dense.rowwise else kinds
        for kind, tensor in ({"master": weight.detach(), "count": dense.count} | kinds).items():
            state[f"{table.name}/{kind}"] = tensor
    return state


def clipping(step: int) -> float:
    return 0.5 if step % 2 else 1.0


# ---- what the ranks run


def build(mesh, optimizer="adamw", **settings) -> RowTables:
    return RowTables(TABLES, mesh, optimizer=optimizer, betas=BETAS, epsilon=EPSILON, **settings)


def take_step(tables: RowTables, mesh, step: int, *, recompute: bool = False) -> float:
    """Returns the sum of squares of the mean gradient over all ranks, without the loss scale."""
    for table in TABLES:
        tables.set_lr(table.name, lr(step))
    shares = range(mesh.data.rank, SHARES, mesh.data.size)
    for share in shares:
        for micro in range(MICROS):
            shared = rows_read(TABLES[0], step, share, micro)  # of the tables with 13 rows
            total = torch.zeros((), requires_grad=True)
            for table in TABLES:
                index = shared if table.rows == 13 else rows_read(table, step, share, micro)
                width = table.width // mesh.tensor.size
                columns = slice(width * mesh.tensor.rank, width * (mesh.tensor.rank + 1))
                weights = factor(table, step, share, micro)[..., columns]

                def part(index=index, weights=weights, table=table, columns=columns):
                    rows = tables.read(table.name, index).float()
                    return loss(rows if table.cut else rows[..., columns], weights)

                total = total + (checkpoint(part, use_reentrant=False) if recompute else part())
            # as DeepSpeed: the loss scale, and the mean over this rank's micro-batches; loss() has the mean over all
            (total * SCALE * mesh.data.size).backward()
    tables.wait_for_reduce()
    squares = torch.stack([gradient.square().sum() for gradient in tables.gradients()]).sum() / SCALE**2
    all_reduce(squares, mesh.stage)
    if step == SKIPPED:
        tables.discard_gradients()
    else:
        tables.step(torch.tensor(clipping(step) / SCALE))
    return squares.item()


def pieces(tables: RowTables) -> dict:
    return {f"{name}/{kind}": (shape, rectangles) for kind, name, shape, rectangles in tables.state_shards()}


def copied(tables: RowTables) -> dict:
    return {
        name: (shape, [(offsets, sizes, view.clone()) for offsets, sizes, view in rectangles])
        for name, (shape, rectangles) in pieces(tables).items()
    }


def train(layout, settings, folder: Path | None = None):
    """The state's rectangles and sums of squares of every step, for each of the settings; saves after two steps."""
    mesh, answers = on_cpu(layout), []
    for how in settings:
        recompute = how.pop("recompute", False)
        tables = build(mesh, **how)
        squares = [take_step(tables, mesh, step, recompute=recompute) for step in range(2)]
        if folder:
            save_checkpoint(folder, 2, pieces(tables), {}, lambda path: None, mesh.saving)
        squares += [take_step(tables, mesh, step, recompute=recompute) for step in range(2, STEPS)]
        answers.append((copied(tables), squares))
    return answers


def load_and_train(layout, path, first: int):
    mesh = on_cpu(layout)
    tables = build(mesh, host=True)
    load_checkpoint(path, pieces(tables))
    loaded = copied(tables)
    for step in range(first, STEPS):
        take_step(tables, mesh, step)
    return loaded, copied(tables)


def assembled(parts: list[dict]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' rectangles, each element from one rank."""
    whole: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, (shape, rectangles) in part.items():
            target = whole.setdefault(name, torch.full(shape, torch.nan))
            for offsets, sizes, view in rectangles:
                here = target[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
                assert here.isnan().all(), f"two ranks keep rows of {name}"
                here.copy_(view)
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


# ---- the tests

ADAMW = [{}, {}, {"host": True}, {"host": True, "recompute": True}]
ROWWISE = [{"optimizer": "rowwise"}, {"optimizer": "rowwise", "host": True}]
SETTINGS = ADAMW + ROWWISE


@pytest.fixture(scope="module")
def trained() -> dict:
    """Layout -> [(whole state, sums of squares)] of SETTINGS."""
    results = {}
    for layout in LAYOUTS:
        answers = run_ranks(train, layout[0] * layout[1], layout, [dict(how) for how in SETTINGS])
        results[layout] = [
            (assembled([answer[number][0] for answer in answers]), answers[0][number][1])
            for number in range(len(SETTINGS))
        ]
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", ["adamw", "rowwise"])
def test_every_layout_equals_dense_plain_tables(layout, optimizer, trained):
    wanted = plain(optimizer)
    for how, (state, squares) in zip(SETTINGS, trained[layout], strict=True):
        if how.get("optimizer", "adamw") == optimizer:
            assert state.keys() == wanted.keys()
            for name, tensor in state.items():
                torch.testing.assert_close(tensor.double(), wanted[name], atol=1e-6, rtol=1e-6, msg=name)
            reference = trained[1, 1][SETTINGS.index(how)][1]
            assert squares == pytest.approx(reference, rel=1e-6)
    assert wanted["large/count"].eq(0).sum() > 200  # rows that no rank reads


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_storages_and_recomputation_are_equal_to_the_bit(layout, trained):
    results = trained[layout]
    for alike in (results[: len(ADAMW)], results[len(ADAMW) :]):
        for state, squares in alike[1:]:
            assert same(state, alike[0][0]) and squares == alike[0][1]
    assert not torch.equal(results[0][0]["cut/master"], results[-1][0]["cut/master"])


def test_rows_that_nothing_reads_do_not_change(trained):
    state, _ = trained[2, 2][0]
    unread = state["large/count"] == 0
    assert (state["large/master"][unread] == 0).all() and (state["large/exp_avg_sq"][unread] == 0).all()
    assert (state["large/master"][~unread] != 0).any(dim=1).all()


@pytest.mark.parametrize("saved_on", [(1, 1), (2, 2)])
def test_a_checkpoint_of_any_layout_continues_on_any_other(saved_on, trained, tmp_path):
    run_ranks(train, saved_on[0] * saved_on[1], saved_on, [{}], tmp_path)
    saved = None
    for layout in ((1, 1), (4, 1), (2, 2)):
        answers = run_ranks(load_and_train, layout[0] * layout[1], layout, tmp_path / "step_000002", 2)
        loaded, end = (assembled([answer[part] for answer in answers]) for part in (0, 1))
        saved = saved or loaded
        assert same(loaded, saved)
        if layout == saved_on:
            assert same(end, trained[layout][0][0]), "a resumed run is equal to the bit"
        for name, tensor in end.items():
            torch.testing.assert_close(tensor, trained[1, 1][0][0][name], atol=1e-6, rtol=1e-5)


def wires(layout):
    """bfloat16 rows and gradients, without gradients, and at an index in which no row is read."""
    mesh = on_cpu(layout)
    tables = build(mesh, wire=torch.bfloat16, gradient_wire=torch.bfloat16)
    take_step(tables, mesh, 0)
    with torch.no_grad():
        rows = tables.read("cut", torch.tensor([[3, -1, 12, 3]]))
        nothing = tables.read("few", torch.full((5,), -1))
    assert rows.dtype == torch.bfloat16 and rows.shape == (1, 4, 8 // mesh.tensor.size) and not rows.requires_grad
    assert nothing.shape == (5, 4 // mesh.tensor.size) and not nothing.any() and not rows[0, 1].any()
    assert tables.gradients() == []
    with pytest.raises(RuntimeError, match="arrived after wait_for_reduce"):
        rows = tables.read("large", torch.tensor([1]))
        tables.wait_for_reduce()
        rows.sum().backward()
    return copied(tables)


def test_bfloat16_wires_round_rows_and_gradients():
    exact, narrow = assembled(run_ranks(wires, 1, (1, 1))), assembled(run_ranks(wires, 4, (2, 2)))
    difference = (narrow["cut/exp_avg"] - exact["cut/exp_avg"]).abs().max() / exact["cut/exp_avg"].abs().max()
    assert 0 < difference < 2**-6


def test_the_update_does_not_depend_on_how_rows_are_divided():
    shapes = row_state_shapes("adamw", 9, 4)
    state = {kind: torch.randn(shape).abs() for kind, shape in shapes.items()}
    gradient, settings = torch.randn(9, 4), {"lr": 0.1, "betas": BETAS, "epsilon": EPSILON}
    once = {kind: tensor.clone() for kind, tensor in state.items()}
    update_rows(once, gradient, **settings)
    for here in (slice(0, 2), slice(2, 9)):
        part = {kind: tensor[here] for kind, tensor in state.items()}
        update_rows(part, gradient[here], **settings)
    assert same(once, state)


def test_a_read_waits_for_the_write_before_it_and_raises_its_error(monkeypatch):
    store, hold = RowStore(torch.device("cpu"), host=True), threading.Event()
    table = store.full((4, 2), 0.0)
    store._worker.submit(hold.wait)  # the worker is busy
    store.write([table], torch.tensor([1]), [torch.ones(1, 2)])
    assert not table.any()
    threading.Timer(0.05, hold.set).start()
    (rows,) = store.read([table], torch.tensor([0, 1]))
    assert rows.tolist() == [[0, 0], [1, 1]]
    store.write([table], torch.tensor([9]), [torch.ones(1, 2)])
    with pytest.raises(IndexError):
        store.read([table], torch.tensor([0]))


def die_in_the_write(folder):
    """Saves after every step; the process is killed in the middle of the fourth step's write."""
    mesh = on_cpu((1, 1))
    tables = build(mesh, host=True)
    for step in range(STEPS):
        if step == 3:
            write = torch.Tensor.index_copy_

            def half(tensor, dim, index, rows, write=write):
                write(tensor, dim, index[: len(index) // 2], rows[: len(index) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

            torch.Tensor.index_copy_ = half
        take_step(tables, mesh, step)
        save_checkpoint(folder, step + 1, pieces(tables), {}, lambda path: None, mesh.saving)


def test_a_kill_in_the_write_back_loses_no_checkpoint(trained, tmp_path):
    with pytest.raises(RankError, match="died"):
        run_ranks(die_in_the_write, 1, tmp_path)
    repair_checkpoints_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:06d}" for step in (1, 2, 3)]
    ((loaded, end),) = run_ranks(load_and_train, 1, (1, 1), tmp_path / "step_000003", 3)
    assert same(assembled([end]), trained[1, 1][0][0])


def test_a_width_that_the_tensor_axis_does_not_divide_is_refused():
    with pytest.raises(RankError, match="do not divide the width"):
        run_ranks(odd_width, 2)


def odd_width():
    RowTables([RowTable("odd", 4, 3, cut=True)], on_cpu((1, 2)), optimizer=None)
