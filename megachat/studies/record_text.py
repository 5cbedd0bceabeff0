"""The text of a record of the speedrun, or of a draft, as Markdown for a pull request."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megachat.evals.core_bundle import CORE_TASKS
from megachat.evals.results import error_text
from megachat.evals.uncertainty import GPT2_CORE
from megachat.planning.step_time import UNTIMED_STEPS
from megachat.studies.record import short_value
from megachat.text import markdown_table, plural


def record_text(record: Mapping[str, Any], name: str) -> str:
    """Returns the record as Markdown for a pull request. name: of the recipe. A draft begins with what it lacks."""
    runs, problems = record["runs"], record["problems"]
    first, core = runs[0], "mean of tasks" if problems else "CORE"  # what must be equal in all runs is read from it
    parts = [
        f"## {'NOT A RECORD, a draft of ' if problems else ''}{name}: {plural(len(runs), 'run')}",
        "\n".join(markdown_table([("", "value"), *_result_rows(record), *_recipe_rows(runs)])),
        "\n".join(markdown_table([("run", "minutes", core, "bpb", "seed", "starts"), *map(_run_cells, runs)])),
    ]
    if problems:
        parts.insert(1, "A record refuses these runs:\n\n" + "\n".join(f"- {text}" for text in problems))
    if len(runs) == 1:
        parts.append("One run has no deviation from run to run: the leaderboard's records have several.")
    shards = "\n".join(f"{digest}  {shard}" for shard, digest in first["shards"].items())
    parts.append(_details("Settings that differ from the defaults", json.dumps(first["recipe"], indent=1)))
    parts.append(_details("Shards (SHA-256)", shards))
    return "\n\n".join(parts)


def _result_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (what, value) of the results: time, hardware, CORE and bits per byte."""
    first = record["runs"][0]
    hosts = f" on {plural(first['nodes'], 'node')}" if first["nodes"] else ""
    layout = " x ".join(f"{axis} {size}" for axis, size in (first["layout"] or {}).items())
    return [
        ("time, minutes", f"{_with_deviation(record['minutes'], 2)}; training steps after step {UNTIMED_STEPS - 1}"),
        ("GPU-hours" if first["on_gpus"] else "rank-hours", _with_deviation(record["gpu_hours"], 2)),
        ("hardware", f"{plural(first['world'], 'rank')}{hosts}, {first['hardware']}; {layout}"),
        *_core_rows(record),
        ("validation bpb", f"{_with_deviation(record['bpb'], 5)}; {_rows_text(first)}"),
    ]


def _core_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns CORE and its verdict; of a draft the mean of the evaluated tasks, without a verdict."""
    runs, first, core = record["runs"], record["runs"][0], record["core"]
    value = f"{core['mean']:.4f} {error_text(core['deviation'], digits=4)}"
    if record["problems"]:
        tasks, examples = first["core_tasks"], first["core_examples"]
        return [(f"mean of {tasks} of CORE's {len(CORE_TASKS)} tasks", f"{value}; {examples:,} examples; not judged")]
    above = sum(value > GPT2_CORE for value in core["values"])
    verdict = f"{core['verdict']['text']}; {above} of {len(runs)} runs above"
    return [("CORE", value), (f"against GPT-2's {GPT2_CORE}", verdict)]


def _recipe_rows(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Returns (what, value) of what was trained, and of the code and data that it was trained with."""
    first, skipped = runs[0], sum(run["skipped_steps"] for run in runs)
    models = [f"depth {r['depth']}, {r['parameters']:,} parameters, vocabulary {r['vocab_size']:,}" for r in runs]
    tokenizers = [f"`{r['tokenizer_fingerprint']}`, {_origin_text(r['tokenizer_origin'])}" for r in runs]
    changed = " with uncommitted changes" if any(run["uncommitted_changes"] for run in runs) else ""
    training = f"{first['steps']:,} steps, {first['tokens']:,} tokens, {first['flops']:.3e} FLOPs; {skipped} skipped"
    return [
        ("model", "; ".join(dict.fromkeys(models))),  # runs of a draft may differ
        ("training", training),
        ("tokenizer", "; ".join(dict.fromkeys(tokenizers))),
        ("CORE bundle", f"`{first['bundle_digest']}`"),
        ("harness", f"version {first['harness']}, {first['megachat']}"),
        ("commit", f"{first['commit']}{changed}"),
        ("packages", ", ".join(f"{package} {version}" for package, version in first["packages"].items())),
        ("shards", f"{len(first['shards'])}, the last one for validation; hashes below"),
    ]


def _run_cells(run: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = (f"{run['minutes']:.2f}", f"{run['core']:.6f}", f"{run['bpb']:.6f}")
    return Path(run["run"]).name, *numbers, str(run["seed"]), str(run["starts"])


def _with_deviation(spread: Mapping[str, Any], digits: int) -> str:
    mean, deviation = f"{spread['mean']:.{digits}f}", spread["run_deviation"]
    return mean if deviation is None else f"{mean} +- {deviation:.{digits}f} (run deviation)"


def _rows_text(run: Mapping[str, Any]) -> str:
    rows, different = f"{run['validation_rows']:,} rows", run["row_differences"]
    if not different:
        return f"{rows}, the leaderboard's"
    listed = ", ".join(f"{key} {value} in place of {wanted}" for key, (value, wanted) in different.items())
    return f"{rows}, not the leaderboard's: {listed}"


def _origin_text(origin: dict[str, Any]) -> str:
    shards = list(origin.get("shards") or ())
    values = origin | ({"shards": f"{shards[0]} to {shards[-1]}"} if shards else {})
    listed = ", ".join(f"{key} {short_value(value)}" for key, value in values.items())
    return listed or "of unknown origin"


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n```\n{text}\n```\n\n</details>"
