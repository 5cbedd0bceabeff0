"""Head and loss together: soft-capped logits and their cross entropy, in chunks of rows so that all logits never exist at once."""

import torch
import torch.nn.functional as F

CHUNK_BYTES = 8 << 20  # float32 logits at a time: small enough for a CPU's cache, large enough for a GPU's matmul


def capped_logits(hidden: torch.Tensor, weight: torch.Tensor, vocab_size: int, cap: float) -> torch.Tensor:
    """cap * tanh(hidden weight^T / cap) in float32, without the padding rows of the table.

    hidden [..., width] in the compute dtype, weight [padded vocabulary, width]. Returns [..., vocab_size] float32.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype))[..., :vocab_size].float()
    return cap * torch.tanh(logits / cap)


def reference_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, cap: float) -> torch.Tensor:
    """The plain form of `capped_cross_entropy`, which keeps every logit for the backward pass."""
    logits = capped_logits(hidden, weight, vocab_size, cap)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1)


def capped_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, cap: float) -> torch.Tensor:
    """Mean cross entropy in nats, 0-dim float32, of `capped_logits` with targets [...] int64 below vocab_size, where -1 is not counted.

    Gradients are computed on the way forward, chunk by chunk, as Liger Kernel does (arXiv 2410.10989); cap must be at most 80, so that
    exponentials of logits need no maximum subtracted. hidden [..., width], weight [padded vocabulary, width].
    """
    return _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), vocab_size, cap)


def token_nats(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, cap: float) -> torch.Tensor:
    """Cross entropy of each target in nats, [rows] float32 (zero where the target is -1), without gradients."""
    rows, flat = hidden.flatten(0, -2), targets.flatten()
    parts = [
        F.cross_entropy(capped_logits(rows[chunk], weight, vocab_size, cap), flat[chunk], ignore_index=-1, reduction="none")
        for chunk in _chunks(len(rows), vocab_size)
    ]
    return torch.cat(parts)


def _chunks(rows: int, vocab_size: int):
    size = max(1, CHUNK_BYTES // (4 * vocab_size))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, cap):
        table = weight.to(hidden.dtype)[:vocab_size]
        wanted = any(ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(hidden) if wanted else None
        table_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted else None
        total = torch.zeros((), device=hidden.device)
        for chunk in _chunks(len(hidden), vocab_size):
            rows, target = hidden[chunk], targets[chunk]
            counted = (target >= 0).float().unsqueeze(1)
            index = target.clamp_min(0).unsqueeze(1)
            squashed = F.linear(rows, table).float().div_(cap).tanh_()
            share = torch.mul(squashed, cap).exp_()
            sums = share.sum(dim=1, keepdim=True)
            total += ((sums.log() - cap * squashed.gather(1, index)) * counted).sum()
            if wanted:
                # d loss / d raw logit = (softmax - one at the target) * (1 - tanh^2); the mean's division waits for backward,
                # where float16's loss scale comes along and keeps small values alive
                share.mul_(counted / sums).scatter_add_(1, index, -counted)
                gradient = share.mul_(squashed.square_().neg_().add_(1.0)).to(hidden.dtype)
                torch.mm(gradient, table, out=hidden_gradient[chunk])
                table_gradient[:vocab_size] += gradient.T @ rows
        count = (targets >= 0).sum()
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(hidden_gradient, table_gradient, count)
        return total / count

    @staticmethod
    def backward(ctx, outer):
        hidden_gradient, table_gradient, count = ctx.saved_tensors
        scale = outer / count
        return hidden_gradient * scale, (table_gradient * scale).to(ctx.weight_dtype), None, None, None
