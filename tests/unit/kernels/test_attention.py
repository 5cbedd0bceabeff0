import pytest
import torch

from megachat.kernels.attention import attention


@pytest.mark.parametrize("window", [0, 1, 7, 19, 20, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_sees_the_window_before_it_and_itself(window, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 20, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 20, kv_heads, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    found = attention(q, k, v, window)
    for head in range(4):
        shared = head // (4 // kv_heads)
        for t in range(20):
            first = max(0, t - window)
            share = torch.softmax(torch.einsum("bd,bsd->bs", q[:, t, head], k[:, first : t + 1, shared]) / 8**0.5, -1)
            wanted = torch.einsum("bs,bsd->bd", share, v[:, first : t + 1, shared])
            torch.testing.assert_close(found[:, t, head], wanted)
