"""`megachat explain`: a setting or a number of the plan: value, origin, formula, source, what depends on it, and what a
change would do.
"""

import contextlib
import json
from functools import partial
from pathlib import Path

from megachat.config import Config, config_from_values, load_config
from megachat.data.tokenizer import load_tokenizer
from megachat.errors import UserError
from megachat.planning.explain import setting_warnings
from megachat.planning.hardware import parse_gpus
from megachat.planning.influence import influenced, influencing, moved, numbers_of
from megachat.planning.key_docs import describe_key
from megachat.planning.names import explained_as
from megachat.planning.numbers import NUMBERS, formula_of, names_in, with_numbers
from megachat.planning.plan import resolve_plan
from megachat.planning.probe import read_probe
from megachat.planning.time_numbers import TIME_NUMBERS, Timing
from megachat.programs.preflight import rank_checkpoint_bytes
from megachat.studies.runs import flat_config
from megachat.text import text_table

ASSUMED_VOCABULARY = 32_768  # nanochat's
_WORLDS = (8, 4, 2, 1)  # the first that fits is assumed, in units of the tensor and pipeline axes


def explain(
    name: str,
    path: str | None,
    overrides: list[str],
    changes: list[str],
    world: int | None,
    timing: Timing | None = None,
) -> dict:
    """Returns what is known about a setting or number, as JSON values. `describe_explanation` prints them.

    overrides: of the config; those of the setting itself are a change, too. changes: settings of the other plan that
    it is compared with. world: ranks; None: as many as fit. timing: of a machine, for predicted numbers. Raises
    UserError for a name that does not exist, and for a predicted number without a machine or price.
    """
    key, number = explained_as(name)
    if number in TIME_NUMBERS and timing is None:
        raise UserError(f"{number} depends on the machine: give --gpus 8xH100, or --probe FILE")
    if number == "price" and timing and timing.price is None:
        raise UserError("price depends on the price of a GPU-hour: give --price")
    given = [override for override in overrides if key and override.partition("=")[0].strip() == key]
    file_config = load_config(path, []) if path else Config()
    before = _loaded(path, [override for override in overrides if override not in given])
    config, after = _loaded(path, overrides), _loaded(path, [*overrides, *changes])
    vocab_size, notes = planned_vocabulary(config)
    world = world or _fitting_world(config, vocab_size)
    numbers = partial(numbers_of, world=world, vocab_size=vocab_size, timing=timing)
    shown: dict = {"name": name, "ranks": world, "notes": notes}
    if key:
        shown["setting"] = _setting(config, key, file_config, path, bool(given))
        shown["setting"]["moves"] = influenced(config, key, partial(numbers, memory=True))
        with contextlib.suppress(UserError):  # not every setting needs a plan that exists
            warnings = setting_warnings(config, resolve_plan(config, world, vocab_size))
            shown["notes"] += [line for line in warnings if key in line]
    if number:
        shown["number"] = _explained_number(config, number, world, vocab_size, timing)
    if given or changes:
        known = partial(numbers, memory=True)
        try:
            pairs = moved(known(before), known(after))
        except UserError as error:
            raise UserError(f"{', '.join(given + changes)}: one of the two plans does not exist: {error}") from None
        shown["change"] = {
            "settings": given + changes,
            "numbers": {one: {"before": pair[0], "after": pair[1]} for one, pair in pairs.items()},
        }
    return shown


def machine_timing(
    gpus: str | None, probe: Path | None, price: float | None, world: int | None
) -> tuple[int | None, Timing | None]:
    """Returns the number of ranks, and the machine for predicted numbers, if one is given. world: that was requested.

    Raises UserError for two machines, for another number of ranks than the machine has, and a price without a machine.
    """
    if gpus and probe:
        raise UserError("--gpus and --probe name two machines: give one of the two")
    if probe:
        measured = read_probe(probe)
        return world or measured.most_ranks, Timing(measured, price, rank_checkpoint_bytes)
    if not gpus:
        if price is not None:
            raise UserError("--price needs a machine: give --gpus 8xH100, or --probe FILE")
        return world, None
    machine = parse_gpus(gpus)
    if world not in (None, machine.world):
        raise UserError(f"--gpus {gpus} has {machine.world} GPUs, but {world} ranks are requested: give one of the two")
    return machine.world, Timing(machine, price, rank_checkpoint_bytes)


def _loaded(path: str | None, overrides: list[str]) -> Config:
    return load_config(path, overrides) if path else config_from_values({}, "--set", overrides)


