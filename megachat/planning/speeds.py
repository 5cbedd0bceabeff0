"""How fast a machine does each kind of work: from data sheets here, from a probe in megachat/planning/probe.py. Pure;
no torch.
"""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from megachat.optim.matrix import NEWTON_SCHULZ_STEPS, polar_products
from megachat.planning.communication import Kind, axis_group, collective_sec
from megachat.planning.hardware import Machine
from megachat.planning.step_work import ITEMSIZE, AttentionWork, Gemm

# Shares of a data sheet's peaks that kernels reach. That of float8 follows from one published run (nanochat's run 6,
# see docs/performance.md); the others are assumed, of the order that published kernels reach.
PRODUCT_SHARE = MappingProxyType({"bfloat16": 0.80, "float16": 0.80, "float32": 0.80, "float8": 0.759})
ATTENTION_SHARE = 0.55  # of the peak of products, forward and backward together
MEMORY_SHARE = 0.85
BACKWARD_FLOPS = 2.5  # of attention kernels that compute scores again, relative to forward
# Of an output tile that one multiprocessor computes, the most efficient size in NVIDIA's guide "Matrix Multiplication
# Background". Sizes that it does not divide waste the rest of a tile.
TILE_ROWS, TILE_COLUMNS = 128, 256
INNER_HALF = {"bfloat16": 64, "float16": 64, "float32": 32, "float8": 128}  # inner size at half of the rate
KERNEL_SEC = 3e-6  # from the end of a kernel to the next one's full speed
LAUNCH_SEC = 8e-6  # of the host, per kernel
STEP_SEC = 2e-3  # of the host, per step: the loader's rows, the schedule, waiting for the norm
SHEET_ERROR = 0.15  # relative error of a prediction without a probe: docs/performance.md


class Speeds(Protocol):
    """Seconds of each kind of work on one rank, while all ranks of its node work.

    name: for messages. error: relative, of predictions with it. overlap: share of a collective's time that computing
    can hide.
    """

    name: str
    error: float
    overlap: float

    def product(self, product: Gemm) -> float:
        """Returns the seconds of the products of one shape, all of them."""
        ...

    def attention(self, attention: AttentionWork) -> float:
        """Returns the seconds of the passes of one kind, all of them."""
        ...

    def moved(self, size: float, tensor_bytes: float, kernels: float) -> float:
        """Returns the seconds of elementwise kernels that move `size` bytes in tensors of about `tensor_bytes`."""
        ...

    def streamed(self, size: float) -> float:
        """Returns the seconds of elementwise kernels that move `size` bytes of whole parameters."""
        ...

    def logits(self, count: float, tokens: float, bytes_per_logit: float) -> float:
        """Returns the seconds of the loss on `count` logits of a micro-batch of `tokens` tokens, without products."""
        ...

    def polar(self, rows: int, columns: int, dtype: str) -> float:
        """Returns the seconds of orthogonalizing one matrix, with the scales of its update."""
        ...

    def collective(self, kind: Kind, size: float, ranks: int, stride: int, first: int = 0) -> float:
        """Returns the seconds of a collective of `size` bytes over ranks that are `stride` world ranks apart; first: as
        in axis_group."""
        ...

    def factor(self, part: str) -> float:
        """Returns the factor on a part's time that a measured step has shown."""
        ...

    def host(self, kernels: float, steps: float) -> float:
        """Returns the host's seconds for launching kernels and for whole steps."""
        ...


