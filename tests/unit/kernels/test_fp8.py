"""FP8 by torch against recipes written out in float64, and what a model makes of it."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megachat.errors import UserError
from megachat.kernels import choice, cross_entropy
from megachat.kernels.choice import choose_fp8, describe_fp8
from megachat.kernels.cross_entropy import PlainProducts, capped_cross_entropy
from megachat.kernels.fp8 import HEADS, PRODUCTS, Fp8Choice, apply_fp8, block_rounded, head_products, quantized
from megachat.model.gpt import Loss, ModelOptions, build_layers, logits, run_layers
from megachat.model.parameters import load_whole, placed_parameters, starting_value
from megachat.place import place_of
from megachat.planning.dimensions import Dimensions, window_sizes
from megachat.planning.execution import fp8_fits
from megachat.planning.plan import resolve_without_text
from tests.training import small_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DIMS = Dimensions(2, 128, 2, 1, 64, 64, 128, window_sizes("L", 2, 64))


def rel(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def rounded_tensor(x, dtype):
    """As nanochat does: the scale from the tensor's largest magnitude in float64."""
    largest = torch.finfo(dtype).max
    scale = largest / x.double().abs().max()
    return (x.double() * scale).clamp(-largest, largest).to(dtype).double() / scale


def rounded_tiles(x, rows, columns):
    """Tile by tile: the largest power of two that keeps the tile below e4m3's 448."""
    result = torch.empty_like(x, dtype=torch.float64)
    for top in range(0, x.size(0), rows):
        for left in range(0, x.size(1), columns):
            tile = x[top : top + rows, left : left + columns].double()
            scale = 2.0 ** math.floor(math.log2(448 / tile.abs().max().item()))
            result[top : top + rows, left : left + columns] = (tile * scale).to(E4M3).double() / scale
    return result


def tensorwise_oracle(x, w, g):
    x8, w8, g8 = rounded_tensor(x, E4M3), rounded_tensor(w, E4M3), rounded_tensor(g, E5M2)
    return x8 @ w8.T, g8 @ w8, g8.T @ x8


def blockwise_oracle(x, w, g):
    w8 = rounded_tiles(w, 128, 128)
    along = {name: (rounded_tiles(t, 1, 128), rounded_tiles(t, 128, 1)) for name, t in (("x", x), ("g", g))}
    return along["x"][0] @ w8.T, along["g"][0] @ w8, along["g"][1].T @ along["x"][1]


def case(tokens=128, columns=256, rows=128, weight_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(tokens, columns, generator=generator) * torch.linspace(0.01, 3, tokens)[:, None]).bfloat16()
    w = (torch.randn(rows, columns, generator=generator) * torch.linspace(0.1, 1, columns)).to(weight_dtype)
    return x.requires_grad_(), w.requires_grad_(), (1e-4 * torch.randn(tokens, rows, generator=generator)).bfloat16()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("recipe", "oracle"), [("tensorwise", tensorwise_oracle), ("blockwise", blockwise_oracle)])
def test_value_and_gradients_are_the_recipes(recipe, oracle, weight_dtype):
    x, w, g = case(weight_dtype=weight_dtype)
    y = PRODUCTS[recipe](x.view(2, 64, -1), w)
    result = (y.flatten(0, 1), *torch.autograd.grad(y, (x, w), g.view_as(y)))
    plain = (x @ w.bfloat16().T, g @ w.bfloat16(), g.T @ x)
    assert y.shape == (2, 64, 128) and [t.dtype for t in result] == [torch.bfloat16, torch.bfloat16, weight_dtype]
    for one, expected, bf16 in zip(result, oracle(x.detach(), w.detach(), g), plain, strict=True):
        assert rel(one, expected) < 4e-3, "the output's rounding to bfloat16 alone"
        assert rel(one, bf16) > 1e-2, "nothing was rounded to eight bits"


