import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megachat.kernels.attention import attention
from megachat.kernels.attention_windowed import TILE, windowed_attention
from megachat.model.gpt import Loss, ModelOptions, build_layers, run_layers
from megachat.place import place_of
from megachat.planning.plan import resolve
from tests.training import small_config


def heads(tokens: int, heads: int, size: int = 16, dtype=torch.float64):
    return torch.randn(
        2, tokens, heads, size, dtype=dtype, generator=torch.Generator().manual_seed(heads)
    ).requires_grad_()


@pytest.mark.parametrize("window", [0, 1, 100, TILE, 300, 571, 572, 600, 699, 700, 5000])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_is_attention(window, kv_heads):
    inputs = heads(700, 4), heads(700, kv_heads), heads(700, kv_heads, size=16)
    found, wanted = windowed_attention(*inputs, window), attention(*inputs, window)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradient = heads(700, 4).detach()
    for one, other in zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(wanted, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, TILE, 2 * TILE, 2 * TILE + 1])
def test_any_length(tokens):
    inputs = heads(tokens, 2), heads(tokens, 2), heads(tokens, 2)
    for window in (0, 1, TILE):
        torch.testing.assert_close(
            windowed_attention(*inputs, window), attention(*inputs, window), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs = heads(600, 2, dtype=dtype), heads(600, 2, dtype=dtype), heads(600, 2, dtype=dtype)
    found, wanted = windowed_attention(*inputs, 128), attention(*(part.double() for part in inputs), 128)
    assert found.dtype == dtype and (found.double() - wanted).norm() < 8e-3 * wanted.norm()


class Scores(TorchDispatchMode):
    """Counts the queries x keys that reach torch's attention kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.name() and "backward" not in func.name():
            q, k = args[:2]
            self.count += q[..., 0].numel() * k.size(-2)
        return func(*args, **(kwargs or {}))


def test_what_the_window_hides_is_not_computed():
    tokens, window = 4096, 512
    inputs = tuple(part.detach() for part in (heads(tokens, 1, dtype=torch.float32),) * 3)
    counts = {}
    for function in (attention, windowed_attention):
        with Scores() as scores:
            function(*inputs, window)
        counts[function] = scores.count
    assert counts[attention] == 2 * tokens**2
    assert counts[windowed_attention] <= 2 * tokens * (window + TILE)


def test_the_model_with_it_has_the_same_loss_and_gradients():
    dims = resolve(small_config(model={"sequence_len": 512}, batch={"tokens": 1024}), 1, 97).dims
    assert min(dims.windows) + TILE < dims.sequence_len
    rows = torch.randint(0, 97, (2, 513), generator=torch.Generator().manual_seed(1))
    told = []
    for attend in (attention, windowed_attention):
        layers = build_layers(dims, ModelOptions(attend=attend), seed=1)
        for parameter in layers.parameters():
            if not parameter.any():  # nothing would reach attention through the zero matrices
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        loss = Loss(dims, torch.ones(97))(run_layers(layers, rows[:, :-1]), rows[:, 1:])
        loss.backward()
        told.append((loss.item(), {place_of(parameter): parameter.grad for parameter in layers.parameters()}))
    (loss, gradients), (wanted, others) = told
    assert loss == pytest.approx(wanted, rel=1e-6)
    scalars = max(
        gradient.norm() for gradient in others.values() if gradient.dim() < 2
    )  # one may be a sum that nearly cancels
    for place, gradient in others.items():
        size = gradient.norm() if gradient.dim() == 2 else scalars
        assert (gradients[place] - gradient).norm() <= 2e-5 * size, place.name
