"""The versions of attention beside the reference, and the reference beside a softmax over each window."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megachat.kernels import attention as attention_module
from megachat.kernels import gpu_attention
from megachat.kernels.attention import TILE, attention, windowed_attention
from megachat.kernels.gpu_attention import FlashAttention, FlexAttention
from megachat.model.gpt import Loss, ModelOptions, build_layers, run_layers
from megachat.place import place_of
from megachat.planning.plan import resolve_plan
from tests.training import small_config


@pytest.mark.parametrize("window", [0, 1, 7, 19, 20, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_sees_the_window_before_it_and_itself(window, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 20, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 20, kv_heads, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    result = attention(q, k, v, window)
    for head in range(4):
        shared = head // (4 // kv_heads)
        for t in range(20):
            first = max(0, t - window)
            share = torch.softmax(torch.einsum("bd,bsd->bs", q[:, t, head], k[:, first : t + 1, shared]) / 8**0.5, -1)
            expected = torch.einsum("bs,bsd->bd", share, v[:, first : t + 1, shared])
            torch.testing.assert_close(result[:, t, head], expected)


def heads(tokens: int, heads: int, size: int = 16, dtype=torch.float64):
    return torch.randn(
        2, tokens, heads, size, dtype=dtype, generator=torch.Generator().manual_seed(heads)
    ).requires_grad_()


@pytest.mark.parametrize("window", [0, 1, 100, TILE, 300, 571, 572, 600, 699, 700, 5000])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_windowed_attention_is_attention(window, kv_heads):
    inputs = heads(700, 4), heads(700, kv_heads), heads(700, kv_heads, size=16)
    result, expected = windowed_attention(*inputs, window), attention(*inputs, window)
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    gradient = heads(700, 4).detach()
    for one, other in zip(
        torch.autograd.grad(result, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [0, 100, 128, 300, 699, 700])
def test_long_rows_are_computed_in_blocks(window, monkeypatch):
    inputs = tuple(heads(700, 2).detach() for _ in range(3))
    expected = attention(*inputs, window)
    monkeypatch.setattr(attention_module, "MASKED_ROW", 512)
    monkeypatch.setattr(attention_module, "BLOCK", 128)
    torch.testing.assert_close(attention(*inputs, window), expected, rtol=1e-12, atol=1e-12)


def test_masks_and_copies_of_the_longest_rows_are_bounded():
    """Rows of CORE are up to ten times as long as in training; a mask over all of one would have 420 MB here."""
    tokens, window = 20_480, 2048
    inputs = tuple(heads(1, 1, size=2).detach().expand(-1, tokens, -1, -1) for _ in range(3))
    for function in (attention, windowed_attention):
        with mock.patch.object(attention_module, "masked_attention", side_effect=lambda q, *rest: q) as masked:
            function(*inputs, window)
        sizes = [[tensor.numel() for tensor in call.args] for call in masked.call_args_list]
        assert len(sizes) == tokens // 1024
        assert max(keys for _, keys, _, _ in sizes) <= 2 * 2 * (1024 + window)
        assert max(mask for _, _, _, mask in sizes) <= 1024 * (1024 + window)


@pytest.mark.parametrize("tokens", [1, 2, TILE, 2 * TILE, 2 * TILE + 1])
def test_windowed_attention_of_any_length(tokens):
    inputs = heads(tokens, 2), heads(tokens, 2), heads(tokens, 2)
    for window in (0, 1, TILE):
        torch.testing.assert_close(
            windowed_attention(*inputs, window), attention(*inputs, window), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_windowed_attention_in_half_precision(dtype):
    inputs = heads(600, 2, dtype=dtype), heads(600, 2, dtype=dtype), heads(600, 2, dtype=dtype)
    result, expected = windowed_attention(*inputs, 128), attention(*(tensor.double() for tensor in inputs), 128)
    assert result.dtype == dtype and (result.double() - expected).norm() < 8e-3 * expected.norm()


class Scores(TorchDispatchMode):
    """Counts the queries x keys that reach torch's attention kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.name() and "backward" not in func.name():
            q, k = args[:2]
            self.count += q[..., 0].numel() * k.size(-2)
        return func(*args, **(kwargs or {}))


