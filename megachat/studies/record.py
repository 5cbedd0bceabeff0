"""A record of the speedrun: runs of one recipe with time, CORE, bits per byte, and the evidence for each number.

The clock is the leaderboard's (https://github.com/karpathy/nanochat): training steps after step 10; evaluation,
sampling and saving do not count.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megachat.config import Config
from megachat.errors import UserError
from megachat.evals.comparison import compare_with_gpt2, mean_of_tasks, stamp_of
from megachat.evals.core_bundle import CORE_TASKS, Bundle
from megachat.evals.results import core_command, load_results, newest_results
from megachat.planning.step_time import UNTIMED_STEPS
from megachat.studies.runs import RunRecord, flat_config, given_twice, read_starts, resumed_with

# Settings that change neither the result nor what is timed: names, places, logs, saving, evaluations during training.
_FREE_SECTIONS = ("run.", "log.", "checkpoint.", "evaluate.")
_FREE_KEYS = ("data.folder", "data.tokenizer", "data.tokenizer_threads", "data.prefetch_steps", "data.resume")
# Of nanochat's validation.
_NANOCHAT_ROWS = {"tokens": 80 * 2**19, "sequence_len": 2048, "streams": 8, "buffer_documents": 1000}
_HASH = re.compile("[0-9a-f]{40,64}")
_SHARD = re.compile(r"shard_(\d+)\.parquet")
# What must be the same in all runs of a record -> what it is called.
_EQUAL = {
    "tokenizer_fingerprint": "tokenizer",
    "recipe": "recipe",
    "shards": "shards",
    "validation_rows": "validation rows",
    "hardware": "hardware",
    "world": "number of ranks",
    "commit": "commit",
    "bundle_digest": "CORE bundle",
    "harness": "harness version",
}


def build_record(runs: Sequence[RunRecord], *, draft: bool = False) -> dict[str, Any]:
    """Returns the record of the runs as JSON values.

    Raises UserError with one sentence for each piece of evidence that is missing, or that differs between the runs.
    draft: these sentences are `problems` of the values instead, if time, bits per byte and an evaluation of CORE's
    tasks are there.
    """
    twice = [f"{folder} is given twice: give each run once" for folder in given_twice([run.folder for run in runs])]
    problems, gathered = list(twice), []
    for run in runs:
        evidence, missing = gather_evidence(run)
        gathered.append(evidence)
        problems += missing
    problems += [] if twice else _unequal_facts(gathered)
    if problems and (not draft or twice or not all(map(_has_numbers, gathered))):
        raise UserError("\n".join(problems))
    side = [(Path(one["core_file"]), load_results(Path(one["core_file"]))) for one in gathered]
    core = mean_of_tasks(side) if problems else compare_with_gpt2(side)
    return {
        "problems": problems,
        "runs": gathered,
        "minutes": _mean_and_deviation([one["minutes"] for one in gathered]),
        "gpu_hours": _mean_and_deviation([one["gpu_hours"] for one in gathered]),
        "bpb": _mean_and_deviation([one["bpb"] for one in gathered]),
        "core": {**_mean_and_deviation([one["core"] for one in gathered]), **core},
    }


def _has_numbers(evidence: Mapping[str, Any]) -> bool:
    """Returns whether a draft can show the run."""
    return all(evidence.get(key) for key in ("minutes", "core_file", "world", "tokenizer_fingerprint", "shards"))


def _mean_and_deviation(values: list[float]) -> dict[str, Any]:
    """Returns the mean, and the deviation from run to run, None for one run."""
    return {
        "mean": statistics.fmean(values),
        "run_deviation": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def gather_evidence(run: RunRecord) -> tuple[dict[str, Any], list[str]]:
    """Returns the evidence of a run as JSON values, and one sentence for each piece that is missing."""
    parts = [_training(run), _start(run), _tokenizer_evidence(run), _shards(run), _core_evidence(run)]
    evidence: dict[str, Any] = {"run": str(run.folder), "recipe": recipe_of(run.config), "seed": _config(run).run.seed}
    problems = []
    for values, missing in parts:
        evidence |= values
        problems += [f"{run.folder}: {text}" for text in missing]
    if _has_numbers(evidence):
        evidence["gpu_hours"] = evidence["minutes"] / 60 * evidence["world"]
    core = evidence.get("core_tokenizer")
    if core and core != evidence.get("tokenizer_fingerprint", core):
        problems.append(f"{run.folder}: CORE was evaluated with another tokenizer ({core[:12]}): evaluate again")
    return evidence, problems


def _config(run: RunRecord) -> Config:
    return Config.model_validate_json(json.dumps(run.config))


def recipe_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings on which a result depends. config: those that differ from the defaults, by section."""
    flat = flat_config(config)
    return {key: value for key, value in flat.items() if not key.startswith(_FREE_SECTIONS) and key not in _FREE_KEYS}


