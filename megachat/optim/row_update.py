"""Optimizer rules of sparse tables: a step changes only the rows that were read in it, and each row counts its steps.

Pure functions of the rows that a step read. With g a row's gradient, c the steps that read the row, this one included:

"adamw": Adam (arXiv 1412.6980) without weight decay, m and v per element:
    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr * (m / (1 - b1^c)) / (sqrt(v / (1 - b2^c)) + eps)
"rowwise": one second moment per row and no first moment (that of FBGEMM's partial row-wise Adam):
    v = b2 v + (1 - b2) mean(g^2);  w -= lr * g / (sqrt(v / (1 - b2^c)) + eps)
"""

from collections.abc import Sequence

import torch

from megachat.parallel.rectangles import MASTER, MOMENTS

COUNT = "count"
_MOMENTS = {"adamw": MOMENTS, "rowwise": ("mean_square",)}


def row_state_shapes(optimizer: str | None, rows: int, width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each float32 state of a table [rows, width] by kind; optimizer None: weights only.

    The count of a row is float32, exact up to 2^24 steps.
    """
    shapes: dict[str, tuple[int, ...]] = {MASTER: (rows, width)}
    if optimizer:
        shapes |= {kind: (rows,) if kind == "mean_square" else (rows, width) for kind in _MOMENTS[optimizer]}
        shapes[COUNT] = (rows,)
    return shapes


def update_rows(
    rows: dict[str, torch.Tensor], gradient: torch.Tensor, *, lr: float, betas: Sequence[float], epsilon: float
) -> None:
    """Updates weights and state of n rows in place. rows: by kind, [n, width] or [n]; gradient [n, width]; all float32.

    Rows do not depend on each other, so dividing them into parts does not change a bit.
    """
    rows[COUNT] += 1
    # in float64: 1 - b^c is small in the first steps
    correct_1, correct_2 = (1 - torch.pow(beta, rows[COUNT].double()).unsqueeze(1) for beta in betas)
    if "mean_square" in rows:
        rows["mean_square"].lerp_(gradient.square().mean(dim=1), 1 - betas[1])
        direction, second = gradient, rows["mean_square"].unsqueeze(1)
    else:
        rows["exp_avg"].lerp_(gradient, 1 - betas[0])
        rows["exp_avg_sq"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        direction, second = rows["exp_avg"] / correct_1.float(), rows["exp_avg_sq"]
    rows[MASTER].sub_(lr * direction / ((second / correct_2.float()).sqrt_() + epsilon))