@pytest.mark.parametrize("peak", [None, 1.75, 1.53125, 0.0])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rounding_is_nanochats_to_the_bit(dtype, peak):
    """nanochat divides in float64.

    With a peak of 7/4 the scale is a power of two, and many bfloat16 values lie in the middle between two of FP8.
    """
    largest = torch.finfo(dtype).max
    for seed in range(20):
        x = (
            torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))
            .mul(10.0 ** (seed % 7 - 3))
            .to((torch.bfloat16, torch.float32)[seed % 2])
        )
        x = x if peak is None else x.clamp(-peak, peak)
        scale = (largest / x.float().abs().max().double().clamp(min=1e-12)).float()
        expected, (result, factor) = (x.float() * scale).clamp(-largest, largest).to(dtype), quantized(x, dtype)
        assert torch.equal(result.float(), expected.float()) and (peak == 0 or factor == scale.reciprocal())


def test_rounded_matrices_are_row_major_as_the_gpu_wants_them():
    x = torch.randn(32, 16)
    for given in (x, x.t(), x[:1].expand(32, 16)):
        assert quantized(given, E4M3)[0].is_contiguous()


@pytest.mark.parametrize("rows, columns", [(1, 128), (128, 1), (128, 128)])
def test_each_tile_has_its_scale(rows, columns):
    x = case()[0].detach()
    x[:128, :128].clamp_(-1.75, 1.75)  # peaks for which the scale is a power of two by itself
    x[7] = 1.75
    assert torch.equal(block_rounded(x, rows, columns).double(), rounded_tiles(x, rows, columns))


@pytest.mark.parametrize("recipe", PRODUCTS)
def test_zeros_stay_and_what_is_not_finite_is_not_hidden(recipe):
    x, w, _ = case()
    assert not PRODUCTS[recipe](torch.zeros_like(x), w).any()
    assert PRODUCTS[recipe](x * 1e-38, w).isfinite().all()
    for value in (torch.inf, -torch.inf, torch.nan):
        bad = x.detach().clone()
        bad[3, 5] = value
        assert PRODUCTS[recipe](bad, w)[3].isnan().all()
        gradient = torch.zeros(128, 128, dtype=torch.bfloat16)
        gradient[7, 9] = value
        into_x, into_w = torch.autograd.grad(PRODUCTS[recipe](x, w), (x, w), gradient)
        assert into_x[7].isnan().all() and into_w[9].isnan().all()


@pytest.mark.parametrize(
    ("recipe", "tokens", "rows"), [("tensorwise", 120, 128), ("tensorwise", 128, 136), ("blockwise", 112, 128)]
)
def test_sizes_that_a_gpu_cannot_multiply_are_refused(recipe, tokens, rows):
    x, w, _ = case(tokens, 256, rows)
    with pytest.raises(ValueError, match=f"FP8 needs multiples of .*: {tokens} tokens, weight"):
        PRODUCTS[recipe](x, w)


@pytest.mark.parametrize("recipe", HEADS)
def test_the_head_in_chunks_has_the_recipes_loss_and_gradients(recipe, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(256, 128, generator=generator).bfloat16().requires_grad_()
    weight = (0.3 * torch.randn(320, 128, generator=generator)).requires_grad_()
    targets = torch.randint(0, 256, (256,), generator=generator)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 256 * 130)  # 128 rows

    def measured(products):
        loss = capped_cross_entropy(hidden, weight, targets, 256, 15.0, products=products)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    h, w = hidden.detach(), weight.detach()[:256].bfloat16()
    if recipe == "tensorwise":
        h8, w8 = rounded_tensor(h, E4M3), rounded_tensor(w, E4M3)
    else:
        h8, w8 = rounded_tiles(h, 1, 128), rounded_tiles(w, 128, 128)
    expected = torch.nn.functional.cross_entropy(15 * torch.tanh(h8 @ w8.T / 15), targets)
    result, plain = measured(HEADS[recipe]), measured(PlainProducts)
    assert result[0].item() == pytest.approx(expected.item(), rel=2e-3) and result[0] != plain[0]
    for one, bf16 in zip(result[1:], plain[1:], strict=True):
        assert 1e-2 < rel(one, bf16) < 9e-2 and one.dtype == bf16.dtype
    assert not result[2][256:].any(), "padding"


