"""Runs GPU code on a machine without a GPU, on tensors without data whose device is CUDA: python -m tests.fake_cuda

torch's FakeTensorMode computes shapes, dtypes and devices by the rules of the real operations. It refuses operands on
different devices and FP8 products that cuBLAS would refuse. Autograd on such tensors aborts the process, so gradients
are off, backward functions are called directly, and this is a process of its own. Prints JSON: case -> "", or what was
raised. Packages are stand-ins that check what they are given: Transformer Engine, flash-attention, and
flex_attention's kernel.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from megachat.kernels import choice, fp8, gpu_attention, te
from megachat.kernels.choice import AttentionChoice, choose_attention, choose_fp8
from megachat.kernels.cross_entropy import WHOLE, _ChunkedCrossEntropy
from megachat.kernels.gpu_attention import FLASH_MODULES
from megachat.kernels.gradient_norm import torch_sum_of_squares
from megachat.model.gpt import LOGIT_CAP, ModelOptions, Rotary, build_layers, last_logits, run_layers
from megachat.optim.graph import UpdateGraph
from megachat.optim.muon import Functions
from megachat.parallel.without_compiler import AdamW
from megachat.parallel.zero_state import ZeroState
from megachat.planning.dimensions import Dimensions
from tests.unit.kernels.test_te import StandIn

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16
DIMS = Dimensions(2, 256, 2, 1, 128, 512, 250, (128, 512))
ATTENTIONS = ("te", *FLASH_MODULES, "flex", "sdpa")
BACKENDS = [(recipe, backend) for recipe in fp8.PRODUCTS for backend in ("te", "torch")]
_aten = torch.ops.aten


class WithoutGuards(TorchFunctionMode):
    """Calls the operations behind the few methods that torch cannot call without a CUDA library."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, tensor = kwargs or {}, torch.Tensor
        if function is tensor.__getitem__:
            return _index(*args)
        if function is tensor.__setitem__:
            return _aten.copy_.default(_index(*args[:2]), torch.as_tensor(args[2], device=args[0].device))
        if function is tensor.copy_:
            return _aten.copy_.default(*args)
        if function is tensor.contiguous:
            return _aten.contiguous.default(*args)
        if function is tensor.to:
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            return _aten._to_copy.default(args[0], device=device or args[0].device, dtype=dtype or args[0].dtype)
        return function(*args, **kwargs)


def _index(x: torch.Tensor, at) -> torch.Tensor:
    """x[at] for numbers, slices, None, Ellipsis and tensors."""
    at = list(at) if isinstance(at, tuple) else [at]
    for place, one in enumerate(at):
        if one is Ellipsis:
            named = sum(other is not None and other is not Ellipsis for other in at)
            at[place : place + 1] = [slice(None)] * (x.ndim - named)
            break
    dim, tensors = 0, []
    for one in at:
        if one is None:
            x = _aten.unsqueeze.default(x, dim)
        elif isinstance(one, int):
            x, dim = _aten.select.int(x, dim, one), dim - 1
        elif isinstance(one, slice):
            x = _aten.slice.Tensor(x, dim, one.start, one.stop, one.step or 1)
        else:
            tensors += [None] * (dim - len(tensors)) + [one]
        dim += 1
    return _aten.index.Tensor(x, tensors) if tensors else x


class Context:
    """Stands for the context of an autograd function; all gradients are needed."""

    needs_input_grad = (True,) * 8

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def tensors_like(*shapes: tuple[int, ...], dtype=BF16) -> list[torch.Tensor]:
    return [torch.empty(shape, device=CUDA, dtype=dtype) for shape in shapes]


def expect(tensor: torch.Tensor, shape, dtype: torch.dtype) -> None:
    assert (tensor.device, tuple(tensor.shape), tensor.dtype) == (CUDA, tuple(shape), dtype), (
        f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected {dtype} {tuple(shape)} on {CUDA}"
    )


def flash_attn_func(q, k, v, *, causal, window_size):
    """Stands for flash-attention's function: what it requires, and the shape of what it returns."""
    assert causal and len(window_size) == 2
    for one in (q, k, v):
        assert one.device == CUDA and one.dtype in (torch.bfloat16, torch.float16) and one.stride(-1) == 1
    assert q.size(2) % k.size(2) == 0 and k.shape == v.shape and q.size(-1) % 8 == 0
    return torch.empty_like(q)


def flex_attention(q, k, v, *, block_mask, enable_gqa):
    """Stands for the compiled flex_attention, whose kernel Triton would make."""
    tokens, devices = q.size(2), {one.device for one in (q, k, v, block_mask.kv_num_blocks, block_mask.kv_indices)}
    assert devices == {CUDA}, f"operands and mask of flex_attention are on {devices}"
    assert block_mask.seq_lengths == (tokens, k.size(2)) and enable_gqa == (q.size(1) != k.size(1))
    return torch.empty_like(q)


