"""This machine as the doctor describes it: what is installed, what a run would choose and why, and what is wrong."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import partial

from megachat.config import Config
from megachat.doctor.installed import installed_facts
from megachat.doctor.traps import find_traps
from megachat.errors import UserError, summary
from megachat.text import plural, text_table

_VOCAB = 32768  # if the vocabulary comes from a tokenizer

Choices = Iterator[tuple[str, str, str]]  # what is chosen, the choice, the reason


def run_choices(config: Config) -> list[dict[str, str]]:
    """Returns "what", "choice", "reason" of all that a run chooses. A chooser that fails does not hide the others."""
    choosers = {
        "compute": _compute_choices,
        "attention": _attention_choices,
        "fp8": _fp8_choices,
        "gradient norm": _gradient_norm_choice,
        "compile": _compile_choice,
    }
    lines: list[tuple[str, str, str]] = []
    for what, choose in choosers.items():
        try:
            lines += choose(config)
        except UserError as error:
            lines.append((what, "refused", str(error)))
        except Exception as error:  # a broken installation can fail in any way
            lines.append((what, "unknown", summary(error)))
    return [{"what": what, "choice": choice, "reason": reason} for what, choice, reason in lines]


def _device_and_dtype(config: Config):
    from megachat.device import choose_compute_dtype, this_device

    device = this_device()
    return device, *choose_compute_dtype(config.precision.compute, device)


def _compute_choices(config: Config) -> Choices:
    from megachat.device import device_name, dtype_name, peak_flops

    device, dtype, reason = _device_and_dtype(config)
    yield "device", device_name(device), f"dense bf16 peak {peak_flops(device) or 'unknown'}"
    yield "compute", dtype_name(dtype), reason


def _attention_choices(config: Config) -> Choices:
    from megachat.kernels.choice import ATTENTION_REASONS, choose_attention
    from megachat.planning.sizes import resolve_dimensions

    device, dtype, _ = _device_and_dtype(config)
    dims = resolve_dimensions(config, config.model.vocab_size or _VOCAB)
    choice = choose_attention(config.precision.attention, device, dtype, dims)
    yield "attention", choice.name, choice.reason + (f"; {choice.warning}" if choice.warning else "")
    for name in ATTENTION_REASONS:
        if name != choice.name:
            yield f"attention {name}", *_availability(partial(choose_attention, name, device, dtype, dims))


def _fp8_choices(config: Config) -> Choices:
    from megachat.kernels.choice import choose_fp8
    from megachat.planning.dimensions import FP8_TILES

    device, dtype, reason = _device_and_dtype(config)
    recipe = config.precision.fp8
    if recipe == "off":
        yield "fp8", "off", "configured"
    else:
        choice = choose_fp8(recipe, config.precision.fp8_backend, device, dtype, reason)
        assert choice  # it is None for "off" only
        yield "fp8", choice.backend, choice.reason
    for each in FP8_TILES:
        for backend in ("te", "torch"):
            arguments = (each, backend, device, dtype, reason)
            yield f"fp8 {each} {backend}", *_availability(partial(choose_fp8, *arguments))


def _gradient_norm_choice(config: Config) -> Choices:
    from megachat.kernels.choice import choose_gradient_norm

    choice = choose_gradient_norm(_device_and_dtype(config)[0])
    yield "gradient norm", choice.name, choice.reason


def _compile_choice(config: Config) -> Choices:
    from megachat.kernels.choice import compile_problem

    problem = compile_problem(_device_and_dtype(config)[0])
    possible = f"not possible here: {problem}" if problem else "possible here"
    yield "compile", "on" if config.precision.compile else "off", f"precision.compile; {possible}"


def _availability(choose: Callable[[], object]) -> tuple[str, str]:
    """Returns ("available", "") or ("not available", the reason in the chooser's refusal)."""
    try:
        choose()
    except UserError as error:
        reason = re.search(r" but (.*): set ", str(error))
        return "not available", reason[1] if reason else str(error)
    return "available", ""


def examine_this_host(config: Config) -> dict:
    """Returns "facts", "choices" and "traps" of this machine, JSON-compatible."""
    facts = installed_facts()
    traps = [dataclasses.asdict(trap) for trap in find_traps(facts, config)]
    return {"facts": facts, "choices": run_choices(config), "traps": traps}


def describe_examination(examination: dict) -> str:
    """Returns the examination as text."""
    facts = dict(examination["facts"])
    packages, modules = facts.pop("packages"), facts.pop("modules")
    rows = {name: value for name, value in facts.items() if value not in (None, [], {})} | packages
    rows |= {name: "installed" for name in modules if modules[name]}
    table = text_table([(name, _format_fact(name, value)) for name, value in rows.items()])
    lines = ["installed", *(f"  {line}" for line in table)]
    lines += ["", "a run here would choose"]
    for choice in examination["choices"]:
        lines.append(f"  {choice['what']}: {choice['choice']}" + (f" ({choice['reason']})" if choice["reason"] else ""))
    lines.append("")
    for trap in examination["traps"]:
        lines += [f"trap {trap['name']}: {trap['what']}", f"    repair: {trap['repair']}"]
    count = len(examination["traps"])
    return "\n".join([*lines, plural(count, "trap") if count else "no traps"])


def _format_fact(name: str, value) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e9:.1f} GB"
    if isinstance(value, list) and len(value) > 1:
        return " + ".join(f"{value.count(item)} x {item}" for item in dict.fromkeys(value))
    if isinstance(value, dict):
        return ", ".join(f"{key or 'default'} {item}" for key, item in value.items())
    return str(value[0] if isinstance(value, list) else value)
