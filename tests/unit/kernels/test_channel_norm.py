import torch
import torch.distributed as dist
import torch.nn.functional as F

from megachat.kernels.channel_norm import ChannelNorm
from tests.harness import run_ranks

CHANNELS, EPSILON = 24, 1e-3


def case(dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of unequal size, the second of them small against epsilon, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, 2, 5, CHANNELS, generator=generator)
    return (x * torch.logspace(-2, 2, 5)[:, None]).to(dtype), gradient.to(dtype)


def forward_and_backward(norm, x, gradient) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, x, gradient)]


def divided() -> list[list[torch.Tensor]]:
    """Output and gradient of this rank's channels, in float32 and bfloat16."""
    norm, share = ChannelNorm(CHANNELS, EPSILON, add=dist.all_reduce), CHANNELS // dist.get_world_size()
    local = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    return [
        forward_and_backward(norm, *(tensor[..., local] for tensor in case(dtype)))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def test_whole_channels_are_rms_norm_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16):
        x, gradient = case(dtype)
        norms = ChannelNorm(CHANNELS, EPSILON), lambda x: F.rms_norm(x, (CHANNELS,), eps=EPSILON)
        both = (forward_and_backward(norm, x, gradient) for norm in norms)
        assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


def test_divided_channels_equal_whole_ones():
    ranks = run_ranks(divided, 3)
    for which, dtype, tolerance in ((0, torch.float32, 1e-6), (1, torch.bfloat16, 2**-7)):
        inputs = (tensor.double() for tensor in case(dtype))
        expected = forward_and_backward(lambda x: F.rms_norm(x, (CHANNELS,), eps=EPSILON), *inputs)
        for index, other in enumerate(expected):
            one = torch.cat([rank[which][index] for rank in ranks], dim=-1)
            assert one.dtype == dtype
            assert (one.double() - other).abs().max() <= tolerance * other.abs().max()
