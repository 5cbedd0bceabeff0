"""The model against nanochat's numbers, and against a float64 transcription of the formulas for other shapes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megachat.model.gpt import Loss, ModelOptions, Rotary, build_layers, logits, run_layers
from megachat.model.parameters import load_whole, placed_parameters, starting_value
from megachat.place import place_of
from megachat.planning.dimensions import NORMS, Dimensions, layer_costs, parameter_counts, window_sizes
from tests import reference


def small(depth=5, heads=4, kv_heads=2, vocab=97, tokens=200, pattern="SSL") -> Dimensions:
    return Dimensions(depth, heads * 16, heads, kv_heads, 16, tokens, vocab, window_sizes(pattern, depth, tokens))


@reference.needs_reference
def test_loss_logits_and_gradient_norms_are_nanochats():
    dims = Dimensions(4, 128, 4, 4, 32, 512, 1024, window_sizes("SSSL", 4, 512))
    layers = build_layers(dims, ModelOptions())
    parameters, weights, expected = placed_parameters(layers), reference.weights(), reference.expected()
    assert {place_of(parameter).name for parameter in parameters} == set(weights)
    for parameter in parameters:
        load_whole(parameter, weights[place_of(parameter).name])
    rows = reference.rows(20)
    output = run_layers(layers, rows[:, :-1])
    loss = Loss(dims, torch.ones(1024))(output, rows[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected["eval_loss_batch20"], rel=1e-5)
    nanochats = np.load(reference.FOLDER / "logits_batch20_last8.npy")
    result = logits(output, dims)[:, -8:].detach().numpy()
    assert np.abs(result - nanochats).max() <= 1e-5 * np.abs(nanochats).max()
    squares: dict[str, float] = {}
    for parameter in parameters:
        squares[place_of(parameter).name] = (
            squares.get(place_of(parameter).name, 0.0) + parameter.grad.double().square().sum().item()
        )
    for name, norm in expected["grad_norms_batch20"].items():
        assert squares[name] ** 0.5 == pytest.approx(norm, rel=1e-5), name


def transcription(
    dims: Dimensions, weights: dict[str, torch.Tensor], ids: torch.Tensor, extra_values=lambda block, h, row: 0
) -> torch.Tensor:
    """Logits by the formulas of the model, one head and one query at a time where that is plainer, in the weights'
    dtype. extra_values: what is added to the values, from block, attention's input and ids.
    """

    def norm(x, scale, head=...):
        x = x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()
        return x * weights[scale][head] if scale in weights else x

    def rotate(x):  # [tokens, size]
        half = x.size(-1) // 2
        angle = torch.arange(x.size(0), dtype=x.dtype)[:, None] / 100_000.0 ** (
            torch.arange(half, dtype=x.dtype) / half
        )
        return torch.cat(
            (
                x[:, :half] * angle.cos() + x[:, half:] * angle.sin(),
                x[:, half:] * angle.cos() - x[:, :half] * angle.sin(),
            ),
            1,
        )

    def block(i, x, row):
        name = f"transformer.h.{i}."
        h, size = norm(x, f"{name}attention_scale"), dims.head_size
        q, k, v = (h @ weights[f"{name}attn.{part}.weight"].T for part in ("c_q", "c_k", "c_v"))
        v = v + extra_values(i, h, row)
        out = torch.zeros_like(x)
        for head in range(dims.heads):
            shared = head // (dims.heads // dims.kv_heads)
            values = v[:, shared * size : (shared + 1) * size]
            if dims.has_value_embedding(i):
                gate = 3 * torch.sigmoid(h[:, :12] @ weights[f"{name}attn.ve_gate.weight"][shared])
                values = (
                    values
                    + gate[:, None] * weights[f"value_embeds.{i}.weight"][row][:, shared * size : (shared + 1) * size]
                )
            queries = 1.2 * norm(rotate(q[:, head * size : (head + 1) * size]), f"{name}attn.query_scale", head)
            keys = 1.2 * norm(rotate(k[:, shared * size : (shared + 1) * size]), f"{name}attn.key_scale", shared)
            for t in range(x.size(0)):
                first = max(0, t - dims.windows[i])
                share = torch.softmax(queries[t] @ keys[first : t + 1].T / size**0.5, 0)
                out[t, head * size : (head + 1) * size] = share @ values[first : t + 1]
        x = x + out @ weights[f"{name}attn.c_proj.weight"].T
        hidden = torch.relu(norm(x, f"{name}mlp_scale") @ weights[f"{name}mlp.c_fc.weight"].T).square()
        return x + hidden @ weights[f"{name}mlp.c_proj.weight"].T

    result = []
    for row in ids:
        e = norm(weights["transformer.wte.weight"][row], "embedding_scale")
        x = e.clone()
        x[1:] += weights["smear_lambda"] * torch.sigmoid(e[1:, :24] @ weights["smear_gate.weight"].T) * e[:-1]
        x0 = x
        for i in range(dims.depth):
            x = block(i, weights["resid_lambdas"][i] * x + weights["x0_lambdas"][i] * x0, row)
            if i == dims.depth // 2:
                backout = x
        x = norm(x - weights["backout_lambda"] * backout, "final_scale")
        result.append(15 * torch.tanh((x @ weights["lm_head.weight"].T)[:, : dims.vocab_size] / 15))
    return torch.stack(result)


@pytest.mark.parametrize(("rotary", "scales"), [("slices", ()), ("chunk", NORMS)])
def test_gqa_windows_and_odd_vocabulary_follow_the_formulas(rotary, scales):
    dims = replace(small(), norm_scales=scales)
    layers = build_layers(dims, ModelOptions(compute_dtype=torch.float64, rotary=rotary)).double()
    generator = torch.Generator().manual_seed(1)
    weights: dict[str, torch.Tensor] = {}
    for parameter in placed_parameters(layers):  # starting values have zeros that would hide parts of the formulas
        name = place_of(parameter).name
        if name not in weights:
            weights[name] = torch.randn(place_of(parameter).whole, generator=generator, dtype=torch.float64) * 0.3
        load_whole(parameter, weights[name])
    ids = torch.randint(0, dims.vocab_size, (2, 200), generator=generator)
    result = logits(run_layers(layers, ids), dims).double()  # float32 from the soft cap on
    torch.testing.assert_close(result, transcription(dims, weights, ids), rtol=2e-5, atol=2e-5)


def test_starting_values_depend_on_seed_and_name_only():
    dims = small()
    layers = build_layers(dims, ModelOptions(), seed=3)
    parameters = placed_parameters(layers)
    for parameter in parameters:
        whole = starting_value(place_of(parameter), 3) if place_of(parameter).start[0] != "constant" else None
        if whole is not None:
            assert torch.equal(parameter, whole), place_of(parameter).name
    by_name = {place_of(parameter).name: parameter for parameter in parameters}
    assert by_name["transformer.wte.weight"].std().item() == pytest.approx(0.8, rel=0.05)
    assert by_name["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.05)
    assert by_name["transformer.h.0.mlp.c_fc.weight"].abs().max().item() <= 0.4 * (3 / dims.width) ** 0.5
    assert not by_name["transformer.h.1.attn.c_proj.weight"].any()
    lambdas = [parameter.item() for parameter in parameters if place_of(parameter).name == "resid_lambdas"]
    assert lambdas == pytest.approx([1.15 - 0.10 * i / 4 for i in range(5)])
    other = placed_parameters(build_layers(dims, ModelOptions(), seed=4))
    assert not torch.equal(by_name["lm_head.weight"], next(p for p in other if place_of(p).name == "lm_head.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_scales_of_norms_change_nothing_to_the_bit(dtype):
    ids = torch.arange(40)[None] % 97
    plain, scaled = (
        run_layers(build_layers(replace(small(), norm_scales=norms), ModelOptions(compute_dtype=dtype), seed=0), ids)[0]
        for norms in ((), NORMS)
    )
    assert torch.equal(plain, scaled) and scaled.dtype == dtype


@pytest.mark.parametrize(
    "dims",
    [
        replace(small(), norm_scales=NORMS),
        replace(small(depth=4, kv_heads=4, vocab=128), norm_scales=("mlp", "key")),
        small(depth=1, heads=2, kv_heads=1),
    ],
)
def test_counts_are_the_built_models(dims):
    parameters = placed_parameters(build_layers(dims, ModelOptions()))
    counts = parameter_counts(dims)
    assert counts["total"] == sum(parameter.numel() for parameter in parameters)
    scales = sum(p.numel() for p in parameters if place_of(p).name.endswith("_scale"))
    assert counts["norm_scales"] == scales
    assert sum(count for count, _ in layer_costs(dims)) == counts["total"]
    assert counts["matrices"] == sum(
        p.numel()
        for p in parameters
        if place_of(p).name.startswith("transformer.h.") and not place_of(p).name.endswith("_scale")
    )
    assert counts["value_embeds"] == sum(p.numel() for p in parameters if place_of(p).name.startswith("value_embeds."))


def test_targets_of_minus_one_and_tokens_without_bytes_do_not_count():
    dims = small(depth=2)
    layers = build_layers(dims, ModelOptions(), seed=0)
    sizes = torch.arange(97)  # token 0 has no bytes
    loss = Loss(dims, sizes)
    ids = torch.randint(0, 97, (1, 50), generator=torch.Generator().manual_seed(0))
    output, targets = run_layers(layers, ids), ids.clone()
    plain = torch.nn.functional.cross_entropy(logits(output, dims)[0], targets[0], reduction="none").double()
    targets[0, :10], targets[0, 10] = -1, 0
    plain_at_zero = torch.nn.functional.cross_entropy(logits(output, dims)[0, 10:11], torch.tensor([0])).double()
    assert loss(output, targets).item() == pytest.approx(((plain[11:].sum() + plain_at_zero) / 40).item(), rel=1e-6)
    counted = sizes[targets[0, 11:]] > 0
    nats, size = loss.eval()(output, targets).tolist()
    assert nats == pytest.approx(plain[11:][counted].sum().item(), rel=1e-7)
    assert size == sizes[targets[0, 11:]].sum().item()


def test_bfloat16_stays_bfloat16():
    dims = small(depth=2)
    layers = build_layers(dims, ModelOptions(compute_dtype=torch.bfloat16), seed=0)
    seen = []
    for layer in layers:
        layer.register_forward_hook(
            lambda module, inputs, output: seen.extend(t.dtype for t in output[:-1] if t.is_floating_point())
        )
    run_layers(layers, torch.zeros(1, 8, dtype=torch.int64))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("head_size", [16, 32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_are_nanochats_to_the_bit_over_ten_rows(head_size, dtype):
    dims = Dimensions(1, 256, 2, 2, head_size, 300, 97, (300,))
    frequencies = 1.0 / (100000 ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size))
    angles = torch.outer(torch.arange(300 * 10, dtype=torch.float32), frequencies)[None, :, None, :]
    rotary = Rotary(dims, ModelOptions(compute_dtype=dtype))
    assert torch.equal(rotary.cos, angles.cos().to(dtype)) and torch.equal(rotary.sin, angles.sin().to(dtype))
