"""Sparse tables: rows that are addressed by index, divided over the ranks of a pipeline stage, with their optimizer.

Each rank of the data x tensor grid owns a contiguous range of every table's rows, as float32 masters. A forward pass
fetches the rows that it reads from their owners: the distinct indices of the micro-batch travel to the owners, and the
rows travel back. The backward pass sums the gradients of each row in float32 and sends the sums to the owners. An owner
adds them in the order of micro-batches, then of ranks. Nothing depends on timing, so two runs are equal to the bit.

No weight or state changes before step(), so a step can be abandoned until then. On one rank nothing is sent.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from megachat.kernels.uncompiled import uncompiled
from megachat.optim.row_store import RowStore
from megachat.optim.row_update import row_state_shapes, update_rows
from megachat.parallel.collectives import all_to_all
from megachat.parallel.cuts import cut_range
from megachat.parallel.mesh import Mesh
from megachat.parallel.progress import profile_range
from megachat.parallel.rectangles import MASTER, TensorShard
from megachat.parallel.tensor import CHANNELS, REPLICATED, Type

ROWS_PER_UPDATE = 2**16  # rows that step() updates at a time, which bounds its workspace


@dataclass(frozen=True)
class RowTable:
    """A table [rows, width]. start: the initial value of every element. rate: key of Plan.rates.

    cut: each rank of the tensor axis reads an equal share of the columns, in rank order. Otherwise each reads whole
    rows, and their gradients on the ranks of the tensor axis are summed.
    """

    name: str
    rows: int
    width: int
    start: float = 0.0
    cut: bool = False
    rate: str = ""

    @property
    def type(self) -> Type:
        """Returns how the rows that read() returns, and their gradients, are spread over the tensor axis."""
        return CHANNELS if self.cut else REPLICATED


@dataclass(frozen=True)
class RowRequest:
    """Which rows travel between the ranks of the stage for one index tensor."""

    # the rows that this rank reads
    positions: torch.Tensor  # shape of the index: where each row is among the distinct ones; `count` for no row
    count: int  # of distinct rows
    send_counts: list[int]  # how many of them each rank owns
    # the rows that this rank owns and ranks read
    receive_counts: list[int]  # how many each rank reads
    wanted: torch.Tensor  # these, counted from the first row of this rank; by reading rank and ascending
    tensor_ranks: torch.Tensor  # for each of them, the tensor rank of the reading rank


@dataclass
class _Gradients:
    """Gradients of row parts: `index` [n] ascending and `sums` [n, part width], and those not yet added to them."""

    index: torch.Tensor
    sums: torch.Tensor
    pending: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


class RowTables:
    """The tables of this rank's pipeline stage. All ranks of the stage make the same calls in the same order.

    optimizer: "adamw", "rowwise" (see optim.row_update) or None, to read only. host: keep the rows in host memory.
    wire: dtype in which rows travel, and of what read() returns. gradient_wire: dtype in which gradients travel; one
    rank rounds nothing. Raises ValueError if the tensor axis does not divide the width of a cut table.

    One step: read() in the forward passes, wait_for_reduce() after the last backward pass, gradients() for the norm,
    then step() or discard_gradients(). Only exchange_requests() and add_pending() need the values of indices; a
    subclass that overrides them takes steps without values.
    """

    def __init__(
        self,
        tables: list[RowTable],
        mesh: Mesh,
        *,
        optimizer: str | None,
        host: bool = False,
        wire: torch.dtype = torch.float32,
        gradient_wire: torch.dtype = torch.float32,
        betas: tuple[float, float] = (0.0, 0.0),
        epsilon: float = 0.0,
    ):
        self.mesh, self.tables, self._wire = mesh, {table.name: table for table in tables}, wire
        self._gradient_wire = gradient_wire if mesh.stage.size > 1 else torch.float32
        self._betas, self._epsilon, self._lr = betas, epsilon, dict.fromkeys(self.tables, 0.0)
        self._store = RowStore(mesh.device, host=host)
        self._parts = {table.name: mesh.tensor.size if table.cut else 1 for table in tables}
        self._state: dict[str, dict[str, torch.Tensor]] = {}
        for table in tables:
            if table.width % self._parts[table.name]:
                raise ValueError(f"{mesh.tensor.size} tensor ranks do not divide the width of {table}")
            first, last = self._range(table.name)
            shapes = row_state_shapes(optimizer, last - first, table.width)
            self._state[table.name] = {
                kind: self._store.full(shape, table.start if kind == MASTER else 0.0) for kind, shape in shapes.items()
            }
        self._requests = WeakTensorKeyDictionary()  # index -> {rows of the table: its request}
        # autograd calls the backward of a function only if an input requires gradients, and no table does
        self._anchor = torch.zeros((), device=mesh.device, requires_grad=True)
        self._gradients: dict[str, _Gradients] = {}
        self._reduced = False
        self.discard_gradients()

    # ---- forward and backward

    @uncompiled
    def read(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Returns rows [..., width] in the wire's dtype; of a cut table this tensor rank's columns. All ranks of the
        stage call it, those of a tensor axis with equal indices.

        index: int64 [...], below the table's rows; -1 for no row, which gives zeros. Reads of tables with equally many
        rows at the same index tensor share one exchange of requests, so the tensor must not be modified.
        """
        with profile_range("rows"):
            return _Read.apply(self._anchor, self, name, index)

    def _request(self, name: str, index: torch.Tensor) -> RowRequest:
        requests, rows = self._requests.setdefault(index, {}), self.tables[name].rows
        if rows not in requests:
            requests[rows] = self.exchange_requests(name, rows, index)
        return requests[rows]

    def exchange_requests(self, name: str, rows: int, index: torch.Tensor) -> RowRequest:
        """Sends each owner the numbers of those of its rows that this rank reads, distinct and ascending."""
        stage, device = self.mesh.stage, index.device
        # Ascending. An index of -1 becomes row `rows`, which comes last and has no owner.
        distinct, positions = torch.unique(torch.where(index < 0, rows, index), return_inverse=True)
        # Each rank owns a contiguous range of rows, so each owner's part of `distinct` is contiguous too.
        first_rows = [cut_range(rows, stage.size, rank)[0] for rank in range(stage.size)]
        requested = torch.searchsorted(distinct, torch.tensor([*first_rows, rows]).to(device)).diff()
        requested_here = torch.empty_like(requested)
        all_to_all(requested_here, requested, stage, name=f"numbers of rows of {name}")
        send_counts, receive_counts = torch.stack((requested, requested_here)).tolist()
        count, wanted = sum(send_counts), distinct.new_empty(sum(receive_counts))
        name = f"requests for rows of {name}"
        all_to_all(wanted, distinct[:count], stage, receive_counts=receive_counts, send_counts=send_counts, name=name)
        wanted -= first_rows[stage.rank]
        tensor_ranks = torch.arange(stage.size, device=device) % self.mesh.tensor.size
        tensor_ranks = tensor_ranks.repeat_interleave(requested_here)
        return RowRequest(positions, count, send_counts, receive_counts, wanted, tensor_ranks)

    def _wanted_parts(self, name: str, request: RowRequest) -> torch.Tensor:
        """Returns the index of each requested part in a table viewed as [rows * parts, width / parts]."""
        parts = self._parts[name]
        return request.wanted if parts == 1 else request.wanted * parts + request.tensor_ranks

    def _fetch(self, name: str, request: RowRequest) -> torch.Tensor:
        """Returns the distinct rows [count + 1, part width] that this rank reads; the last is zero, for no row."""
        width = self.tables[name].width // self._parts[name]
        (wanted,) = self._store.read([self._state[name][MASTER].view(-1, width)], self._wanted_parts(name, request))
        rows = torch.empty((request.count + 1, width), dtype=self._wire, device=wanted.device)
        rows[request.count] = 0
        self._exchange(rows[: request.count], wanted.to(self._wire), request, f"rows of {name}")
        return rows

    def _exchange(
        self, received: torch.Tensor, sent: torch.Tensor, request: RowRequest, what: str, *, to_owners: bool = False
    ) -> None:
        """Sends rows from their owners to the ranks that read them; to_owners: the other way."""
        counts = [[count * sent.size(1) for count in each] for each in (request.send_counts, request.receive_counts)]
        send_counts, receive_counts = counts if to_owners else reversed(counts)
        flat = received.view(-1), sent.view(-1)
        all_to_all(*flat, self.mesh.stage, receive_counts=receive_counts, send_counts=send_counts, name=what)

    @torch.no_grad()
    def _collect(self, name: str, request: RowRequest, gradient: torch.Tensor) -> None:
        """Sends the gradient of what a read returned to the owners, summed by row, and keeps what this rank owns."""
        if self._reduced:
            raise RuntimeError(f"a gradient of {name} arrived after wait_for_reduce() and before the step's end")
        local = _sum_by_position(
            gradient.reshape(-1, gradient.size(-1)).float(), request.positions.view(-1), request.count + 1
        )
        sent = local[: request.count].to(self._gradient_wire)
        received = sent.new_empty(len(request.wanted), sent.size(1))
        self._exchange(received, sent, request, f"gradients of rows of {name}", to_owners=True)
        collected = self._gradients[name]
        collected.pending.append((self._wanted_parts(name, request), received.float()))
        # waiting for as many rows as there are sums bounds both memory and work
        if sum(len(index) for index, _ in collected.pending) >= len(collected.index):
            self.add_pending(name)

    def add_pending(self, name: str) -> None:
        """Adds the gradients of a table that wait to the sums of their rows."""
        collected = self._gradients[name]
        if collected.pending:
            indices, values = zip((collected.index, collected.sums), *collected.pending, strict=True)
            collected.index, positions = torch.unique(torch.cat(indices), return_inverse=True)
            collected.sums = _sum_by_position(torch.cat(values), positions, len(collected.index))
            collected.pending.clear()

    # ---- the end of a step

    @torch.no_grad()
    def wait_for_reduce(self) -> None:
        """Completes the mean of the gradients over the data axis. All backward passes of the step are done."""
        if not self._reduced:
            for name, collected in self._gradients.items():
                self.add_pending(name)
                collected.sums.div_(self.mesh.data.size)
        self._reduced = True

    def gradients(self) -> list[torch.Tensor]:
        """Returns the mean gradients of the rows that this rank owns, float32. All ranks together have each row once.

        A row that was not read has no gradient. Valid from wait_for_reduce() to step() or discard_gradients().
        """
        return [collected.sums for collected in self._gradients.values() if len(collected.index)]

    def gradient_shards(self) -> list[TensorShard]:
        """Returns copies of gradients() as the rows of whole tables, zero for rows that were not read."""
        shards = []
        for name, (index, gradients) in self.gradient_rows().items():
            first, last = self._range(name)
            dense = gradients.new_zeros(last - first, gradients.size(1)).index_copy_(0, index, gradients)
            shards.append(self._shard("gradient", name, dense))
        return shards

    def set_gradient_shards(self, shards: list[TensorShard]) -> None:
        """Replaces the gradients of the rows that were read with those in shards from gradient_shards()."""
        rows = self.gradient_rows()
        for _, name, _, rectangles in shards:
            index, gradients = rows[name]
            for _, _, dense in rectangles:
                gradients.copy_(dense[index])

    def gradient_rows(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Returns (local rows that were read [n] ascending, their gradients [n, width], live) of every table.

        Valid as gradients() is.
        """
        # the ranks of the tensor axis read the same rows, so all parts of a row are there
        return {
            name: (collected.index[:: self._parts[name]] // self._parts[name], collected.sums.view(-1, table.width))
            for (name, table), collected in zip(self.tables.items(), self._gradients.values(), strict=True)
        }

    def _range(self, name: str) -> tuple[int, int]:
        """Returns the rows [first, last) of a table that this rank owns."""
        return cut_range(self.tables[name].rows, self.mesh.stage.size, self.mesh.stage.rank)

    def set_lr(self, name: str, lr: float) -> None:
        """Sets a table's learning rate for the next steps."""
        self._lr[name] = lr

    @torch.no_grad()
    def step(self, gradient_scale: float | torch.Tensor) -> None:
        """Updates the rows that were read, with their gradients times `gradient_scale`."""
        for name, (rows, gradients) in self.gradient_rows().items():
            state = self._state[name]
            for index, gradient in zip(rows.split(ROWS_PER_UPDATE), gradients.split(ROWS_PER_UPDATE), strict=True):
                values = dict(zip(state, self._store.read(list(state.values()), index), strict=True))
                update_rows(
                    values, gradient * gradient_scale, lr=self._lr[name], betas=self._betas, epsilon=self._epsilon
                )
                self._store.write(list(state.values()), index, list(values.values()))
        self.discard_gradients()

    def discard_gradients(self) -> None:
        """Ends the step; without step() before it, nothing has changed."""
        self._gradients = {
            name: _Gradients(
                torch.empty(0, dtype=torch.int64, device=self.mesh.device),
                torch.empty(0, table.width // self._parts[name], device=self.mesh.device),
            )
            for name, table in self.tables.items()
        }
        self._reduced = False

    # ---- state

    def state_shards(self) -> list[TensorShard]:
        """Returns every state of every table, float32, after all writes. The rectangles are views: load into them."""
        self._store.wait()
        return [
            self._shard(kind, name, tensor) for name, state in self._state.items() for kind, tensor in state.items()
        ]

    def _shard(self, kind: str, name: str, tensor: torch.Tensor) -> TensorShard:
        (first, _), table = self._range(name), self.tables[name]
        offset, shape = (first, 0)[: tensor.ndim], (table.rows, table.width)[: tensor.ndim]
        return TensorShard(kind, name, shape, [(offset, tuple(tensor.shape), tensor)] if len(tensor) else [])


class _Read(torch.autograd.Function):
    """Forward: fetches the rows of an index. Backward: sends their gradients to the owners."""

    @staticmethod
    def forward(ctx, anchor, tables: RowTables, name: str, index: torch.Tensor) -> torch.Tensor:
        ctx.tables, ctx.name, ctx.request = tables, name, tables._request(name, index)
        return F.embedding(ctx.request.positions, tables._fetch(name, ctx.request))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        with profile_range("rows"):
            ctx.tables._collect(ctx.name, ctx.request, gradient)
        return None, None, None, None


def _sum_by_position(values: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """Sums values [n, width] float32 with equal positions [n] into [count, width].

    The order of additions depends only on the positions, also on a GPU, where index_add_ uses atomics: this is the
    backward pass of an embedding, which sorts.
    """
    return torch.ops.aten.embedding_dense_backward(values, positions, count, -1, False)
