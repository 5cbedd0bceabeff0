import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megachat.kernels import lookup
from megachat.kernels.lookup import TableRows, lookup_attention
from megachat.planning.dimensions import balanced_cuts
from megachat.programs.walk_memory import LiveBytes
from megachat.train.compiled import NewGraphs
from tools.bench.lookup import gathered_attention


def table_rows(allocation: torch.Tensor) -> TableRows:
    """allocation: rows of each token, integers [vocabulary]."""
    return TableRows(torch.nn.functional.pad(allocation.long().cumsum(0), (1, 0)))


def case(tied, *, tokens=300, vocabulary=40, width=16, seed=0):
    """Frequent and rare ids, with 1 to 40 rows. Returns inputs with gradients, keys being values if tied."""
    generator = torch.Generator().manual_seed(seed)
    allocation = torch.randint(1, 41, (vocabulary,), generator=generator)
    allocation[::3] = 1
    rows = table_rows(allocation)
    frequencies = 1 / torch.arange(1.0, vocabulary + 1)
    ids = torch.multinomial(frequencies, tokens, replacement=True, generator=generator)
    sizes = [(tokens, width), *[(int(rows.first[-1]), width)] * (1 if tied else 2)]
    inputs = [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]
    return inputs, ids, rows


def results(function, inputs, ids, rows, dtype):
    """The output and the gradients of all inputs."""
    queries, keys, *values = (tensor.to(dtype) for tensor in inputs)
    output = function(queries, keys, values[0] if values else keys, ids, rows, 0.25)
    return [output, *torch.autograd.grad(output, inputs, gradient_of(output))]


def gradient_of(output):
    """Numbers that every dtype can represent."""
    return torch.linspace(-1, 1, output.numel()).bfloat16().to(output.dtype).view_as(output)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("workspace", "alone"), [(1 << 20, 2048), (4096, 64), (4096, 1 << 30)])
def test_equal_to_the_gathered_rows(monkeypatch, tied, workspace, alone):
    """With and without ids that are a batch of their own, and with batches and tokens of an id in parts."""
    monkeypatch.setattr(lookup, "_WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(lookup, "_ALONE", alone)
    inputs, ids, rows = case(tied)
    expected = results(gathered_attention, inputs, ids, rows, torch.float64)
    actual = results(lookup_attention, inputs, ids, rows, torch.float32)
    for one, other in zip(actual, expected, strict=True):
        assert (one.double() - other).abs().max() <= 1e-6 * max(1.0, other.abs().max())


def test_one_token_and_all_the_same_token():
    for ids in (torch.tensor([5]), torch.full((50,), 4), torch.full((50,), 3)):
        inputs, _, rows = case(True, tokens=len(ids))
        expected = results(gathered_attention, inputs, ids, rows, torch.float64)
        actual = results(lookup_attention, inputs, ids, rows, torch.float32)
        assert all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(actual, expected, strict=True))


def test_repeats_to_the_bit():
    inputs, ids, rows = case(True)
    first, second = (results(lookup_attention, inputs, ids, rows, torch.float32) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_bfloat16_rounds_only_inputs_and_outputs():
    inputs, ids, rows = case(True)
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in inputs]
    expected = results(gathered_attention, rounded, ids, rows, torch.float64)
    actual = results(lookup_attention, rounded, ids, rows, torch.bfloat16)
    for one, other in zip(actual, expected, strict=True):
        assert (one.double() - other).abs().max() <= 2**-8 * other.abs().max()


def test_float16_with_float32_tables():
    inputs, ids, rows = case(True)
    queries, table = inputs[0].detach().half().requires_grad_(), inputs[1].detach().float().requires_grad_()
    output = lookup_attention(queries, table, table, ids, rows, 0.25)
    output.backward(torch.ones_like(output))
    assert output.dtype == queries.grad.dtype == torch.float16 and table.grad.dtype == torch.float32