def tiny_model(recipe=None):
    layers = build_layers(DIMS, ModelOptions(torch.bfloat16))
    for parameter in placed_parameters(layers):
        place = place_of(parameter)
        start = ("normal", 0.05) if len(place.whole) == 2 else place.start
        load_whole(parameter, starting_value(place.__class__(place.name, place.whole, 0, start), seed=3))
    choice = Fp8Choice(recipe, "torch", "") if recipe else None
    if recipe:
        assert (
            apply_fp8(list(layers), choice) == 8
        )  # c_q, c_proj, c_fc, c_proj of two blocks; keys and values have 64 channels
    return layers, Loss(DIMS, torch.ones(128), products=head_products(choice, DIMS, 1))


def loss_and_gradients_then_evaluation(layers, loss):
    ids = torch.randint(0, 128, (2, 65), generator=torch.Generator().manual_seed(4))
    value = loss(run_layers(layers, ids[:, :-1]), ids[:, 1:])
    value.backward()
    gradients = {
        (place_of(p).name, place_of(p).block): p.grad.float() for p in placed_parameters(layers) if p.ndim == 2
    }
    layers.eval(), loss.eval()
    with torch.no_grad():
        output = run_layers(layers, ids[:1, :37])
        return value.item(), gradients, logits(output, DIMS), loss(output, ids[:1, 1:38])


def test_a_model_trains_in_fp8_and_is_evaluated_in_bfloat16():
    plain_loss, plain_gradients, plain_logits, plain_nats = loss_and_gradients_then_evaluation(*tiny_model())
    for recipe in PRODUCTS:
        loss, gradients, logits_then, nats = loss_and_gradients_then_evaluation(*tiny_model(recipe))
        assert 1e-4 < abs(loss - plain_loss) < 2e-2, "FP8 changed nothing, or too much"
        for (name, block), gradient in gradients.items():
            expected = plain_gradients[name, block]
            if name != "smear_gate.weight":  # behind a factor of zero
                assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.97, name
                assert not torch.equal(gradient, expected), name
        assert torch.equal(logits_then, plain_logits) and torch.equal(nats, plain_nats)


@pytest.mark.parametrize("recipe", PRODUCTS)
def test_a_recomputed_forward_pass_is_in_fp8_too(recipe):
    """Of every layer and of the loss with the head's product in it."""
    layers, loss = tiny_model(recipe)
    ids = torch.randint(0, 128, (2, 65), generator=torch.Generator().manual_seed(4))
    parameters = [parameter for parameter in layers.parameters() if parameter.requires_grad]

    def gradients(call):
        stream = ids[:, :-1]
        for layer in layers:
            stream = call(layer, stream)
        return torch.autograd.grad(call(loss, stream, ids[:, 1:]), parameters)

    expected = gradients(lambda layer, *inputs: layer(*inputs))
    result = gradients(lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=False))
    for one, other in zip(result, expected, strict=True):
        assert torch.equal(one, other)


