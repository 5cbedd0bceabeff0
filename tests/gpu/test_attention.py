"""Check 6: every available attention kernel against float32, with whole rows, windows and shared heads."""

import pytest
import torch

from megachat.errors import UserError
from megachat.kernels.attention import attention
from megachat.kernels.choice import choose_attention
from megachat.planning.dimensions import Dimensions
from tests.gpu.fp8 import DEVICE, rel

TOKENS = 2048


@pytest.mark.parametrize("window", [TOKENS, TOKENS - 1, 768, 128])
@pytest.mark.parametrize("kv_heads", [6, 3])
@pytest.mark.parametrize("name", ["te", "flash3", "flash4", "flash2", "flex", "sdpa"])
def test_6_attention_sees_the_window_and_no_more(name, kv_heads, window, report):
    dims = Dimensions(1, 768, 6, kv_heads, 128, TOKENS, 512, (window,))
    try:
        choice = choose_attention(name, DEVICE, torch.bfloat16, dims)
    except UserError as error:
        pytest.skip(str(error))
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(2, TOKENS, heads, 128, generator=generator, device=DEVICE).bfloat16()
        for heads in (6, kv_heads, kv_heads)
    )
    q[:, ::7] *= 4  # some sharp rows, where one key too many or too few is visible
    g = torch.randn(q.shape, generator=generator, device=DEVICE)

    def measured(attend, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = attend(*inputs, window)
        return y.detach(), *torch.autograd.grad(y, inputs, g.to(dtype))

    result, expected = measured(choice.attend, torch.bfloat16), measured(attention, torch.float32)
    off = [rel(one, other) for one, other in zip(result, expected, strict=True)]
    report(f"{name} window {window} kv {kv_heads}: y, dq, dk, dv", off)
    assert result[0].shape == q.shape and off[0] < 8e-3 and max(off[1:]) < 2e-2
    with torch.no_grad():  # a length as in sampling
        short = [t[:, :333] for t in (q, k, v)]
        assert rel(choice.attend(*short, window), attention(*(t.float() for t in short), window)) < 8e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["te", "flash3", "flash4", "flash2", "flex"])
def test_no_kernel_keeps_all_scores(name, compiled, report):
    """Alone, and called from a compiled function: torch.compiler.disable around flex_attention must not undo its own
    compilation.
    """
    tokens, window = 4096, 1024
    try:
        attend = choose_attention(
            name, DEVICE, torch.bfloat16, Dimensions(1, 768, 6, 6, 128, tokens, 512, (window,))
        ).attend
    except UserError as error:
        pytest.skip(str(error))
    inputs = [torch.randn(2, tokens, 6, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]

    def attended(q, k, v):
        return attend(q, k, v, window) * 2

    run = torch.compile(attended, dynamic=False) if compiled else attended
    for _ in range(2):  # the first call compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(run(*inputs).sum(), inputs)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    scores = 2 * 6 * tokens * tokens * 2
    report(f"{name}: peak bytes, bytes of all scores", [peak, scores])
    assert peak < scores / 2


def test_a_window_one_longer_is_another_result():
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, 2, 128, generator=generator, device=DEVICE) for _ in "qkv")
    assert rel(attention(q, k, v, 128), attention(q, k, v, 129)) > 8e-3, "check 6 would not notice"
