"""The chooser's decisions and sentences, and flex_attention's windows; the GPU kernels are compared in tests/gpu."""

import dataclasses

import pytest
import torch

from megachat.errors import UserError
from megachat.kernels import attention_backends
from megachat.kernels.attention import attention
from megachat.kernels.attention_backends import FlashAttention, FlexAttention, choose_attention
from megachat.planning.dimensions import Dimensions, window_sizes

CPU, GPU, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
DIMS = Dimensions(4, 256, 2, 2, 128, 2048, 512, window_sizes("SSSL", 4, 2048))
FULL = dataclasses.replace(DIMS, windows=(2048,) * 4)
ALL_PACKAGES = {"te", "flash2", "flash3", "flash4"}


@pytest.fixture
def machine(monkeypatch):
    """A GPU of some compute capability with some of the packages, some of them without a kernel for it."""

    def pretend(capability, packages=frozenset(), broken=()):
        def flash_function(name):
            if name not in packages:
                raise ImportError(f"No module named {name}")

        monkeypatch.setattr(attention_backends, "compute_capability", lambda device: capability)
        monkeypatch.setattr(attention_backends, "device_name", lambda device: "GPU")
        monkeypatch.setattr(
            attention_backends,
            "te_attention_problem",
            lambda device: None if "te" in packages else "the package is not installed",
        )
        monkeypatch.setattr(attention_backends, "te_version", lambda: "2.20.2")
        monkeypatch.setattr(attention_backends, "_flash_function", flash_function)
        monkeypatch.setattr(attention_backends, "FlashAttention", lambda name: name)
        monkeypatch.setattr(
            attention_backends,
            "_trial",
            lambda attend, device, dtype, dims: "a trial of it failed" if attend in broken else None,
        )

    return pretend


@pytest.mark.parametrize(
    ("capability", "packages", "dims", "name"),
    [
        ((9, 0), ALL_PACKAGES, DIMS, "te"),
        ((9, 0), ALL_PACKAGES - {"te"}, DIMS, "flash3"),
        ((9, 0), {"flash4", "flash2"}, DIMS, "flash4"),
        ((10, 0), ALL_PACKAGES - {"te"}, DIMS, "flash4"),
        ((10, 0), {"flash3", "flash2"}, DIMS, "flex"),
        ((8, 0), ALL_PACKAGES - {"te"}, DIMS, "flash2"),
        ((8, 0), set(), DIMS, "flex"),
        ((7, 5), ALL_PACKAGES - {"te"}, DIMS, "sdpa"),
        ((8, 0), ALL_PACKAGES - {"te"}, FULL, "sdpa"),
        ((9, 0), {"flash3"}, FULL, "flash3"),
        ((9, 0), {"flash3"}, dataclasses.replace(DIMS, head_size=264), "flex"),
    ],
)
def test_auto_takes_the_fastest_that_is_there_and_says_why(capability, packages, dims, name, machine):
    machine(capability, packages)
    found = choose_attention("auto", GPU, BF16, dims)
    assert found.name == name and found.reason.startswith("auto: ")
    if name not in ("te", "sdpa"):
        assert "te (the package is not installed)" in found.reason
    assert (found.warning is None) == (name != "sdpa" or dims is FULL)


def test_a_kernel_that_fails_its_trial_is_passed_over(machine):
    machine((9, 0), ALL_PACKAGES - {"te"}, broken={"flash3"})
    found = choose_attention("auto", GPU, BF16, DIMS)
    assert found.name == "flash4" and "flash3 (a trial of it failed)" in found.reason
    with pytest.raises(
        UserError, match="precision.attention is flash3 but a trial of it failed: set precision.attention=auto"
    ):
        choose_attention("flash3", GPU, BF16, DIMS)


@pytest.mark.parametrize(
    ("attend", "told"),
    [
        (attention, None),
        (
            lambda q, k, v, window: attention(q, k, v, window - 1),
            "with a window of 32 of 256 tokens gave other results than torch",
        ),
        (
            lambda q, k, v, window: attention(q, k, v, window + 1),
            "with a window of 32 of 256 tokens gave other results than torch",
        ),
        (
            lambda q, k, v, window: attention(q, k, v, 256),
            "with a window of 32 of 256 tokens gave other results than torch",
        ),
        (
            lambda q, k, v, window: attention(q, k, v, 32),
            "with a window of 256 of 256 tokens gave other results than torch",
        ),
        (lambda q, k, v, window: attention(q, k.detach(), v, window), "a trial of it failed (RuntimeError: "),
        (lambda q, k, v, window: attention(q, k, v, window) * torch.nan, "gave other results than torch, nan% off"),
    ],
)
def test_a_trial_finds_wrong_windows_and_what_fails(attend, told):
    found = attention_backends._trial(attend, CPU, BF16, dataclasses.replace(DIMS, kv_heads=1))
    assert found == told if told is None else told in found


