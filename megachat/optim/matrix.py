"""A weight matrix as the Muon partition sees it: shape, tensor-parallel cut and cost. No torch."""

from dataclasses import dataclass
from typing import Literal

NEWTON_SCHULZ_STEPS = 5
_LONG_RATIO = 2  # as in kernels/polar.py: of the sides, from which a matrix is long


def polar_products(rows: int, columns: int, dtype: str) -> list[tuple[tuple[int, int, int], int]]:
    """Returns the products of the orthogonalization of a matrix in a dtype: ((rows, columns, inner), how many)."""
    short, long = sorted((rows, columns))
    gram, square, apply = (short, short, long), (short, short, short), (short, long, short)
    if dtype == "float32" and long >= _LONG_RATIO * short:
        return [(gram, 3), (square, 11), (apply, 3)]
    return [(gram, NEWTON_SCHULZ_STEPS), (square, NEWTON_SCHULZ_STEPS), (apply, NEWTON_SCHULZ_STEPS)]


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of the model.

    shape: of the whole matrix. block: index of its block, 0 is the first in the forward pass. multiplier: factor on
    Muon's learning rate. cut: the dimension that the tensor axis divides. "column" divides the output features (dim 0),
    "row" the input features (dim 1). "whole" is not divided and requires one tensor rank. The part of one tensor rank
    is called the local matrix.
    """

    name: str
    shape: tuple[int, int]
    block: int
    multiplier: float = 1.0
    cut: Literal["column", "row", "whole"] = "whole"

    @property
    def elements(self) -> int:
        """Number of elements of the whole matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def flops(self) -> int:
        """FLOPs of the orthogonalization in bfloat16. Owners are balanced by it in all dtypes, so that a plan does not
        depend on the dtype; long matrices take less in float32."""
        return sum(2 * m * n * k * count for (m, n, k), count in polar_products(*self.shape, "bfloat16"))

    @property
    def scaled_by_row(self) -> bool:
        """Whether the second moment has one value per row (tall or square matrices), else one per column."""
        return self.shape[0] >= self.shape[1]

    def local_shape(self, tensor: int) -> tuple[int, int]:
        """Returns the shape of the local matrix on an axis of `tensor` ranks. Raises ValueError if the cut does not
        divide evenly."""
        if tensor == 1:
            return self.shape
        if self.cut not in ("column", "row"):
            raise ValueError(f"{self.name} is not cut by the tensor axis, which has {tensor} ranks")
        rows, columns = self.shape
        if (rows if self.cut == "column" else columns) % tensor:
            raise ValueError(
                f"{self.name} has shape {self.shape}: its {self.cut} cut does not divide into {tensor} equal parts"
            )
        return (rows // tensor, columns) if self.cut == "column" else (rows, columns // tensor)

    def local_offset(self, tensor: int, rank: int) -> tuple[int, int]:
        """Returns the row and column of the whole matrix at which the local matrix of tensor rank `rank` starts."""
        rows, columns = self.local_shape(tensor)
        return (rank * rows, 0) if self.cut == "column" else (0, rank * columns)