def _training(run: RunRecord) -> tuple[dict[str, Any], list[str]]:
    """Returns the clock's minutes, bits per byte and the size of the training."""
    plan, steps = run.plan, run.plan.get("steps")
    if steps is None:
        return {}, ["plan.json has no number of steps: the run folder is damaged"]
    if run.step < steps:
        return {}, [f"it has done {run.step} of {steps} steps: finish it with {resumed_with(run.folder)}"]
    if problem := horizon_problem(steps):
        return {}, [f"it {problem}"]
    last = [line for line in run.lines if line["step"] == steps and "val/bpb" in line]
    if not last or "total_training_time" not in last[-1]:
        again = resumed_with(run.folder)
        return {}, [f"metrics.jsonl has no validation at the last step: resume it with {again}, which runs it"]
    dims, tokens = plan["dims"], plan["evaluation_rows"] * plan["dims"]["sequence_len"]
    data = _config(run).data
    rows = {"tokens": tokens, "sequence_len": dims["sequence_len"]}
    rows |= {"streams": data.streams, "buffer_documents": data.buffer_documents}
    return {
        "minutes": last[-1]["total_training_time"] / 60,
        "bpb": last[-1]["val/bpb"],
        "validation_rows": plan["evaluation_rows"],
        "row_differences": {key: [rows[key], value] for key, value in _NANOCHAT_ROWS.items() if rows[key] != value},
        "depth": dims["depth"],
        "steps": steps,
        "tokens": plan["total_tokens"],
        "flops": plan["total_flops"],
        "parameters": plan["parameters"]["total"],
        "skipped_steps": sum(run.values("train/skipped")),
    }, []


def horizon_problem(steps: int) -> str | None:
    """Returns why a record cannot have a time of so many steps, or None."""
    if steps > UNTIMED_STEPS:
        return None
    return f"has {steps} steps, and the clock counts those after the first {UNTIMED_STEPS}: train longer"


