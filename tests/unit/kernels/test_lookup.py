import pytest
import torch

from megachat.kernels import lookup
from megachat.kernels.lookup import TableRows, lookup_attention
from megachat.planning.dimensions import balanced_cuts
from tools.bench.live_bytes import LiveBytes


def plain(queries, keys, values, ids, rows, scale):
    """The same with the rows of every token gathered: [tokens, most rows, width]."""
    sizes = rows.first[ids + 1] - rows.first[ids]
    offsets = torch.arange(int(sizes.max()))
    owned = offsets < sizes[:, None]
    places = torch.where(owned, rows.first[ids][:, None] + offsets, 0)
    scores = scale * torch.einsum("tc,trc->tr", queries, keys[places])
    weights = torch.softmax(scores.masked_fill(~owned, -torch.inf), dim=-1)
    return torch.einsum("tr,trc->tc", weights, values[places])


def case(tied, *, tokens=300, vocabulary=40, width=16, seed=0):
    """Frequent and rare ids, with 1 to 40 rows. Returns inputs with gradients, keys being values if tied."""
    generator = torch.Generator().manual_seed(seed)
    allocation = torch.randint(1, 41, (vocabulary,), generator=generator)
    allocation[::3] = 1
    rows = TableRows.from_allocation(allocation)
    frequencies = 1 / torch.arange(1.0, vocabulary + 1)
    ids = torch.multinomial(frequencies, tokens, replacement=True, generator=generator)
    sizes = [(tokens, width), *[(int(rows.first[-1]), width)] * (1 if tied else 2)]
    inputs = [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]
    return inputs, ids, rows


def results(function, inputs, ids, rows, dtype):
    """The output and the gradients of all inputs."""
    queries, keys, *values = (tensor.to(dtype) for tensor in inputs)
    output = function(queries, keys, values[0] if values else keys, ids, rows, 0.25)
    gradient = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
    return [output, *torch.autograd.grad(output, inputs, gradient)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("workspace", [16 << 20, 4096])
def test_equal_to_the_gathered_rows(monkeypatch, tied, workspace):
    monkeypatch.setattr(lookup, "_WORKSPACE_BYTES", workspace)
    inputs, ids, rows = case(tied)
    expected = results(plain, inputs, ids, rows, torch.float64)
    actual = results(lookup_attention, inputs, ids, rows, torch.float32)
    for one, other in zip(actual, expected, strict=True):
        assert (one.double() - other).abs().max() <= 1e-6 * max(1.0, other.abs().max())


def test_one_token_and_all_the_same_token():
    for ids in (torch.tensor([5]), torch.full((50,), 4), torch.full((50,), 3)):
        inputs, _, rows = case(True, tokens=len(ids))
        expected = results(plain, inputs, ids, rows, torch.float64)
        actual = results(lookup_attention, inputs, ids, rows, torch.float32)
        assert all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(actual, expected, strict=True))


def test_repeats_to_the_bit():
    inputs, ids, rows = case(True)
    first, second = (results(lookup_attention, inputs, ids, rows, torch.float32) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_bfloat16_rounds_only_inputs_and_outputs():
    inputs, ids, rows = case(True)
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in inputs]
    expected = results(plain, rounded, ids, rows, torch.float64)
    actual = results(lookup_attention, rounded, ids, rows, torch.bfloat16)
    assert (actual[0].double() - expected[0]).abs().max() <= 2**-8 * expected[0].abs().max()


def test_the_workspace_is_bounded():
    """512 rows, width 256, 8,192 tokens: gathering would take 4.3 GB; half of the tokens are rare and half frequent."""
    tokens, width, most = 8192, 256, 512
    rows = TableRows.from_allocation(torch.full((2048,), most, dtype=torch.int64).clamp_max(32))
    rows.first[-8:] += torch.arange(8) * (most - 32)
    ids = torch.cat([torch.arange(tokens // 2) % 2000, 2040 + torch.arange(tokens // 2) % 7])
    queries = torch.randn(tokens, width).requires_grad_()
    table = torch.randn(int(rows.first[-1]), width).requires_grad_()
    with LiveBytes() as live:
        output = lookup_attention(queries, table, table, ids, rows, 1 / 16)
        forward = live.most
        output.backward(torch.ones_like(output))
    kept = 4 * output.numel()
    assert kept < forward <= kept + (64 << 20)
    gradients = 4 * (queries.numel() + table.numel() + output.numel())
    assert live.most <= kept + gradients + (64 << 20)


def test_parts_of_a_table_add_up_to_the_whole():
    """Also with a part that has no rows, as of a rank whose neighbors hold all tokens."""
    inputs, ids, rows = case(False)
    queries, keys, values = (tensor.detach().float() for tensor in inputs)
    cuts = [*balanced_cuts(rows.first.tolist(), 3), int(rows.first[-1])]
    total, gradients = torch.zeros_like(queries), []
    for start, end in zip(cuts, cuts[1:], strict=False):
        local = [tensor.clone().requires_grad_() for tensor in (queries, keys[start:end], values[start:end])]
        part = rows.part(start, end - start)
        output = lookup_attention(*local, ids, part, 0.25)
        has_rows = part.first[ids + 1] > part.first[ids]
        assert not output[~has_rows].any() and output[has_rows].all()
        gradient = torch.linspace(-1, 1, output.numel()).view_as(output)
        gradients.append(torch.autograd.grad(output, local, gradient))
        total += output
    d_queries, d_keys, d_values = zip(*gradients, strict=True)
    actual = [total, sum(d_queries), torch.cat(d_keys), torch.cat(d_values)]
    for one, other in zip(actual, results(lookup_attention, inputs, ids, rows, torch.float32), strict=True):
        assert (one - other).abs().max() <= 1e-6 * max(1.0, other.abs().max())