@pytest.mark.parametrize("asked", ["te", "flash2", "flash3", "flash4", "flex"])
def test_where_another_machine_trained_another_kernel_may_be_taken(asked):
    found = choose_attention(asked, CPU, torch.float32, FULL, must=False)
    assert (found.name, found.attend) == ("sdpa", attention) and found.reason.startswith(
        f"auto: torch's own; not {asked} ("
    )


def test_windows_in_a_mask_and_float32_on_a_gpu_are_said_loudly(machine):
    machine((9, 0), ALL_PACKAGES)
    found = choose_attention("auto", GPU, torch.float32, DIMS)
    assert (found.name, found.attend) == ("sdpa", attention)
    assert "te (it computes in bfloat16 or float16, not in float32)" in found.reason
    assert found.warning.endswith("set model.window_pattern=L, or precision.compute=bfloat16")
    assert (
        "set model.window_pattern=L, or precision.attention to te" in choose_attention("sdpa", GPU, BF16, DIMS).warning
    )
    assert (
        choose_attention("sdpa", GPU, BF16, FULL).warning is None
        and choose_attention("sdpa", CPU, BF16, DIMS).warning is None
    )


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "told"),
    [
        ("te", CPU, BF16, "precision.attention is te but that needs a CUDA device: set precision.attention=auto"),
        ("flash2", CPU, BF16, "that needs a CUDA device"),
        ("flex", CPU, BF16, "flex_attention has no backward pass on a CPU"),
        ("te", GPU, BF16, "the package is not installed"),
        ("flash3", GPU, BF16, "flash_attn_interface cannot be imported (ImportError: No module named flash3)"),
        ("flash2", GPU, torch.float32, "it computes in bfloat16 or float16, not in float32"),
        ("flash4", GPU, BF16, "it has no kernel for compute capability 8.6 (GPU)"),
        ("windowed", GPU, BF16, "that is made for CPUs"),
    ],
)
def test_what_was_asked_for_by_name_is_never_replaced(asked, device, dtype, told, machine):
    machine((8, 6) if asked == "flash4" else (9, 0))
    with pytest.raises(UserError) as caught:
        choose_attention(asked, device, dtype, DIMS)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_on_a_cpu_short_windows_are_worth_a_kernel_of_their_own():
    assert choose_attention("auto", CPU, BF16, FULL).name == "sdpa"
    assert choose_attention("auto", CPU, torch.float32, DIMS).name == "windowed"
    short = dataclasses.replace(DIMS, sequence_len=160, windows=window_sizes("SSSL", 4, 160))
    assert choose_attention("auto", CPU, torch.float32, short).name == "sdpa"
    assert choose_attention("windowed", CPU, torch.float32, short).name == "windowed"


def heads(tokens, kv_heads):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, tokens, count, 16, generator=generator) for count in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_flex_attention_sees_the_window(kv_heads):
    q, k, v = heads(160, kv_heads)
    attend = FlexAttention(160, compiled=False)
    for window in (0, 7, 128, 158, 159, 160, 500):
        torch.testing.assert_close(attend(q, k, v, window), attention(q, k, v, window), rtol=1e-5, atol=1e-6)
    q, k, v = heads(37, kv_heads)
    assert torch.equal(attend(q, k, v, 7), attention(q, k, v, 7)), "another length takes the plain form"


@pytest.mark.parametrize(("name", "none"), [("flash2", (-1, -1)), ("flash3", (-1, -1)), ("flash4", (None, None))])
def test_flash_attention_is_given_windows_as_it_counts_them(name, none, monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, *, causal, window_size):
        calls.append((causal, window_size))
        return (q, "sums") if name != "flash2" else q

    monkeypatch.setattr(attention_backends, "_flash_function", lambda name: flash_attn_func)
    q, k, v = heads(20, 2)
    attend = FlashAttention(name)
    assert all(attend(q, k, v, window) is q for window in (7, 18, 19, 20))
    assert calls == [(True, (7, 0)), (True, (18, 0)), (True, none), (True, none)]


def test_compiled_functions_call_flash_attention_as_it_is(monkeypatch):
    """It is no graph's business: what lies before and behind is compiled."""
    graphs, given = [], []

    def flash_attn_func(q, k, v, *, causal, window_size):
        given.append((type(q), window_size))
        return attention(q, k, v, window_size[0])

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(attention_backends, "_flash_function", lambda name: flash_attn_func)
    attend, inputs = FlashAttention("flash3"), heads(20, 2)
    torch._dynamo.reset()
    found = torch.compile(lambda q, k, v: attend(q.sin(), k, v, 7).cos(), backend=count, dynamic=False)(*inputs)
    assert torch.equal(found, attention(inputs[0].sin(), *inputs[1:], 7).cos())
    assert given == [(torch.Tensor, (7, 0))] and len(graphs) == 2