class SheetSpeeds:
    """Speeds from a GPU's data sheet: rooflines with an efficiency by shape. share: as PRODUCT_SHARE, by dtype."""

    overlap = 1.0
    error = SHEET_ERROR

    def __init__(self, machine: Machine, share: Mapping[str, float] = PRODUCT_SHARE):
        self.machine, self.share, self.name = machine, share, machine.name
        self._product = functools.lru_cache(maxsize=4096)(self._product_sec)

    def product(self, product: Gemm) -> float:
        rows, columns, inner, dtype, count = product
        return count * self._product(rows, columns, inner, dtype)

    def _product_sec(self, rows: int, columns: int, inner: int, dtype: str) -> float:
        gpu = self.machine.gpu
        peak = gpu.flops.get(dtype, gpu.flops["bfloat16"])
        tiles = math.ceil(rows / TILE_ROWS) * math.ceil(columns / TILE_COLUMNS)
        parts = 1
        if tiles < gpu.multiprocessors:  # libraries cut the sum instead, down to pieces of a few hundred
            parts = max(1, min(gpu.multiprocessors // tiles, inner // 512))
        waves = tiles * parts / gpu.multiprocessors
        # waves of equal tiles leave multiprocessors idle at the end; persistent kernels lose half of that
        shape = waves / (waves + 0.5 * (math.ceil(waves) - waves)) if waves > 1 else waves
        shape *= rows * columns / (tiles * TILE_ROWS * TILE_COLUMNS)
        shape *= inner / (inner + INNER_HALF[dtype])
        flops = 2 * rows * columns * inner / (peak * self.share[dtype] * shape)
        size = 1 if dtype == "float8" else ITEMSIZE[dtype]
        moved = size * (rows * inner + inner * columns) + max(2, size) * rows * columns
        return max(flops, moved / (MEMORY_SHARE * gpu.memory_bytes_per_sec)) + KERNEL_SEC

    def attention(self, attention: AttentionWork) -> float:
        gpu = self.machine.gpu
        flops = 4 * attention.rows * attention.heads * attention.head_size * visible_pairs(attention)
        flops *= attention.forward + BACKWARD_FLOPS * attention.backward
        share = ATTENTION_SHARE * min(1.0, attention.head_size / 128)
        kernels = attention.forward + 2 * attention.backward
        size = ITEMSIZE[attention.dtype] * attention.rows * attention.tokens * attention.head_size
        moved = size * (attention.heads + attention.kv_heads) * 2 * (attention.forward + 2 * attention.backward)
        peak = gpu.flops.get(attention.dtype, gpu.flops["bfloat16"])
        seconds = max(flops / (peak * share), moved / (MEMORY_SHARE * gpu.memory_bytes_per_sec))
        return seconds + kernels * KERNEL_SEC

    def moved(self, size: float, tensor_bytes: float, kernels: float) -> float:
        return size / (MEMORY_SHARE * self.machine.gpu.memory_bytes_per_sec) + kernels * KERNEL_SEC

    def streamed(self, size: float) -> float:
        return size / (MEMORY_SHARE * self.machine.gpu.memory_bytes_per_sec)

    def logits(self, count: float, tokens: float, bytes_per_logit: float) -> float:
        return self.streamed(count * bytes_per_logit)

    def polar(self, rows: int, columns: int, dtype: str) -> float:
        return polar_products_sec(self, rows, columns, dtype) + self.moved(
            rows * columns * ITEMSIZE[dtype] * NEWTON_SCHULZ_STEPS * 4 + rows * columns * 24, rows * columns, 20
        )

    def collective(self, kind: Kind, size: float, ranks: int, stride: int, first: int = 0) -> float:
        return collective_sec(self.machine, kind, size, axis_group(self.machine, ranks, stride, first))

    def factor(self, part: str) -> float:
        return 1.0

    def host(self, kernels: float, steps: float) -> float:
        return kernels * LAUNCH_SEC + steps * STEP_SEC


def visible_pairs(attention: AttentionWork) -> float:
    """Returns the pairs of query and visible key in a row: query i sees keys i - window .. i."""
    tokens, window = attention.tokens, min(attention.window, attention.tokens - 1)
    return tokens * (window + 1) - window * (window + 1) / 2


def polar_products_sec(speeds: Speeds, rows: int, columns: int, dtype: str) -> float:
    """Returns the seconds of the products of Polar Express on a matrix."""
    return sum(speeds.product(Gemm(*shape, dtype, count)) for shape, count in polar_products(rows, columns, dtype))
