"""Head and loss together, in chunks of rows: soft-capped logits and their cross entropy without all logits at once.

The table may be cut by rows over processes. Each process then computes its own logits; only the sums of exponentials
and the target's logit are summed over them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHUNK_BYTES = 8 << 20  # float32 logits per chunk on a CPU: what its cache holds
GPU_CHUNK_BYTES = (
    256 << 20
)  # on a GPU: thousands of rows, because with fewer the kernels take less time than their launches


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of the table that this process holds.

    start: the token of the first row. add: sums a tensor in place over all holders. most_rows: the largest number of
    rows of any holder, 0 if there is one holder. All holders derive the same chunks from it, because `add` is called
    once per chunk. chunk_bytes: of float32 logits per chunk; 0 is the device's default. The size changes the order of
    float32 sums.
    """

    start: int = 0
    add: Callable[[torch.Tensor], object] = lambda tensor: None
    most_rows: int = 0
    chunk_bytes: int = 0

    def rows(self, table_rows: int, vocab_size: int) -> int:
        """Returns how many of the local rows are tokens and not padding."""
        return max(0, min(table_rows, vocab_size - self.start))


WHOLE = VocabularyPart()


def squash(logits: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gate sigmoid(-2 logits / cap) of logits [n, columns], the exponentials of the capped logits, and
    their sums [n, 1], in float32. Overwrites float32 logits.

    A capped logit is cap * tanh(logit / cap) = cap - 2 cap * gate. On a CPU a sigmoid takes less time than a tanh.
    """
    gate = logits.float().mul_(-2 / cap).sigmoid_()
    share = torch.rsub(gate, cap, alpha=2 * cap).exp_()
    return gate, share, share.sum(dim=1, keepdim=True)


def logits_gradient(
    gate: torch.Tensor, share: torch.Tensor, factor: torch.Tensor, index: torch.Tensor, at_index: torch.Tensor
) -> torch.Tensor:
    """Returns the gradient of the raw logits [n, columns], float32, from `squash`'s results, which it overwrites.

    The gradient of the capped logits is share * factor, plus at_index in the column `index`; all three are [n, 1]. That
    of capping is 1 - tanh^2 = 4 (gate - gate^2).
    """
    share.mul_(4 * factor).scatter_add_(1, index, 4 * at_index)
    return share.mul_(gate.addcmul_(gate, gate, value=-1))


class PlainProducts:
    """The matrix products of head and loss by chunks of rows. hidden [rows, width], table [columns, width]."""

    row_multiple = 1  # the number of rows of every chunk, the last one included, is a multiple of this
    squash, logits_gradient = staticmethod(squash), staticmethod(logits_gradient)

    def __init__(self, hidden: torch.Tensor, table: torch.Tensor):
        self.hidden, self.table = hidden, table

    def logits(self, chunk: slice) -> torch.Tensor:
        """Returns the chunk's logits [rows of the chunk, columns]."""
        return F.linear(self.hidden[chunk], self.table)

    def write_gradients(
        self, gradient: torch.Tensor, chunk: slice, hidden_gradient: torch.Tensor, table_gradient: torch.Tensor
    ) -> None:
        """Given the gradient of the chunk's logits, writes its hidden rows' gradient and adds the table's in
        float32.
        """
        self.write_hidden_gradient(gradient, hidden_gradient)
        if gradient.dtype == table_gradient.dtype:
            table_gradient.addmm_(gradient.T, self.hidden[chunk])
        else:
            table_gradient += gradient.T @ self.hidden[chunk]

    def write_hidden_gradient(self, gradient: torch.Tensor, hidden_gradient: torch.Tensor) -> None:
        """Given the gradient of the chunk's logits, writes its hidden rows' gradient."""
        torch.mm(gradient, self.table, out=hidden_gradient)


def capped_logits(
    hidden: torch.Tensor, weight: torch.Tensor, vocab_size: int, cap: float, part: VocabularyPart = WHOLE
) -> torch.Tensor:
    """Computes cap * tanh(hidden weight^T / cap) in float32, without the padding rows of the table.

    hidden [..., width] in the compute dtype, weight [this part of the padded vocabulary, width]. Returns [...,
    vocab_size] float32, with a gradient only if the table is whole.
    """
    rows = part.rows(len(weight), vocab_size)
    local = cap * torch.tanh(F.linear(hidden, weight[:rows].to(hidden.dtype)).float() / cap)
    if part is WHOLE:
        return local
    whole = local.new_zeros(*local.shape[:-1], vocab_size)
    whole[..., part.start : part.start + rows] = local
    part.add(whole)
    return whole


def reference_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, cap: float
) -> torch.Tensor:
    """Computes `capped_cross_entropy` without chunks, keeping every logit for the backward pass."""
    logits = capped_logits(hidden, weight, vocab_size, cap)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1)