def chosen_attention(name: str) -> AttentionChoice:
    return choose_attention(name, CUDA, BF16, DIMS)


def run_attention(name: str) -> None:
    attend = chosen_attention(name).attend
    for tokens in (DIMS.sequence_len, 333):  # as in training, and as in sampling
        shapes = [(2, tokens, heads, DIMS.head_size) for heads in (DIMS.heads, DIMS.kv_heads, DIMS.kv_heads)]
        for window in DIMS.windows:
            expect(attend(*tensors_like(*shapes), window), shapes[0], BF16)


def run_product(recipe: str, backend: str, columns: int = 256) -> None:
    """Forward, and backward where the function is ours."""
    (x,), (weight,) = tensors_like((2, 128, columns)), tensors_like((384, columns), dtype=torch.float32)
    weight = torch.nn.Parameter(weight)
    if backend == "te":
        expect(te.TELinears(recipe).build(weight)(x, weight), (2, 128, 384), BF16)
        return
    expect(fp8.PRODUCTS[recipe](x, weight), (2, 128, 384), BF16)
    function, context = {"tensorwise": fp8._Tensorwise, "blockwise": fp8._Blockwise}[recipe], Context()
    y = function.forward(context, x.flatten(0, 1), weight)
    d_x, d_weight = function.backward(context, y)
    expect(d_x, (256, columns), BF16)
    expect(d_weight, weight.shape, torch.float32)


def run_head(products, tokens: int = 256) -> None:
    """The loss with its gradients, in several chunks of the head."""
    (hidden,), (table,) = tensors_like((tokens, DIMS.width)), tensors_like((256, DIMS.width), dtype=torch.float32)
    targets, context = torch.zeros(tokens, device=CUDA, dtype=torch.int64), Context()
    part = dataclasses.replace(WHOLE, chunk_bytes=4 * 128 * 256)
    loss = _ChunkedCrossEntropy.forward(context, hidden, table, targets, 256, LOGIT_CAP, part, products, 1e-4)
    expect(loss, (), torch.float32)
    d_hidden, d_table, *_ = _ChunkedCrossEntropy.backward(context, loss)
    expect(d_hidden, hidden.shape, BF16)
    expect(d_table, table.shape, torch.float32)


def run_model(attention: str, recipe: str, backend: str) -> None:
    """The forward pass and the last logits of a model; it is built on the GPU, as a rank builds it."""
    chosen = choose_fp8(recipe, backend, CUDA, BF16, "")
    assert (chosen and chosen.backend) == (backend if recipe != "off" else None)
    with torch.device(CUDA):
        options = ModelOptions(compute_dtype=BF16, attend=chosen_attention(attention).attend)
        layers = build_layers(DIMS, options)
    if chosen:
        assert fp8.apply_fp8(list(layers), chosen) > 0
    ids = torch.zeros((2, DIMS.sequence_len), device=CUDA, dtype=torch.int64)
    output = run_layers(layers, ids)
    expect(output[0], (2, DIMS.sequence_len, DIMS.width), BF16)
    positions = torch.zeros(2, device=CUDA, dtype=torch.int64)
    expect(last_logits(output, positions, DIMS), (2, DIMS.vocab_size), torch.float32)


def run_muon() -> None:
    functions, shape = Functions(), (256, 384)
    momentum, gradient, weight = tensors_like(shape, shape, shape, dtype=torch.float32)
    rate = torch.zeros((), device=CUDA)
    update = functions.momentum_update(momentum, gradient, rate).to(BF16)
    direction = functions.update_direction(update)
    norm, scale = functions.update_scales(direction, torch.empty((1, 384), device=CUDA), rate)
    functions.apply_update(weight, direction, norm, scale, rate, rate)
    expect(direction, shape, BF16)
    expect(torch_sum_of_squares([gradient, weight]), (), torch.float32)


def run_update_graph() -> None:
    """AdamW's part of the captured update, in a call before the capture: rates and factor are on the GPU."""
    flat = torch.nn.Parameter(*tensors_like((384,), dtype=torch.float32))
    optimizer = AdamW([flat], fused=True)
    muon = MagicMock(mesh=SimpleNamespace(device=CUDA, stage=SimpleNamespace(size=1)))
    adamw = MagicMock(optimizer=optimizer, param_groups=optimizer.param_groups, single_partition_of_fp32_groups=[flat])
    adamw.mesh, adamw.averaged_gradients = muon.mesh, {0: tensors_like((256,), (8, 16), dtype=torch.float32)}
    for name in ("prepare_capture", "keep_gradients", "update_captured"):
        getattr(adamw, name).side_effect = partial(getattr(ZeroState, name), adamw)

    def fused_adamw(weights, gradients, *moments, lr, **numbers):  # torch knows no shapes of the kernel
        *moments, none, steps = moments
        for tensor in (*weights, *gradients, *itertools.chain(*moments)):
            expect(tensor, (384,), torch.float32)
        for tensor in (*steps, lr, *muon.update.call_args.args):
            expect(tensor, (), torch.float32)

    with patch.object(torch, "_fused_adamw_", fused_adamw):
        UpdateGraph(adamw, muon).step(torch.tensor(0.5))


