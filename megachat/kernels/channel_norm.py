"""The root-mean-square norm over channels that may be divided over processes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megachat.kernels.uncompiled import uncompiled

Add = Callable[[torch.Tensor], object]  # sums a tensor in place over the processes that divide the channels


def norm(x: torch.Tensor, epsilon: float, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Applies the root-mean-square norm over the last dim of x, then multiplies by `scale`, if there is one.

    scale [channels], or [heads, channels] for x [..., heads, channels].
    """
    if x.dtype == torch.float32 and not x.is_cuda and not torch.compiler.is_compiling():
        y = _FewerPasses.apply(x, epsilon)
        return y if scale is None else y * scale
    if scale is None or scale.ndim == 1:
        return F.rms_norm(x, (x.size(-1),), None if scale is None else scale.to(x.dtype), epsilon)
    return F.rms_norm(x, (x.size(-1),), None, epsilon) * scale.to(x.dtype)


class _FewerPasses(torch.autograd.Function):
    """Computes rms_norm in fewer passes where torch has no fused kernel. Keeps its input, as the fused kernels do."""

    @staticmethod
    def forward(ctx, x, epsilon):
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, inverse)
        return x * inverse

    @staticmethod
    def backward(ctx, gradient):
        x, inverse = ctx.saved_tensors
        along = (gradient * x).sum(-1, keepdim=True).mul_(inverse.square()).div_(-x.size(-1))
        return torch.addcmul(gradient, x, along).mul_(inverse), None


class ChannelNorm(nn.Module):
    """Computes F.rms_norm over `channels` channels, without a weight.

    add: None if this process has all channels. Otherwise each process has an equal share of them, and sums of squares
    are added over the processes, in float32.
    """

    def __init__(self, channels: int, epsilon: float, add: Add | None = None):
        super().__init__()
        self.channels, self.epsilon, self.add = channels, epsilon, add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., local channels] -> its shape and dtype."""
        if self.add is None:
            return F.rms_norm(x, (self.channels,), eps=self.epsilon)
        return _divided_norm(x, self.channels, self.epsilon, self.add)


@uncompiled
def _divided_norm(x: torch.Tensor, channels: int, epsilon: float, add: Add) -> torch.Tensor:
    return _DividedNorm.apply(x, channels, epsilon, add)


class _DividedNorm(torch.autograd.Function):
    """Each direction adds one float32 number per token over the processes."""

    @staticmethod
    def forward(ctx, x, channels, epsilon, add):
        squares = x.float().square().sum(-1, keepdim=True)
        add(squares)
        inverse = torch.rsqrt(squares / channels + epsilon)
        ctx.save_for_backward(x, inverse)
        ctx.channels, ctx.add = channels, add
        return (x.float() * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, inverse = ctx.saved_tensors
        g, normed = gradient.float(), x.float() * inverse
        along = (g * normed).sum(-1, keepdim=True)
        ctx.add(along)
        return (inverse * (g - normed * (along / ctx.channels))).to(x.dtype), None, None, None
