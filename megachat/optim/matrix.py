"""What the Muon partition knows about a weight matrix: its whole shape, how the tensor axis cuts it, what it costs. No torch."""

from dataclasses import dataclass
from typing import Literal

NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Matrix:
    """One weight matrix. shape: of the whole. layer: its block, 0 is the first of the forward pass. multiplier: of the learning rate.

    cut: what the tensor axis divides: "column" the output features (dim 0), "row" the input features (dim 1), "whole" nothing, which an
    axis of more than one rank does not take.
    """

    name: str
    shape: tuple[int, int]
    layer: int
    multiplier: float = 1.0
    cut: Literal["column", "row", "whole"] = "whole"

    @property
    def elements(self) -> int:
        """rows x columns of the whole."""
        return self.shape[0] * self.shape[1]

    @property
    def flops(self) -> int:
        """Orthogonalization in five steps with the Gram matrix on the smaller side."""
        short, long = min(self.shape), max(self.shape)
        return NEWTON_SCHULZ_STEPS * (4 * short * short * long + 2 * short**3)

    @property
    def scales(self) -> int:
        """Values in the second moment: one a row when tall or square, else one a column, so the longer side."""
        return max(self.shape)

    @property
    def scaled_by_row(self) -> bool:
        """True when the second moment has a value a row."""
        return self.shape[0] >= self.shape[1]

    def local_shape(self, tensor: int) -> tuple[int, int]:
        """Shape of one of the `tensor` equal shards. Raises ValueError when the matrix cannot be divided so."""
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
        """Where the shard of tensor rank `rank` begins in the whole."""
        rows, columns = self.local_shape(tensor)
        return (rank * rows, 0) if self.cut == "column" else (0, rank * columns)


def touched_rows(columns: int, start: int, stop: int) -> tuple[int, int]:
    """The rows [first, last) that elements [start, stop) of a row-major matrix lie in."""
    return start // columns, -(-stop // columns)