def _start(run: RunRecord) -> tuple[dict[str, Any], list[str]]:
    """Returns code and hardware, from the records of all starts."""
    starts = read_starts(run.folder)
    if not starts:
        return {}, ["environment.json has no record of a start: without it, code and hardware are not known"]
    last, problems = starts[-1], []
    launch = last.get("launch", {})
    world, local = launch.get("world_size"), launch.get("local_size")
    if not last.get("commit"):
        problems.append("environment.json has no commit: train from a clone with git")
    if not last.get("device") or not world:
        problems.append("environment.json has no device or number of ranks: it was written by an older version")
    for key in ("commit", "device"):
        if len({start.get(key) for start in starts}) > 1:
            problems.append(f"it was resumed with another {key} than it was started with: train it again on one")
    if len({start.get("launch", {}).get("world_size") for start in starts}) > 1:
        problems.append("it was resumed on another number of ranks: train it again on one number")
    return {
        "commit": last.get("commit"),
        "uncommitted_changes": any(start.get("uncommitted_changes") for start in starts),
        "hardware": last.get("device"),
        "on_gpus": bool(last.get("device_count")),
        "world": world,
        "nodes": -(-world // local) if world and local else None,
        "layout": run.plan.get("layout"),
        "starts": len(starts),
        "packages": {name: version for name, version in last.get("packages", {}).items() if version},
        "command": last.get("command"),
    }, problems


def _tokenizer_evidence(run: RunRecord) -> tuple[dict[str, Any], list[str]]:
    starts = [start["tokenizer"] for start in _starts_with(run, "tokenizer")]
    if not starts:
        return {}, ["environment.json has no tokenizer hash: it was written by an older version; train again"]
    if len({start["fingerprint"] for start in starts}) > 1:
        return {}, ["it was resumed with another tokenizer: train it again with one"]
    last = starts[-1]
    return {
        "tokenizer_fingerprint": last["fingerprint"],
        "vocab_size": last["vocab_size"],
        "tokenizer_origin": last.get("origin") or {},
    }, []


def _shards(run: RunRecord) -> tuple[dict[str, Any], list[str]]:
    """Returns the shards with their hashes. The last one is for validation."""
    starts = [start["data"] for start in _starts_with(run, "data")]
    if not starts:
        return {}, ["environment.json has no list of shards: it was written by an older version; train again"]
    shards: dict[str, str | None] = starts[-1]["shards"]
    problems = []
    if any(start["shards"] != shards for start in starts):
        problems.append("it was resumed with other shards: train it again with one data folder")
    problems += [f"{problem}, and train again" for problem in shard_problems(shards)]
    return {"shards": shards, "source": starts[-1].get("source")}, problems


def shard_problems(shards: Mapping[str, str | None]) -> list[str]:
    """Returns one sentence for each reason for which a record does not accept the shards of a data folder.

    shards: name -> SHA-256, None if it is unknown, as data.shards.shard_hashes returns them.
    """
    problems = []
    if unknown := [name for name, digest in shards.items() if not digest]:
        problems.append(
            f"{len(unknown)} of its shards have no hash (the first is {unknown[0]}): prepare the folder with "
            "`megachat data`, which writes a manifest"
        )
    numbers = [int(match[1]) for name in list(shards)[:-1] if (match := _SHARD.fullmatch(name))]
    if gaps := sorted(set(range(numbers[0], numbers[-1])) - set(numbers)) if numbers else []:
        problems.append(
            f"shard_{gaps[0]:05d}.parquet is missing in the middle of its training shards, {numbers[0]} to "
            f"{numbers[-1]}, so that others cannot repeat the run: prepare the folder again"
        )
    return problems


def _starts_with(run: RunRecord, key: str) -> list[Mapping[str, Any]]:
    return [start for start in read_starts(run.folder) if start.get(key)]


def core_problems(run: RunRecord) -> list[str]:
    """Returns one sentence for each reason for which a record does not accept the run's newest CORE."""
    return _core_evidence(run)[1]


def has_partial_core(run: RunRecord, max_per_task: int, digest: str) -> bool:
    """Returns whether the run's newest evaluation is that of a draft: of the last step, with so many examples per task
    (-1: all), of the bundle with this digest.
    """
    values, _ = _core_evidence(run)
    of_draft = {"core_step": run.plan.get("steps"), "core_limit": max_per_task, "bundle_digest": digest}
    return all(values.get(key) == value for key, value in of_draft.items())


def bundle_problem(bundle: Bundle) -> str | None:
    """Returns why a record accepts no CORE of a bundle, or None."""
    if not bundle.missing:
        return None
    listed = ", ".join(bundle.missing[:3]) + ", ..." * (len(bundle.missing) > 3)
    return (
        f"{len(bundle.missing)} of CORE's {len(CORE_TASKS)} tasks are missing ({listed}), and a record needs all: "
        "give the full bundle"
    )


def _core_evidence(run: RunRecord) -> tuple[dict[str, Any], list[str]]:
    """Returns CORE of the last step, over all tasks and examples."""
    again = f"run `{core_command(run.folder)}`"
    full = f"run `megachat evaluate --checkpoint {run.folder} --core BUNDLE` with a full bundle"
    try:
        file = newest_results(run.folder)
        results = load_results(file)
    except UserError as error:
        return {}, [f"it {str(error).removeprefix(f'{run.folder} ')}"]
    core, problems = results["core"], []
    again = again if core.get("core_metric") is not None else full  # the run's config may name the partial bundle
    if results["step"] != run.plan.get("steps"):
        problems.append(f"its newest CORE is of step {results['step']}, not of the last step: {again}")
    if core.get("core_metric") is None:
        problems.append(f"{file.name} has not all {len(CORE_TASKS)} tasks of CORE: {full}")
    if not core["whole"]:
        problems.append(f"{file.name} has not all examples of CORE's tasks: {again}")
    if core.get("crop", True):
        problems.append(f"{file.name} has cropped prompts, which nanochat does not do: {again} without --core-crop")
    stamp = {key: stamp_of(results, key) for key in ("harness", "megachat", "bundle_digest", "tokenizer")}
    problems += [
        f"{file.name} has no {key.replace('_', ' ')}, an evaluation of an older version: {again}"
        for key, value in stamp.items()
        if not value
    ]
    values = {
        "core": core["mean_centered"] if core.get("core_metric") is None else core["core_metric"],
        "core_file": str(file),
        "core_deviation": core["deviation"],
        "core_step": results["step"],
        "core_limit": core.get("max_per_task"),
        "core_tasks": len(core["tasks"]),
        "core_examples": sum(task["examples"] for task in core["tasks"].values()),
    }
    return {**values, **stamp, "core_tokenizer": stamp["tokenizer"]}, problems


def _unequal_facts(gathered: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one sentence for each thing that must be equal in all runs and is not."""
    first, problems = gathered[0], []
    for other in gathered[1:]:
        for key, name in _EQUAL.items():
            if None in (first.get(key), other.get(key)):  # which is reported as missing
                continue
            if other[key] != first[key]:
                one, two = (_differing_text(each, key, first, other) for each in (first, other))
                problems.append(
                    f"{first['run']} and {other['run']} differ in {name} ({one}; {two}): a record has "
                    "runs of one recipe, code, data and machine"
                )
        results = [key for key in ("minutes", "bpb", "core") if key in first and key in other]
        if "minutes" in results and all(other[key] == first[key] for key in results):
            problems.append(f"{other['run']} is a copy of {first['run']}: equal to the last digit in time and results")
    return problems


def _differing_text(one: Mapping[str, Any], key: str, first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    value = one[key]
    if isinstance(value, dict):
        keys = [name for name in {**first[key], **other[key]} if first[key].get(name) != other[key].get(name)]
        return ", ".join(f"{name} {short_value(value.get(name))}" for name in keys[:3])
    return short_value(value)


def short_value(value: Any) -> str:
    """Returns a value of the evidence for people: hashes by their first 12 characters."""
    if value is None:
        return "not set"
    return value[:12] if isinstance(value, str) and _HASH.fullmatch(value) else str(value)
