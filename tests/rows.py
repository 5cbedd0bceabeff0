"""The optimizer rules of sparse tables, on whole dense tables. What optim/row_tables.py is compared with."""

import torch


class DenseRows:
    """A whole table's state. rowwise: one second moment per row and no first moment, else Adam's."""

    def __init__(self, weight: torch.Tensor, *, rowwise: bool):
        self.rowwise, self.weight = rowwise, weight
        self.first = torch.zeros_like(weight)
        self.second = torch.zeros_like(weight[:, :1] if rowwise else weight)
        self.count = torch.zeros(len(weight), dtype=torch.float64)

    @torch.no_grad()
    def step(
        self, gradient: torch.Tensor, read: torch.Tensor, *, lr: float, betas: tuple[float, float], epsilon: float
    ) -> None:
        """Updates the rows [rows] bool that the step read, in place. gradient: dense."""
        self.count += read
        square, moved = gradient.square(), read.unsqueeze(1)
        if self.rowwise:
            square = square.mean(1, keepdim=True)
        self.first = torch.where(moved, betas[0] * self.first + (1 - betas[0]) * gradient, self.first)
        self.second = torch.where(moved, betas[1] * self.second + (1 - betas[1]) * square, self.second)
        first, second = ((1 - beta ** self.count.clamp_min(1)).unsqueeze(1).to(gradient.dtype) for beta in betas)
        direction = gradient if self.rowwise else self.first / first
        self.weight -= moved * lr * direction / ((self.second / second).sqrt() + epsilon)


@torch.no_grad()
def fill_tables(rows, value_of) -> None:
    """Gives this rank's rows of every table their part of value_of(name, shape), the whole table."""
    for kind, name, whole, rectangles in rows.state_shards():
        for (first, *_), (count, *_), view in rectangles if kind == "master" else ():
            view.copy_(value_of(name, whole)[first : first + count])
