import pytest
import torch

from megachat.kernels import cross_entropy
from megachat.kernels.cross_entropy import (
    CHUNK_BYTES,
    VocabularyPart,
    capped_cross_entropy,
    reference_cross_entropy,
    token_nats,
)
from megachat.programs.walk_memory import LiveBytes


def case(dtype, rows=70, width=24, vocab=97, padded=128):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, rows // 2, width, generator=generator).to(dtype).requires_grad_()
    weight = (2 * torch.randn(padded, width, generator=generator)).requires_grad_()
    targets = torch.randint(0, vocab, (2, rows // 2), generator=generator)
    targets[0, :3] = -1
    return hidden, weight, targets, vocab


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_value_and_gradients_are_the_plain_forms(chunk_rows, monkeypatch):
    hidden, weight, targets, vocab = case(torch.float32)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * vocab * chunk_rows)
    result, plain = (
        capped_cross_entropy(hidden, weight, targets, vocab, 15.0),
        reference_cross_entropy(hidden, weight, targets, vocab, 15.0),
    )
    assert result.item() == pytest.approx(plain.item(), rel=1e-6)
    for one, other in zip(
        torch.autograd.grad(3.0 * result, (hidden, weight)),
        torch.autograd.grad(3.0 * plain, (hidden, weight)),
        strict=True,
    ):
        assert (one - other).norm() < 1e-6 * other.norm() and one.dtype == other.dtype
    each = token_nats(hidden.detach(), weight.detach(), targets, vocab, 15.0)
    assert each[targets.flatten() >= 0].mean().item() == pytest.approx(plain.item(), rel=1e-6)
    assert not each[:3].any()


@pytest.mark.parametrize("chunk_rows", [7, 1000])
def test_z_loss_is_in_the_gradients_and_not_in_the_value(chunk_rows, monkeypatch):
    """Against autograd in float64."""
    hidden, weight, targets, vocab = case(torch.float32)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * vocab * chunk_rows)
    plain = capped_cross_entropy(hidden, weight, targets, vocab, 15.0)
    result = capped_cross_entropy(hidden, weight, targets, vocab, 15.0, z_loss=0.03)
    assert torch.equal(result, plain)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = 15 * torch.tanh(exact[0].flatten(0, 1) @ exact[1][:vocab].T / 15)
    normalizer = logits.logsumexp(1)[targets.flatten() >= 0]
    loss = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-1)
    assert result.item() == pytest.approx(loss.item(), rel=1e-6)
    expected = torch.autograd.grad(loss + 0.03 * normalizer.square().mean(), exact)
    without = torch.autograd.grad(plain, (hidden, weight))
    for one, other, less in zip(torch.autograd.grad(result, (hidden, weight)), expected, without, strict=True):
        assert (one - other).norm() < 1e-6 * other.norm() and (less - other).norm() > 0.1 * other.norm()


def test_the_size_of_chunks_may_be_set_and_is_the_devices_otherwise(monkeypatch):
    hidden, weight, targets, vocab = case(torch.float32)
    sizes, multiply = [], cross_entropy.PlainProducts.logits
    monkeypatch.setattr(
        cross_entropy.PlainProducts,
        "logits",
        lambda s, chunk: sizes.append(chunk.stop - chunk.start) or multiply(s, chunk),
    )

    def results(part):
        sizes.clear()
        loss = capped_cross_entropy(hidden, weight, targets, vocab, 15.0, part)
        nats = token_nats(hidden.detach(), weight.detach(), targets, vocab, 15.0, part)
        return [loss, nats, *torch.autograd.grad(loss, (hidden, weight))], list(sizes)

    whole, all_rows = results(VocabularyPart())
    chunked, rows = results(VocabularyPart(chunk_bytes=4 * vocab * 32 + 100))
    assert (all_rows, rows) == ([70], [32, 32, 6])
    for one, other in zip(whole, chunked, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * vocab * 32)
    assert all(torch.equal(one, other) for one, other in zip(results(VocabularyPart())[0], chunked, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_small_gradients_under_a_loss_scale(dtype):
    hidden, weight, targets, vocab = case(dtype)
    expected = torch.autograd.grad(
        reference_cross_entropy(hidden.float(), weight, targets, vocab, 15.0), (hidden, weight)
    )
    result = torch.autograd.grad(1024.0 * capped_cross_entropy(hidden, weight, targets, vocab, 15.0), (hidden, weight))
    for one, other in zip(result, expected, strict=True):
        assert ((one.float() / 1024 - other.float()).norm() / other.float().norm()).item() < 2e-2


def test_no_gradient_is_made_where_none_is_wanted():
    hidden, weight, targets, vocab = case(torch.float32)
    with torch.no_grad():
        assert not capped_cross_entropy(hidden, weight, targets, vocab, 15.0).requires_grad


def test_the_logits_of_all_tokens_never_exist():
    hidden, weight, targets, vocab = case(torch.float32, rows=4096, vocab=4000, padded=4096)
    logits, held = 4 * targets.numel() * vocab, hidden.nbytes + weight.nbytes  # held: the gradients
    for function, chunked in ((reference_cross_entropy, False), (capped_cross_entropy, True)):
        with LiveBytes() as live:
            torch.autograd.grad(function(hidden, weight, targets, vocab, 15.0), (hidden, weight))
        if chunked:
            assert live.largest <= CHUNK_BYTES and live.most < 2.5 * CHUNK_BYTES + 2 * held < logits
        else:
            assert live.largest >= logits, "the count does not see them"