def test_windowed_attention_computes_only_the_tiles_of_the_window():
    tokens, window = 4096, 512
    inputs = tuple(tensor.detach() for tensor in (heads(tokens, 1, dtype=torch.float32),) * 3)
    counts = {}
    for function in (attention, windowed_attention):
        with Scores() as scores:
            function(*inputs, window)
        counts[function] = scores.count
    assert counts[attention] == 2 * tokens**2
    assert counts[windowed_attention] <= 2 * tokens * (window + TILE)


def test_a_model_with_windowed_attention_has_the_same_loss_and_gradients():
    dims = resolve_plan(small_config(model={"sequence_len": 512}, batch={"tokens": 1024}), 1, 97).dims
    assert min(dims.windows) + TILE < dims.sequence_len
    rows = torch.randint(0, 97, (2, 513), generator=torch.Generator().manual_seed(1))
    results = []
    for attend in (attention, windowed_attention):
        layers = build_layers(dims, ModelOptions(attend=attend), seed=1)
        for parameter in layers.parameters():
            if not parameter.any():  # nothing would reach attention through the zero matrices
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        loss = Loss(dims, torch.ones(97))(run_layers(layers, rows[:, :-1]), rows[:, 1:])
        loss.backward()
        results.append((loss.item(), {place_of(parameter): parameter.grad for parameter in layers.parameters()}))
    (loss, gradients), (expected, others) = results
    assert loss == pytest.approx(expected, rel=1e-6)
    scalars = max(
        gradient.norm() for gradient in others.values() if gradient.dim() < 2
    )  # one may be a sum that nearly cancels
    for place, gradient in others.items():
        size = gradient.norm() if gradient.dim() == 2 else scalars
        assert (gradients[place] - gradient).norm() <= 2e-5 * size, place.name


def qkv(tokens, kv_heads):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, tokens, count, 16, generator=generator) for count in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_flex_attention_sees_the_window(kv_heads):
    q, k, v = qkv(160, kv_heads)
    attend = FlexAttention(160, compiled=False)
    for window in (0, 7, 128, 158, 159, 160, 500):
        torch.testing.assert_close(attend(q, k, v, window), attention(q, k, v, window), rtol=1e-5, atol=1e-6)
    q, k, v = qkv(37, kv_heads)
    assert torch.equal(attend(q, k, v, 7), attention(q, k, v, 7)), "other lengths use the reference"


@pytest.mark.parametrize(("name", "unlimited"), [("flash2", (-1, -1)), ("flash3", (-1, -1)), ("flash4", (None, None))])
def test_flash_attention_gets_windows_in_its_convention(name, unlimited, monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, *, causal, window_size):
        calls.append((causal, window_size))
        return (q, "sums") if name != "flash2" else q

    monkeypatch.setattr(gpu_attention, "flash_function", lambda name: flash_attn_func)
    q, k, v = qkv(20, 2)
    attend = FlashAttention(name)
    assert all(attend(q, k, v, window) is q for window in (7, 18, 19, 20))
    assert calls == [(True, (7, 0)), (True, (18, 0)), (True, unlimited), (True, unlimited)]


def test_compiled_functions_call_flash_attention_untraced(monkeypatch):
    """The kernel is not traced; what is before and after it is compiled."""
    graphs, calls = [], []

    def flash_attn_func(q, k, v, *, causal, window_size):
        calls.append((type(q), window_size))
        return attention(q, k, v, window_size[0])

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(gpu_attention, "flash_function", lambda name: flash_attn_func)
    attend, inputs = FlashAttention("flash3"), qkv(20, 2)
    torch._dynamo.reset()
    result = torch.compile(lambda q, k, v: attend(q.sin(), k, v, 7).cos(), backend=count, dynamic=False)(*inputs)
    assert torch.equal(result, attention(inputs[0].sin(), *inputs[1:], 7).cos())
    assert calls == [(torch.Tensor, (7, 0))] and len(graphs) == 2
