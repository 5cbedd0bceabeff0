"""`megachat plan --gpus`: which layouts of a config fit a machine, how long they take and what they cost. A prediction:
nothing is started or measured.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megachat.config import Config, load_config, save_config
from megachat.errors import UserError
from megachat.planning.hardware import Machine
from megachat.planning.layouts import layout_name
from megachat.planning.memory import FILLS, format_bytes
from megachat.planning.plan import resolve_plan
from megachat.planning.probe import Probe
from megachat.planning.search import (
    SEARCHED,
    Candidate,
    Layouts,
    free_settings,
    least_hardware,
    savings,
    scaling,
    search,
)
from megachat.planning.speeds import Speeds
from megachat.planning.step_time import PARTS, predict_run
from megachat.programs.dry_run import describe_time, hours_text, price_values
from megachat.programs.explain import planned_vocabulary
from megachat.programs.preflight import rank_checkpoint_bytes
from megachat.text import plural, text_table

# nanochat's runs that reached GPT-2's CORE, by depth: tokens per scaling parameter (docs/performance.md).
CORE_RATIOS = {24: 8.0, 26: 8.25}
CORE_FLOPS = 2.788e19  # of its d24 at ratio 8, by our count
WORKING = ("matrix products", "attention", "elementwise", "head and loss", "optimizer")  # parts that more ranks share
FASTER = 0.99  # of the time: what is worth a hint
HALF = 0.5  # the efficiency below which scaling is said to break


@dataclass(frozen=True)
class Request:
    """What is planned. free: the settings that vary. price: of a GPU-hour, with a probe of a CPU of its hour. probe:
    measured the machine; else its numbers are of data sheets.
    """

    config: Config
    machine: Machine
    vocab_size: int
    free: frozenset[str]
    kept: tuple[str, ...]
    notes: tuple[str, ...]
    price: float | None = None
    probe: Probe | None = None

    @functools.cached_property
    def speeds(self) -> Speeds | None:
        """Returns the measured speeds, if there are some."""
        return self.probe.speeds(self.machine.world) if self.probe else None

    @property
    def on_gpu(self) -> bool:
        """Returns whether the ranks have GPUs."""
        return self.probe is None or self.probe.on_gpu

    @property
    def name(self) -> str:
        """Returns the machine for people."""
        return f"{plural(self.machine.world, 'rank')} on {self.machine.gpu.name}" if self.probe else self.machine.name

    def layouts(self, top: int = 10) -> Layouts:
        """Returns the layouts of the machine, fastest first."""
        speeds, free = self.speeds, self.free
        return search(self.config, self.machine, self.vocab_size, free, speeds=speeds, on_gpu=self.on_gpu, top=top)


def make_request(
    path: str,
    overrides: list[str],
    machine: Machine,
    *,
    price: float | None = None,
    target: str = "steps",
    probe: Probe | None = None,
) -> Request:
    """Returns the request of a config file with overrides. target: steps (the config's horizon), core or flops.
    probe: of the machine.

    What is set in overrides is kept; of the file all but batch.micro_rows is kept, too. Raises UserError.
    """
    config, in_file = load_config(path, overrides), load_config(path)
    given = {override.partition("=")[0].strip() for override in overrides}
    kept = given & set(SEARCHED)
    for key in set(SEARCHED) - {"batch.micro_rows"}:
        section, _, name = key.partition(".")
        kept |= {key} if name in getattr(in_file, section).model_fields_set else set()
    vocab_size, notes = planned_vocabulary(config)
    if probe:
        config = probe.config_for(config, vocab_size)
    elif config.precision.fp8 != "off" and "float8" not in machine.gpu.flops:
        raise UserError(
            f"precision.fp8 is {config.precision.fp8}, but {machine.gpu.name} has no FP8: plan with "
            "--set precision.fp8=off, or for another GPU"
        )
    config = with_target(config, target)
    sections = config.model_dump()
    shown = [f"{key}={sections[key.split('.')[0]][key.split('.')[1]]}" for key in SEARCHED if key in kept]
    return Request(config, machine, vocab_size, free_settings(kept), tuple(shown), tuple(notes), price, probe)


def with_target(config: Config, target: str) -> Config:
    """Returns the config with the horizon of a target. Raises UserError for a depth without a published run."""
    if target == "steps":
        return config
    nothing: dict[str, object] = {"steps": None, "flops": None}
    if target == "flops":
        horizon = nothing | {"flops": CORE_FLOPS}
    elif (ratio := CORE_RATIOS.get(config.model.depth)) is None:
        known = " and ".join(f"{depth} (horizon.ratio {ratio:g})" for depth, ratio in CORE_RATIOS.items())
        raise UserError(
            f"--target core needs a depth of which a run reached GPT-2's CORE; model.depth is {config.model.depth}, "
            f"known are {known}: use --target flops, or --target steps for the config's horizon"
        )
    else:
        horizon = nothing | {"ratio": ratio}
    return config.changed("horizon", **horizon)


def plan_values_of(request: Request) -> dict:
    """Returns verdict, layouts, what does not fit and scaling as JSON values. Raises UserError if no layout exists."""
    machine, layouts = request.machine, request.layouts()
    if not layouts.ranked and not layouts.too_large:
        raise UserError(_no_layout(request, layouts))
    values: dict = {
        "machine": request.name,
        "rank": "GPU" if request.on_gpu else "rank",
        "gpus": machine.world,
        "gpu_bytes": machine.gpu.memory_bytes,
        "usable_bytes": FILLS * machine.gpu.memory_bytes,
        "fits": bool(layouts.ranked),
        "fitting_layouts": layouts.fitting,
        "layouts": [candidate_values(request, one, machine) for one in layouts.ranked],
        "too_large": [_large_values(request, one) for one in layouts.too_large],
        "refused": [{"layout": name, "reason": reason} for name, reason in layouts.refused],
        "kept": list(request.kept),
        "notes": list(request.notes),
        "probe": request.probe.source if request.probe else None,
        "source": machine.gpu.source,
        "network": None if request.probe else machine.network.name,
    }
    if request.probe:  # it knows its machine only
        return values | {"least_hardware": [], "scaling": []}
    if not layouts.ranked:
        least = least_hardware(request.config, machine, request.vocab_size, request.free)
        return values | {"least_hardware": [one.name for one in least], "scaling": []}
    return values | {"scaling": scaling_values(request)}


def describe_printed_plan(path: str, overrides: list[str], machine: Machine, price: float | None) -> tuple[str, bool]:
    """Returns the plan of exactly the layout that a config with overrides has, and whether it fits.

    Another layout, of the settings that are not set, is a hint where it is predicted to be faster. Raises UserError.
    """
    request = make_request(path, overrides, machine, price=price)
    values = plan_values_of(replace(request, free=frozenset(), kept=())) | {"scaling": [], "printed": True}
    lines = [describe_plan_values(values)]
    best, config = request.layouts(top=1).ranked, request.config
    if best:
        other = candidate_values(request, best[0], machine)
        this = values["layouts"][0] if values["fits"] else None
        if this is None or other["wall_hours"] < FASTER * this["wall_hours"]:
            planned = (this or values["too_large"][0])["settings"]
            changed = {key: value for key, value in other["settings"].items() if value != planned[key]}
            if "batch.micro_rows" in changed and config.batch.accumulation:
                changed["batch.accumulation"] = None
            chosen = " ".join(f"--set {key}={json.dumps(value)}" for key, value in changed.items())
            lines.append(
                f"hint: with {chosen} the prediction is {hours_text(other['wall_hours'])} and "
                f"{format_bytes(other['bytes'])} per GPU; `megachat plan --gpus {machine.name}` compares all"
            )
    return "\n".join(lines), values["fits"]


def _no_layout(request: Request, layouts: Layouts) -> str:
    rows = resolve_plan(request.config.model_copy(update={"parallel": Config().parallel}), 1, request.vocab_size)
    reason = layouts.refused[0][1] if layouts.refused else "no sizes of the axes divide it"
    what = f"{request.machine.world} {'GPUs' if request.on_gpu else 'ranks'}"
    return f"{what} fit no layout of this config, whose step has {rows.rows_per_step} rows: {reason}"


def candidate_values(request: Request, candidate: Candidate, machine: Machine) -> dict:
    """Returns one layout as JSON values. price: of the wall clock's hours, with the interval of the model's error."""
    saved = rank_checkpoint_bytes(candidate.config, candidate.plan)
    run = predict_run(candidate.config, candidate.plan, request.speeds or machine, checkpoint_bytes=saved)
    layout, step = candidate.plan.layout, run.step
    return {
        "layout": {"data": layout.data, "tensor": layout.tensor, "pipeline": layout.pipeline},
        "settings": candidate.settings | {"batch.micro_rows": candidate.plan.micro_rows},
        "accumulation": candidate.plan.accumulation,
        "bytes": candidate.bytes,
        "step_sec": step.total,
        "parts_sec": step.parts,
        "hidden_sec": step.hidden,
        "error": step.error,
        "steps": candidate.plan.stop_step,
        "tokens_per_sec": candidate.plan.tokens_per_step / step.total,
        "clock_hours": run.clock_hours,
        "wall_hours": run.wall_hours,
    } | price_values(run, machine.world if request.on_gpu else 1, request.price)


def _large_values(request: Request, candidate: Candidate) -> dict:
    changes = savings(candidate, on_gpu=request.on_gpu)
    return {
        "layout": layout_name(vars(candidate.plan.layout)),
        "settings": candidate.settings,
        "bytes": candidate.bytes,
        "changes": [{"set": setting, "saves": saved} for setting, saved in changes],
    }


def scaling_values(request: Request) -> list[dict]:
    """Returns the best layout on 1 to 64 nodes; efficiency: tokens per second and GPU, relative to the first."""
    values: list[dict] = []
    first: float | None = None
    for machine, layouts in scaling(request.config, request.machine, request.vocab_size, request.free):
        if not layouts.ranked:
            reason = (
                layouts.refused[-1][1] if layouts.refused and not layouts.too_large else "no layout fits the memory"
            )
            values.append({"nodes": machine.nodes, "gpus": machine.world, "reason": reason})
            continue
        value = candidate_values(request, layouts.ranked[0], machine)
        rate = value["tokens_per_sec"] / machine.world
        first = first or rate
        waiting = {part: sec for part, sec in value["parts_sec"].items() if part not in WORKING}
        cause = max(waiting, key=lambda part: waiting[part])
        value |= {"efficiency": rate / first, "cause": cause, "cause_share": waiting[cause] / value["step_sec"]}
        values.append({"nodes": machine.nodes, "gpus": machine.world} | value)
    return values


def describe_plan_values(values: Mapping, *, verbose: bool = False) -> str:
    """Returns the plan for people: the verdict first."""
    lines = _machine_verdict(values)
    if values["layouts"]:
        lines += ["", _layouts_title(values["fitting_layouts"]), *_layout_table(values["layouts"])]
    if values["too_large"]:
        lines += ["", f"too large, with {format_bytes(values['usable_bytes'])} usable per {values['rank']}"]
        for one in values["too_large"][: None if verbose else 4]:
            saved = "; ".join(f"{change['set']} saves {format_bytes(change['saves'])}" for change in one["changes"])
            lines.append(f"  {one['layout']}: {format_bytes(one['bytes'])} at least; {saved or 'nothing reduces it'}")
    if values["refused"] and (verbose or not values["layouts"]):
        lines += ["", "not possible", *(f"  {one['layout']}: {one['reason']}" for one in values["refused"])]
    if values["scaling"]:
        lines += ["", f"scaling at the same batch over {values['network']}", *_scaling_table(values["scaling"])]
    if verbose and values["layouts"]:
        step = values["layouts"][0]
        lines += ["", "the first layout's step by part"]
        lines += [f"  {part:<16}{1e3 * step['parts_sec'][part]:9.2f} ms" for part in PARTS]
        lines += [f"  {part + ', hidden':<16} {1e3 * sec:9.2f} ms" for part, sec in step["hidden_sec"].items() if sec]
    if values["kept"]:
        lines += ["", f"kept as set: {', '.join(values['kept'])}"]
    source = f"speeds: {values['source']}" if values["probe"] else f"numbers of the hardware: {values['source']}"
    return "\n".join([*lines, *values["notes"], source])


def _machine_verdict(values: Mapping) -> list[str]:
    usable = f"{format_bytes(values['usable_bytes'])} of {format_bytes(values['gpu_bytes'])} usable"
    if not values["fits"] and values.get("printed"):  # there may be others
        return [f"does not fit {values['machine']}: {format_bytes(values['too_large'][0]['bytes'])} per GPU, {usable}"]
    if not values["fits"]:
        least = ", or ".join(values["least_hardware"])
        needs = f"{format_bytes(min(one['bytes'] for one in values['too_large']))} per {values['rank']}"
        return [
            f"does not fit {values['machine']}: the smallest layout needs {needs}, {usable}",
            "plan other machines with --gpus"
            if values["probe"]
            else f"least hardware that would do: {least}"
            if least
            else "no known hardware with up to 64 nodes would do",
        ]
    best = values["layouts"][0]
    fits = f"fits {values['machine']}: {format_bytes(best['bytes'])} per {values['rank']}, {usable}"
    return [fits, *describe_time(best | {"assumed": values["probe"] is None, "source": None})]


def _layouts_title(fitting: int) -> str:
    return f"best layouts of {fitting} that fit" if fitting > 1 else "the layout"


def _layout_table(layouts: list[dict]) -> list[str]:
    priced = "price" in layouts[0]
    title = ("dp", "tp", "pp", "sequence", "rows x batches", "recompute", "fp8", "s/step", "hours", "GB")
    rows: list[tuple[str, ...]] = [title + (("price",) if priced else ())]
    for one in layouts:
        settings, layout = one["settings"], one["layout"]
        row = (
            *(str(layout[axis]) for axis in ("data", "tensor", "pipeline")),
            "yes" if settings["parallel.sequence"] else "no",
            f"{settings['batch.micro_rows']} x {one['accumulation']}",
            settings["batch.recompute"],
            settings["precision.fp8"],
            f"{one['step_sec']:.3f}",
            f"{one['wall_hours']:.2f}" if one["wall_hours"] >= 0.1 else f"{one['wall_hours']:.1g}",
            f"{one['bytes'] / 1e9:.1f}",
        )
        rows.append(row + ((f"{one['price']:,.2f}",) if priced else ()))
    return [f"  {line}" for line in text_table(rows, right=(0, 1, 2, 7, 8, 9, 10))]


def _scaling_table(values: list[dict]) -> list[str]:
    rows = [("nodes", "GPUs", "layout", "s/step", "hours", "efficiency", "largest wait")]
    breaks = ""
    for one in values:
        if "reason" in one:
            rows.append((str(one["nodes"]), str(one["gpus"]), "-", "-", "-", "-", one["reason"]))
            continue
        waits = f"{one['cause']} ({one['cause_share']:.0%} of the step)" if one["cause_share"] >= 0.005 else "-"
        times = f"{one['step_sec']:.3f}", f"{one['wall_hours']:.2f}", f"{one['efficiency']:.0%}"
        rows.append((str(one["nodes"]), str(one["gpus"]), layout_name(one["layout"]), *times, waits))
        if one["efficiency"] < HALF and not breaks:
            breaks = (
                f"  breaks at {one['nodes']} nodes: efficiency {one['efficiency']:.0%}, because of the {one['cause']}"
            )
    table = [f"  {line}" for line in text_table(rows, right=(0, 1, 3, 4, 5))]
    return [*table, breaks or f"  efficiency stays above {HALF:.0%} where a layout exists"]


def write_best(request: Request, path: str) -> None:
    """Writes the config of the fastest layout, which runs as it is. Raises UserError if none fits."""
    layouts = request.layouts(top=1)
    if not layouts.ranked:
        raise UserError(f"--write-config {path}: no layout fits {request.name}, so nothing was written")
    try:
        save_config(layouts.ranked[0].config, Path(path))
    except OSError as error:
        raise UserError(f"--write-config {path} cannot be written ({error.strerror}): give another file") from None


def draw_scaling(values: Mapping, path: str) -> None:
    """Draws the predicted step by part against nodes, in seconds and as shares. Raises UserError without matplotlib,
    and for a file that cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'megachat[notebook]', or leave --plot out") from None
    planned = [one for one in values["scaling"] if "reason" not in one]
    figure = Figure(figsize=(10, 4))
    seconds, shares = figure.subplots(1, 2)
    for axes, label in ((seconds, "predicted seconds per step"), (shares, "share of the predicted step (%)")):
        below = [0.0] * len(planned)
        for part in PARTS:
            sizes = [one["parts_sec"][part] * (1 if axes is seconds else 100 / one["step_sec"]) for one in planned]
            if any(sizes):
                axes.bar([str(one["nodes"]) for one in planned], sizes, bottom=below, label=part)
                below = [under + more for under, more in zip(below, sizes, strict=True)]
        axes.set(xlabel="nodes", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    shares.legend(
        *(list(reversed(one)) for one in shares.get_legend_handles_labels()),
        fontsize="small",
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    figure.suptitle("step by part on the best layout of each size: a prediction, not a measurement", fontsize="medium")
    try:
        figure.savefig(path, bbox_inches="tight", dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path} cannot be written ({error}): give another file, as plan.png") from None