def _on_cpu(function):
    """The function, without its argument `device`: a forgotten device=."""
    return lambda *args, device=None, **options: function(*args, **options)


def _mask_on_cpu(self, window, device):
    return _REAL_MASK(self, window, torch.device("cpu"))


_REAL_MASK = gpu_attention.FlexAttention._mask


@contextlib.contextmanager
def rotary_on_cpu():
    """Positions that stay where they are computed."""
    real = Rotary.__init__

    def init(self, dims, options):
        with torch.device("cpu"):
            real(self, dims, options)

    with patch.object(Rotary, "__init__", init):
        yield


def cases() -> dict:
    """Case -> (function, arguments)."""
    result = {f"attention {name}": (run_attention, name) for name in ATTENTIONS}
    result |= {f"product {recipe} {backend}": (run_product, recipe, backend) for recipe, backend in BACKENDS}
    heads = {"bfloat16": fp8.PlainProducts, **fp8.HEADS}
    result |= {f"head {name}": (run_head, products) for name, products in heads.items()}
    result |= {f"model {name}": (run_model, name, "off", "torch") for name in ATTENTIONS}
    result |= {f"model {recipe} {backend}": (run_model, "auto", recipe, backend) for recipe, backend in BACKENDS}
    return result | {"Muon's update": (run_muon,), "the captured update": (run_update_graph,)}


def faults() -> dict:
    """Fault -> (what plants it, function, arguments)."""
    column_major = patch.object(fp8, "column_major", lambda x: x.contiguous())
    unchecked = patch.object(fp8, "check_fp8_multiples", lambda *_: None)
    rows = patch.object(fp8.TensorwiseHead, "row_multiple", 1)
    cpu_scale = patch.object(fp8, "_scale_to", lambda largest, peak: torch.ones((), device="cpu").expand(peak.shape))
    return {
        "a mask on the CPU": (patch.object(torch, "arange", _on_cpu(torch.arange)), run_attention, "sdpa"),
        "a block mask on the CPU": (
            patch.object(gpu_attention.FlexAttention, "_mask", _mask_on_cpu),
            run_attention,
            "flex",
        ),
        "positions on the CPU": (rotary_on_cpu(), run_model, "te", "off", "torch"),
        "a second factor by rows": (column_major, run_product, "tensorwise", "torch"),
        "a second factor of the head by rows": (column_major, run_head, fp8.TensorwiseHead),
        "a side that 16 does not divide": (unchecked, run_product, "tensorwise", "torch", 264),
        "a chunk of the head that 16 does not divide": (rows, run_head, fp8.TensorwiseHead, 250),
        "a scale on the CPU": (cpu_scale, run_product, "blockwise", "torch"),
        "a rate on the CPU": (patch.object(torch, "zeros", _on_cpu(torch.zeros)), run_update_graph),
    }


def outcome(function, *arguments) -> str:
    """Returns "" or the error."""
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    """Runs all cases and faults on a GPU that has every package, with stand-ins for those."""
    logging.disable(logging.CRITICAL)  # torch logs what it refuses
    te_package = StandIn(blocks=(True, ""))
    flash = {module: SimpleNamespace(flash_attn_func=flash_attn_func) for module in FLASH_MODULES.values()}
    generation = {"flash2": (8, 0), "flash4": (10, 0)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(sys.modules, te_package.modules | flash))
        stack.enter_context(patch.object(te, "_package_versions", lambda: {"transformer_engine": "2.20.2"}))
        stack.enter_context(patch.object(torch, "compile", lambda function, **_: flex_attention))
        stack.enter_context(patch.object(choice, "_trial", lambda *_: None))  # needs gradients
        stack.enter_context(patch.object(choice, "device_name", lambda device: "GPU"))
        capability = [(9, 0)]
        for module in (choice, te):
            stack.enter_context(patch.object(module, "compute_capability", lambda device: capability[0]))
        for mode in (FakeTensorMode(), torch.no_grad(), WithoutGuards()):
            stack.enter_context(mode)
        results = {}
        for name, case in cases().items():
            capability[0] = generation.get(name.rpartition(" ")[2], (9, 0))
            results[name] = outcome(*case)
        capability[0] = (9, 0)
        for name, (fault, *case) in faults().items():
            with fault:
                results[name] = outcome(*case)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
