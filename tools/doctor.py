"""What is installed here, what a run would choose from it and why, and what is wrong with it: `python tools/doctor.py`.

With --hostfile all hosts side by side, with the rate of their matrix products and the bandwidth of every pair. Exit status 0: healthy; 1: a trap,
a host that is unlike, slow or silent; 2: a mistake in the command line. docs/install.md tells what the traps are.
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a clone that was not installed

from megachat.config import Config, load_config  # noqa: E402
from megachat.doctor.installed import installed  # noqa: E402
from megachat.doctor.traps import traps  # noqa: E402
from megachat.errors import UserError, summary, user_errors_end_the_program  # noqa: E402
from megachat.job.hosts import parse_hostfile  # noqa: E402
from megachat.text import text_table  # noqa: E402

_VOCAB = 32768  # where the config leaves it to a tokenizer
_ATTENTION = ("te", "flash3", "flash4", "flash2", "flex", "windowed", "sdpa")


def choices(config: Config) -> list[dict[str, str]]:
    """For each thing that a run chooses: "what", the "choice" and its "reason". A chooser that cannot even run says so in its place."""
    found = []
    for what, choose in (
        ("compute", _compute),
        ("attention", _attention),
        ("fp8", _fp8),
        ("gradient norm", _gradient_norm),
        ("compile", _compile),
    ):
        try:
            found += [
                {"what": name, "choice": choice, "reason": reason} for name, choice, reason in choose(config, what)
            ]
        except UserError as error:
            found.append({"what": what, "choice": "refused", "reason": str(error)})
        except Exception as error:  # whatever is broken here must not hide the rest
            found.append({"what": what, "choice": "unknown", "reason": summary(error)})
    return found


def _here(config: Config):
    from megachat.device import choose_compute_dtype, this_device

    device = this_device()
    return device, *choose_compute_dtype(config.precision.compute, device)


def _compute(config: Config, what: str):
    from megachat.device import device_name, peak_flops

    device, dtype, reason = _here(config)
    yield "device", device_name(device), f"dense bf16 peak {peak_flops(device) or 'unknown'}"
    yield what, str(dtype).removeprefix("torch."), reason


def _attention(config: Config, what: str):
    from megachat.kernels.attention_backends import choose_attention
    from megachat.planning.plan import resolve_dimensions

    device, dtype, _ = _here(config)
    dims = resolve_dimensions(config, config.model.vocab_size or _VOCAB)
    choice = choose_attention(config.precision.attention, device, dtype, dims)
    yield what, choice.name, choice.reason + (f"; {choice.warning}" if choice.warning else "")
    for name in _ATTENTION:
        if name != choice.name:
            yield f"{what} {name}", *_possible(lambda name=name: choose_attention(name, device, dtype, dims))


def _fp8(config: Config, what: str):
    from megachat.kernels.fp8_backends import choose_fp8

    device, dtype, reason = _here(config)
    asked = config.precision.fp8
    if asked == "off":
        yield what, "off", "asked for"
    else:
        choice = choose_fp8(asked, config.precision.fp8_backend, device, dtype, reason)
        yield what, choice.backend, choice.reason
    for recipe in ("tensorwise", "blockwise"):
        for backend in ("te", "torch"):
            told = _possible(lambda recipe=recipe, backend=backend: choose_fp8(recipe, backend, device, dtype, reason))
            yield f"{what} {recipe} {backend}", *told


def _gradient_norm(config: Config, what: str):
    from megachat.kernels.gradient_norm import choose_gradient_norm

    choice = choose_gradient_norm(_here(config)[0])
    yield what, choice.name, choice.reason


def _compile(config: Config, what: str):
    from megachat.kernels.choice import compile_problem

    problem = compile_problem(_here(config)[0])
    possible = f"not possible here: {problem}" if problem else "possible here"
    yield what, "on" if config.precision.compile else "off", f"precision.compile; {possible}"


def _possible(choose) -> tuple[str, str]:
    """("possible", "") or ("not here", why not, out of the chooser's own refusal)."""
    try:
        choose()
    except UserError as error:
        why = re.search(r" but (.*): set ", str(error))
        return "not here", why[1] if why else str(error)
    return "possible", ""


def examination(config: Config) -> dict:
    """Of this machine: {"facts", "choices", "traps"}, as JSON can hold them."""
    facts = installed()
    return {
        "facts": facts,
        "choices": choices(config),
        "traps": [dataclasses.asdict(trap) for trap in traps(facts, config)],
    }


def described(found: dict) -> str:
    """The examination as text."""
    facts = dict(found["facts"])
    packages, modules = facts.pop("packages"), facts.pop("modules")
    rows = (
        {name: value for name, value in facts.items() if value not in (None, [], {})}
        | packages
        | {name: "there" for name in modules if modules[name]}
    )
    lines = [
        "installed",
        *(f"  {line}" for line in text_table([(name, _shown(name, value)) for name, value in rows.items()])),
        "",
        "a run here would take",
    ]
    for choice in found["choices"]:
        lines.append(f"  {choice['what']}: {choice['choice']}" + (f" ({choice['reason']})" if choice["reason"] else ""))
    lines.append("")
    for trap in found["traps"]:
        lines += [f"trap {trap['name']}: {trap['what']}", f"    repair: {trap['repair']}"]
    return "\n".join([*lines, "no trap was found" if not found["traps"] else f"{len(found['traps'])} found"])


def _shown(name: str, value) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e9:.1f} GB"
    if isinstance(value, list):
        return (
            " + ".join(f"{value.count(item)} x {item}" for item in dict.fromkeys(value))
            if len(value) > 1
            else str(value[0])
        )
    return (
        ", ".join(f"{key or 'there'} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
    )


@user_errors_end_the_program
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--config", help="judge what a run with this config would choose; default: the settings' defaults"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting of it"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--hostfile", help="examine and measure all hosts of this file instead, over ssh")
    parser.add_argument("--master_port", type=int, default=29500, help="with --hostfile: where the first host listens")
    parser.add_argument("--ssh_port", type=int, help="with --hostfile: ssh's port on all hosts, when it is not 22")
    arguments = parser.parse_args()
    if arguments.set and not arguments.config:
        parser.error("--set changes a setting of --config: give that too")
    config = load_config(arguments.config, arguments.set) if arguments.config else Config()
    if not arguments.hostfile:
        found = examination(config)
        print(json.dumps(found) if arguments.json else described(found))
        return 1 if found["traps"] else 0
    from megachat.doctor import hosts as doctor_hosts

    hosts = parse_hostfile(arguments.hostfile)
    options = ["--config", arguments.config] if arguments.config else []
    options += [part for setting in arguments.set for part in ("--set", setting)]
    found = doctor_hosts.examine(hosts, options, port=arguments.master_port, ssh_port=arguments.ssh_port)
    print(
        json.dumps(found)
        if arguments.json
        else doctor_hosts.described(found, {host.name: host.slots for host in hosts})
    )
    return 0 if doctor_hosts.is_healthy(found) else 1


if __name__ == "__main__":
    main()