def test_layers_share_the_groups_of_a_batch():
    _, ids, rows = case(True)
    held = int(rows.first[-1])
    groups = lookup.token_groups(ids, rows, held, 16)
    assert lookup.token_groups(ids, TableRows(rows.first.clone()), held, 16) is groups
    assert lookup.token_groups(ids, TableRows(rows.first, int(rows.first[9])), held, 16) is not groups
    assert lookup.token_groups(ids, TableRows(rows.first // 2), held, 16) is not groups
    lookup.token_groups(ids, rows, held, 16)
    ids.fill_(3)  # in place, as a buffer that is used for every batch
    (group,) = lookup.token_groups(ids, rows, held, 16)
    assert torch.cat(group.tokens, dim=1).flatten().tolist() == list(range(len(ids)))
    size = len(lookup._grouped)
    del ids
    assert len(lookup._grouped) == size - 1


def test_compiled_callers_have_the_same_graphs_for_all_ids():
    inputs, _, rows = case(True)
    queries, table = inputs[0].detach().float().view(3, 100, 16), torch.nn.Parameter(inputs[1].detach().float())

    def layer(x, ids):
        return x + lookup_attention(torch.nn.functional.rms_norm(x, (16,)), table, table, ids, rows, 0.25).sin()

    torch._dynamo.reset()
    graphs, compiled = NewGraphs(compiles=True), torch.compile(layer, dynamic=False, backend="eager")
    graphs.count()
    made = []
    for seed in range(4):
        ids = torch.randint(0, 40, (3, 100), generator=torch.Generator().manual_seed(seed)) // (1 + seed)
        assert torch.equal(compiled(queries, ids), layer(queries, ids))
        compiled(queries, ids).square().mean().backward()
        made.append(graphs.count())
    assert made[0] > 0 and not any(made[1:])


def multiplications(function, sizes, ids, width=16) -> int:
    """FLOPs of forward and backward that torch counts."""
    rows = table_rows(sizes)
    queries, table = (
        torch.randn(len(ids), width).requires_grad_(),
        torch.randn(int(sizes.sum()), width).requires_grad_(),
    )
    with FlopCounterMode(display=False) as counter:
        function(queries, table, table, ids, rows, 0.25).sum().backward()
    return counter.get_total_flops()


def test_flops_are_those_that_the_plan_counts():
    """12 x rows x width per token (see lookup_flops); the kernel adds 2 for scores that it computes again."""
    ids, width = torch.arange(30).repeat(10), 16
    sizes = torch.full((30,), 8)
    counted = 12 * 8 * width * len(ids)
    assert multiplications(gathered_attention, sizes, ids) == counted
    assert multiplications(lookup_attention, sizes, ids) == counted * 14 // 12
    # Zipf: the oracle pads every token to the most rows; the kernel pads less, and does not multiply single rows
    sizes = 1 + 400 // torch.arange(1, 101)
    ids = torch.multinomial(1 / torch.arange(1.0, 101.0), 2000, True, generator=torch.Generator().manual_seed(0))
    counted = 12 * int(sizes[ids].sum()) * width
    assert (
        multiplications(gathered_attention, sizes, ids) == 12 * int(sizes[ids].max()) * width * len(ids) > 3 * counted
    )
    assert counted < multiplications(lookup_attention, sizes, ids) < 1.5 * counted
    assert multiplications(lookup_attention, torch.ones(100, dtype=torch.int64), ids) == 0


def test_the_workspace_is_bounded():
    """512 rows, width 256, 8,192 tokens: gathering would take 4.3 GB; half of the tokens are rare and half frequent."""
    tokens, width, most = 8192, 256, 512
    rows = table_rows(torch.full((2048,), most, dtype=torch.int64).clamp_max(32))
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
        output = lookup_attention(*local, ids, TableRows(rows.first, start), 0.25)
        has_rows = (rows.first[ids] >= start) & (rows.first[ids] < end)
        assert not output[~has_rows].any() and output[has_rows].all()
        gradients.append(torch.autograd.grad(output, local, gradient_of(output)))
        total += output
    d_queries, d_keys, d_values = zip(*gradients, strict=True)
    actual = [total, sum(d_queries), torch.cat(d_keys), torch.cat(d_values)]
    for one, other in zip(actual, results(lookup_attention, inputs, ids, rows, torch.float32), strict=True):
        assert (one - other).abs().max() <= 1e-6 * max(1.0, other.abs().max())
