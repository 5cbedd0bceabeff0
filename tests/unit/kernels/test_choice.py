"""The choices of kernels and their reasons; tests/gpu compares the GPU kernels themselves."""

import dataclasses

import pytest
import torch

from megachat.errors import UserError
from megachat.kernels import choice
from megachat.kernels.attention import attention
from megachat.kernels.choice import choose_attention
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

        monkeypatch.setattr(choice, "compute_capability", lambda device: capability)
        monkeypatch.setattr(choice, "device_name", lambda device: "GPU")
        monkeypatch.setattr(
            choice, "te_attention_problem", lambda device: None if "te" in packages else "the package is not installed"
        )
        monkeypatch.setattr(choice, "te_version", lambda: "2.20.2")
        monkeypatch.setattr(choice, "flash_function", flash_function)
        monkeypatch.setattr(choice, "FlashAttention", lambda name: name)
        monkeypatch.setattr(
            choice, "_trial", lambda attend, device, dtype, dims: "its trial run failed" if attend in broken else None
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
    chosen = choose_attention("auto", GPU, BF16, dims)
    assert chosen.name == name and chosen.reason.startswith("auto: ")
    if name not in ("te", "sdpa"):
        assert "te (the package is not installed)" in chosen.reason
    assert (chosen.warning is None) == (name != "sdpa" or dims is FULL)


def test_a_kernel_that_fails_its_trial_run_is_rejected(machine):
    machine((9, 0), ALL_PACKAGES - {"te"}, broken={"flash3"})
    chosen = choose_attention("auto", GPU, BF16, DIMS)
    assert chosen.name == "flash4" and "flash3 (its trial run failed)" in chosen.reason
    with pytest.raises(
        UserError, match="precision.attention is flash3, but its trial run failed: set precision.attention=auto"
    ):
        choose_attention("flash3", GPU, BF16, DIMS)


@pytest.mark.parametrize(
    ("attend", "problem"),
    [
        (attention, None),
        (
            lambda q, k, v, window: attention(q, k, v, window - 1),
            "with a window of 32 of 256 tokens differs from torch",
        ),
        (
            lambda q, k, v, window: attention(q, k, v, window + 1),
            "with a window of 32 of 256 tokens differs from torch",
        ),
        (lambda q, k, v, window: attention(q, k, v, 256), "with a window of 32 of 256 tokens differs from torch"),
        (lambda q, k, v, window: attention(q, k, v, 32), "with a window of 256 of 256 tokens differs from torch"),
        (lambda q, k, v, window: attention(q, k.detach(), v, window), "its trial run failed (RuntimeError: "),
        (lambda q, k, v, window: attention(q, k, v, window) * torch.nan, "differs from torch by nan%"),
    ],
)
def test_a_trial_run_detects_wrong_windows_and_failures(attend, problem):
    chosen = choice._trial(attend, CPU, BF16, dataclasses.replace(DIMS, kv_heads=1))
    assert chosen == problem if problem is None else problem in chosen


@pytest.mark.parametrize("requested", ["te", "flash2", "flash3", "flash4", "flex"])
def test_another_machine_than_the_trainings_may_use_another_kernel(requested):
    chosen = choose_attention(requested, CPU, torch.float32, FULL, must=False)
    assert (chosen.name, chosen.attend) == ("sdpa", attention) and chosen.reason.startswith("auto: ")
    assert f"not available: {requested} (" in chosen.reason


def test_windows_in_a_mask_and_float32_on_a_gpu_are_warned_about(machine):
    machine((9, 0), ALL_PACKAGES)
    chosen = choose_attention("auto", GPU, torch.float32, DIMS)
    assert (chosen.name, chosen.attend) == ("sdpa", attention)
    assert "te (it computes in bfloat16 or float16, not in float32)" in chosen.reason
    assert chosen.warning.endswith("set model.window_pattern=L, or precision.compute=bfloat16")
    assert (
        "set model.window_pattern=L, or precision.attention to te" in choose_attention("sdpa", GPU, BF16, DIMS).warning
    )
    assert (
        choose_attention("sdpa", GPU, BF16, FULL).warning is None
        and choose_attention("sdpa", CPU, BF16, DIMS).warning is None
    )


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "problem"),
    [
        ("te", CPU, BF16, "precision.attention is te, but it needs a CUDA device: set precision.attention=auto"),
        ("flash2", CPU, BF16, "it needs a CUDA device"),
        ("flex", CPU, BF16, "flex_attention has no backward pass on a CPU"),
        ("te", GPU, BF16, "the package is not installed"),
        ("flash3", GPU, BF16, "flash_attn_interface cannot be imported (ImportError: No module named flash3)"),
        ("flash2", GPU, torch.float32, "it computes in bfloat16 or float16, not in float32"),
        ("flash4", GPU, BF16, "it has no kernel for compute capability 8.6 (GPU)"),
        ("windowed", GPU, BF16, "it is made for CPUs"),
    ],
)
def test_a_requested_kernel_is_never_replaced(requested, device, dtype, problem, machine):
    machine((8, 6) if requested == "flash4" else (9, 0))
    with pytest.raises(UserError) as caught:
        choose_attention(requested, device, dtype, DIMS)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_on_a_cpu_short_windows_use_tiles():
    assert choose_attention("auto", CPU, BF16, FULL).name == "sdpa"
    assert choose_attention("auto", CPU, torch.float32, DIMS).name == "windowed"
    short = dataclasses.replace(DIMS, sequence_len=160, windows=window_sizes("SSSL", 4, 160))
    assert choose_attention("auto", CPU, torch.float32, short).name == "sdpa"
    assert choose_attention("windowed", CPU, torch.float32, short).name == "windowed"