def planned_vocabulary(config: Config) -> tuple[int, list[str]]:
    """Returns the size of the vocabulary, and a note if it is assumed."""
    if config.model.vocab_size:
        return config.model.vocab_size, []
    try:
        return load_tokenizer(config.data.tokenizer).vocab_size, []
    except UserError:
        note = f"assumed: a vocabulary of {ASSUMED_VOCABULARY:,} tokens (no model.vocab_size, and no tokenizer in "
        return ASSUMED_VOCABULARY, [f"{note}{config.data.tokenizer})"]


def _fitting_world(config: Config, vocab_size: int) -> int:
    unit = config.parallel.tensor * config.parallel.pipeline
    for count in _WORLDS:
        try:
            resolve_plan(config, unit * count, vocab_size)
        except UserError:
            continue
        return unit * count
    return unit


def _setting(config: Config, key: str, file_config: Config, path: str | None, overridden: bool) -> dict:
    section, _, name = key.partition(".")
    description = describe_key(key)
    return {
        "key": key,
        "value": config.model_dump(mode="json")[section][name],
        "origin": "--set"
        if overridden
        else path
        if name in getattr(file_config, section).model_fields_set
        else "default",
        "default": json.loads(description.default),
        "meaning": description.meaning,
        "type": description.kind,
        "allowed": description.allowed,
    }


def _explained_number(config: Config, name: str, world: int, vocab_size: int, timing: Timing | None) -> dict:
    plan, known = resolve_plan(config, world, vocab_size), NUMBERS | TIME_NUMBERS
    timing = timing if name in TIME_NUMBERS else None
    memory = name.startswith("memory.")
    numbers = numbers_of(config, world, vocab_size, memory=memory, timing=timing)
    if name not in numbers:
        lookup = name.startswith("lookup.")
        part, switch = ("lookup layers", "lookup.after_blocks") if lookup else ("n-gram values", "ngram.blocks")
        raise UserError(f"this plan has no {name}: it belongs to {part}, which {switch} turns on")
    formula = known[name].formula if timing else formula_of(name, plan)
    settings = flat_config(config.model_dump(mode="json"))
    short = {key.partition(".")[2]: value for key, value in settings.items()}
    short |= {one.rpartition(".")[2]: value for one, value in numbers.items() if memory and one.startswith("memory.")}
    short |= timing.constants(plan) if timing else {}
    names = short | settings | numbers | {"world": world, "ranks": plan.layout.data}
    others = {
        other: names_in(TIME_NUMBERS[other].formula if other in TIME_NUMBERS else formula_of(other, plan))
        for other in numbers
        if other != name
    }
    return {
        "name": name,
        "value": numbers[name],
        "meaning": known[name].meaning,
        "formula": formula,
        "with_numbers": with_numbers(formula, names),
        "source": timing.source if timing else known[name].source or None,
        "moved_by": [] if memory else influencing(config, name, world, vocab_size, timing),
        "used_by": [other for other, words in others.items() if name in words or name.rpartition(".")[2] in words],
    }


def describe_explanation(shown: dict) -> str:
    """Returns an explanation for people."""
    lines = list[str]()
    if setting := shown.get("setting"):
        origin = "the default" if setting["origin"] == "default" else f"from {setting['origin']}"
        differs = "" if setting["value"] == setting["default"] else f"; default {_text(setting['default'])}"
        lines += [f"{setting['key']} = {_text(setting['value'])}   ({origin}{differs})", f"  {setting['meaning']}"]
        allowed = f": {setting['allowed']}" if setting["allowed"] else ""
        lines.append(f"  {setting['type']}{allowed}")
        moves = ", ".join(setting["moves"])
        lines.append(f"  a change moves: {moves}" if moves else "  no number of this plan depends on it")
    if number := shown.get("number"):
        lines += [f"{number['name']} = {_text(number['value'])}   (derived, on {shown['ranks']} ranks)"]
        lines.append(f"  {number['meaning']}")
        lines.append(f"  formula: {number['formula']}")
        lines += [f"         = {number['with_numbers']}"] if number["with_numbers"] else []
        lines += [f"  source: {number['source']}"] if number["source"] else []
        lines += [f"  settings that move it: {', '.join(number['moved_by'])}"] if number["moved_by"] else []
        lines += [f"  used by: {', '.join(number['used_by'])}"] if number["used_by"] else []
    if change := shown.get("change"):
        lines += ["", f"with {', '.join(change['settings'])} (on {shown['ranks']} ranks):"]
        rows = [(name, _text(pair["before"]), _text(pair["after"])) for name, pair in change["numbers"].items()]
        table = text_table([("number", "before", "after"), *rows], right=(1, 2))
        lines += [f"  {line}" for line in table] if rows else ["  no number of the plan moves"]
    return "\n".join([*lines, *shown["notes"]])


def _text(value: object) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return json.dumps(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
