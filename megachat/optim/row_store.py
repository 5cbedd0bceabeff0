"""Memory for a rank's table rows, on the device or in host memory."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch


class RowStore:
    """Float32 tensors whose rows are read and written by index.

    host: keep the tensors in host memory, pinned if the device is a GPU. One worker thread then does all reads and
    writes in the order of the calls. So write() returns at once, and a later read() never sees rows of before it.
    """

    def __init__(self, device: torch.device, *, host: bool):
        self.device, self._memory = device, torch.device("cpu") if host else device
        self._pinned = host and device.type == "cuda"
        self._worker = ThreadPoolExecutor(1, "rows") if host else None
        self._writes: list[Future] = []

    def full(self, shape: tuple[int, ...], value: float) -> torch.Tensor:
        """Returns a new tensor."""
        return torch.full(shape, value, dtype=torch.float32, device=self._memory, pin_memory=self._pinned)

    def read(self, tensors: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
        """Returns copies of the rows on the device. index: int64 [n], on the device."""
        if self._worker is None:
            return [tensor.index_select(0, index) for tensor in tensors]
        on_host = index.cpu()
        rows = self._worker.submit(self._select, tensors, on_host).result()
        self.wait()  # all earlier writes are done; raises the error of one that failed
        return [part.to(self.device, non_blocking=True) for part in rows]

    def write(self, tensors: list[torch.Tensor], index: torch.Tensor, rows: list[torch.Tensor]) -> None:
        """Replaces the rows; no index may occur twice. The caller must not change `rows` afterwards."""
        if self._worker is None:
            _write(tensors, index, rows)
        else:
            on_host = [part.cpu() for part in rows]
            self._writes.append(self._worker.submit(_write, tensors, index.cpu(), on_host))

    def wait(self) -> None:
        """Returns when all writes are done, and raises the error of one that failed. Call it before direct access."""
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    def _select(self, tensors: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
        outs = [torch.empty((len(index), *t.shape[1:]), dtype=t.dtype, pin_memory=self._pinned) for t in tensors]
        return [torch.index_select(t, 0, index, out=out) for t, out in zip(tensors, outs, strict=True)]


@torch.no_grad()
def _write(tensors: list[torch.Tensor], index: torch.Tensor, rows: list[torch.Tensor]) -> None:
    for tensor, part in zip(tensors, rows, strict=True):
        tensor.index_copy_(0, index, part)