def capped_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    cap: float,
    part: VocabularyPart = WHOLE,
    products: type[PlainProducts] = PlainProducts,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Computes the mean cross entropy of `capped_logits` in nats, 0-dim float32, for targets [...] int64; targets of -1
    are not counted.

    Gradients are computed during the forward pass, chunk by chunk, as Liger Kernel does (arXiv 2410.10989). cap must be
    at most 80, so that exponentials of logits need no maximum subtracted. hidden [..., width], weight [this part of the
    padded vocabulary, width]. The gradient of `hidden` is this part's share of it. products: the implementation of the
    matrix products. z_loss: the gradients, but not the value, are those of cross entropy + z_loss * the mean of
    log(sum of exponentials of the logits)^2 over the same targets (PaLM, arXiv 2204.02311, section 5).
    """
    rows, flat = hidden.flatten(0, -2), targets.flatten()
    return _ChunkedCrossEntropy.apply(rows, weight, flat, vocab_size, cap, part, products, z_loss)


@torch.no_grad()
def token_nats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    cap: float,
    part: VocabularyPart = WHOLE,
) -> torch.Tensor:
    """Computes the cross entropy of each target in nats, [rows] float32 (zero for a target of -1), without
    gradients.
    """
    rows, flat = hidden.flatten(0, -2), targets.flatten()
    table = weight[: part.rows(len(weight), vocab_size)].to(hidden.dtype)
    nats = []
    for chunk in _chunks(rows, part, len(table)):
        sums, at_target, *_ = _chunk_terms(F.linear(rows[chunk], table), flat[chunk], cap, part)
        nats.append((sums.log() - at_target).squeeze(1) * (flat[chunk] >= 0))
    return torch.cat(nats)


def _chunks(rows: torch.Tensor, part: VocabularyPart, columns: int, multiple: int = 1) -> list[slice]:
    size = part.chunk_bytes or (GPU_CHUNK_BYTES if rows.is_cuda else CHUNK_BYTES)
    size //= 4 * (part.most_rows or max(1, columns))
    size = max(multiple, size // multiple * multiple)
    return [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]


def _chunk_terms(logits: torch.Tensor, targets: torch.Tensor, cap: float, part: VocabularyPart, squash=squash):
    """Returns the terms of a chunk's loss: (sums, at_target, gate, share, index, held).

    sums of exponentials and capped logit at_target, float32 [n, 1], are over the whole vocabulary. gate and share,
    [n, columns]: the gates of this part's logits, and their exponentials. index [n, 1]: each target's column. held
    [n, 1]: 1 where that is in this part, else 0.
    """
    local = targets - part.start
    columns = logits.size(1)
    held = ((local >= 0) & (local < columns)).float().unsqueeze(1)
    index = local.clamp(0, max(0, columns - 1)).unsqueeze(1)
    gate, share, sums = squash(logits, cap)
    at_target = (cap - 2 * cap * gate.gather(1, index)) * held if columns else torch.zeros_like(held)
    both = torch.cat((sums, at_target), dim=1)
    part.add(both)
    return both[:, :1], both[:, 1:], gate, share, index, held


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, cap, part, products, z_loss):
        count = part.rows(len(weight), vocab_size)
        table = weight.to(hidden.dtype)[:count]
        hidden_gradient = table_gradient = None
        if any(ctx.needs_input_grad[:2]):
            hidden_gradient = torch.empty_like(hidden)
            table_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        total = torch.zeros((), device=hidden.device)
        multiply = products(hidden, table)

        def add_loss(chunk: slice) -> torch.Tensor | None:
            """Adds a chunk's loss; returns the gradient of its logits. Their float32 forms live no longer than this."""
            target = targets[chunk]
            counted = (target >= 0).float().unsqueeze(1)
            terms = _chunk_terms(multiply.logits(chunk), target, cap, part, multiply.squash)
            sums, at_target, gate, share, index, held = terms
            total.add_(((sums.log() - at_target) * counted).sum())
            if hidden_gradient is None or not count:  # without rows, this part holds padding only
                return None
            # d loss / d raw logit = (softmax - one at the target) * (1 - tanh^2). The division by the mean's count
            # happens in backward, where float16's loss scale is multiplied in and keeps small values from underflowing.
            factor = counted / sums
            if z_loss:  # d z-loss / d capped logit = z_loss * 2 log(sum) * softmax
                factor *= 1.0 + 2.0 * z_loss * sums.log()
            gradient = multiply.logits_gradient(gate, share, factor, index, -counted * held)
            del terms, gate, share
            return gradient.to(hidden.dtype)

        for chunk in _chunks(hidden, part, count, products.row_multiple):
            gradient = add_loss(chunk)
            if hidden_gradient is None or table_gradient is None:
                continue
            if gradient is None:
                hidden_gradient[chunk] = 0
                continue
            multiply.write_gradients(gradient, chunk, hidden_gradient[chunk], table_gradient[:count])
            del gradient
        targets_counted = (targets >= 0).sum()
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(hidden_gradient, table_gradient, targets_counted)
        return total / targets_counted

    @staticmethod
    def backward(ctx, outer):
        hidden_gradient, table_gradient, count = ctx.saved_tensors
        scale = outer / count
        return hidden_gradient * scale, (table_gradient * scale).to(ctx.weight_dtype), *(None,) * 6