def test_only_matrices_that_fit_are_in_fp8():
    dims = Dimensions(2, 384, 3, 1, 128, 64, 320, window_sizes("L", 2, 64))  # k, v: 128 rows; gates 12 and 24 columns
    layers = build_layers(dims, ModelOptions(torch.bfloat16))
    assert apply_fp8(list(layers), Fp8Choice("blockwise", "torch", "")) == 12
    names = {name for name, module in layers.named_modules() if getattr(module, "product", None)}
    assert names == {
        f"{layer}.{name}"
        for layer in (1, 2)
        for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    line = describe_fp8(Fp8Choice("blockwise", "torch", "requested"), dims, 3, head=True)
    assert "fp8 blockwise by torch (requested) for attn.c_q, attn.c_proj, mlp.c_fc, mlp.c_proj in training" in line
    assert "not for attn.c_k, attn.c_v, lm_head: " in line and "multiples of 128" in line
    assert (
        head_products(None, dims, 1) is head_products(Fp8Choice("blockwise", "torch", ""), dims, 1) is PlainProducts
    )  # 320 tokens
    assert head_products(Fp8Choice("tensorwise", "torch", ""), dims, 1) is HEADS["tensorwise"]
    assert head_products(Fp8Choice("tensorwise", "torch", ""), dims, 3) is PlainProducts


def test_the_list_of_matrices_is_that_of_the_model_with_tables():
    model = {"aspect_ratio": 128, "head_size": 128, "kv_heads": 3, "sequence_len": 64}
    lookup = {"after_blocks": (0,), "rows": 400, "max_rows_per_token": 60, "up_width": 256}
    config = small_config(
        model=model, batch={"tokens": 64 * 12}, lookup=lookup, ngram={"blocks": (0, 2), "rows": 60, "width": 128}
    )
    dims = resolve_without_text(config, 1, 97).dims
    layers = build_layers(dims, ModelOptions(torch.bfloat16))
    apply_fp8(list(layers), Fp8Choice("blockwise", "torch", ""))
    names = {name.split(".", 1)[1] for name, module in layers.named_modules() if getattr(module, "product", None)}
    listed = {name for name, fits in fp8_fits(dims, 1, "blockwise", head=False).items() if fits}
    assert {name.replace(".mix.", ".") for name in names if not name.startswith("ngram")} == listed - {"ngram.up"}
    assert any(name.startswith("ngram") for name in names) and "ngram.up" in listed
    line = describe_fp8(Fp8Choice("blockwise", "torch", "requested"), dims, 1, head=False)
    assert "not for lm_head: precision.fp8_head is false; never for embeddings, gates and attention's scores" in line


@pytest.mark.parametrize(
    ("requested", "capability", "dtype", "problem"),
    [
        (
            ("tensorwise", "auto", CPU),
            (0, 0),
            torch.float32,
            "needs bfloat16, but this run computes in float32 (why so): set precision.compute=bfloat16",
        ),
        (
            ("tensorwise", "te", CPU),
            (0, 0),
            torch.bfloat16,
            "precision.fp8_backend is te, but this machine has no CUDA device: set precision.fp8_backend=torch",
        ),
        (
            ("blockwise", "torch", GPU),
            (8, 0),
            torch.bfloat16,
            "but A100 has compute capability 8.0 and FP8 needs 8.9: set precision.fp8=off",
        ),
        (
            ("tensorwise", "te", GPU),
            (9, 0),
            torch.bfloat16,
            "precision.fp8_backend is te, but the package transformer_engine is not installed",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(requested, capability, dtype, problem, monkeypatch):
    monkeypatch.setattr(choice, "compute_capability", lambda device: capability)
    monkeypatch.setattr(choice, "device_name", lambda device: "A100")
    with pytest.raises(UserError) as caught:
        choose_fp8(*requested, dtype, "why so")
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_the_choice_says_why(monkeypatch):
    assert choose_fp8("off", "te", CPU, torch.float32, "") is None
    result = choose_fp8("tensorwise", "auto", CPU, torch.bfloat16, "")
    assert result == Fp8Choice(
        "tensorwise", "torch", "auto: not te, because this machine has no CUDA device; slow: this CPU has no FP8 units"
    )
    assert "multiplies in bfloat16" in choose_fp8("blockwise", "torch", CPU, torch.bfloat16, "").reason
    monkeypatch.setattr(choice, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "te_problem", lambda device, recipe: None)
    monkeypatch.setattr(choice, "te_version", lambda: "2.20.2")
    assert choose_fp8("tensorwise", "auto", GPU, torch.bfloat16, "") == Fp8Choice(
        "tensorwise", "te", "auto: Transformer Engine 2.20.2"
    )
    assert choose_fp8("tensorwise", "torch", GPU, torch.bfloat16, "") == Fp8Choice("tensorwise", "torch", "requested")
