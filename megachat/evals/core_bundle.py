"""The tasks of the CORE metric: from a folder, a zip, or downloaded once.

A bundle holds `core.yaml` (label, data file, kind, shots and delimiter of each task), `eval_meta_data.csv` (each task's random baseline) and
`eval_data/`, one JSON object a line. CORE: DCLM, arXiv 2406.11794; the bundle is nanochat's (https://github.com/karpathy/nanochat).
"""

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from megachat.config import EvaluateConfig
from megachat.errors import UserError
from megachat.evals.core_download import download_bundle

CORE_TASKS = (
    "hellaswag_zeroshot",
    "jeopardy",
    "bigbench_qa_wikidata",
    "arc_easy",
    "arc_challenge",
    "copa",
    "commonsense_qa",
    "piqa",
    "openbook_qa",
    "lambada_openai",
    "hellaswag",
    "winograd",
    "winogrande",
    "bigbench_dyck_languages",
    "agi_eval_lsat_ar",
    "bigbench_cs_algorithms",
    "bigbench_operators",
    "bigbench_repeat_copy_logic",
    "squad",
    "coqa",
    "boolq",
    "bigbench_language_identification",
)
# kind -> (its choices' key, its other keys)
_KINDS = {
    "multiple_choice": ("choices", ("query",)),
    "schema": ("context_options", ("continuation",)),
    "language_modeling": (None, ("context", "continuation")),
}
_FOLDER, _INDEX, _BASELINES, _DATA = "eval_bundle", "core.yaml", "eval_meta_data.csv", "eval_data"


@dataclass(frozen=True)
class Task:
    """One task. baseline: the accuracy of guessing, a fraction. examples: as parsed, in the file's order. digest: SHA-256 (hex) of all of it."""

    label: str
    kind: str  # "multiple_choice", "schema" or "language_modeling"
    shots: int
    delimiter: str
    baseline: float
    examples: tuple[dict, ...]
    digest: str = ""


@dataclass(frozen=True)
class Bundle:
    """missing: those of CORE_TASKS that are not among the tasks; without them a mean is not CORE. digest: SHA-256 (hex) of tasks and examples."""

    tasks: tuple[Task, ...]
    missing: tuple[str, ...]
    digest: str


def open_bundle(
    path: str | Path | None, only: Collection[str] | None = None, *, say: Callable[[str], None] = print
) -> Bundle:
    """The tasks of a bundle, in its order: a folder, a zip, or None for the one that is downloaded once. only: labels of the tasks to take.

    Every line of every task taken is read and checked. Raises UserError naming the file, and the line, that is wrong; for a label that is unknown.
    """
    path = download_bundle(say) if path is None else Path(path)
    root = _root(path)
    try:
        listed, baselines = _listed(root), _baselines(root / _BASELINES)
        labels = [entry["label"] for entry in listed]
        for label in only or ():
            if label not in labels:
                known = "is one of CORE's tasks but not in" if label in CORE_TASKS else "is no task of"
                raise UserError(f"{label} {known} {path}: it has {', '.join(labels)}")
        tasks = tuple(_task(root, entry, baselines) for entry in listed if only is None or entry["label"] in only)
    except (zipfile.BadZipFile, EOFError, OSError) as error:  # of a member, or of a folder that cannot be read
        raise UserError(f"{path} cannot be read ({error}): get the bundle again") from None
    labels = {task.label for task in tasks}
    digest = hashlib.sha256("".join(task.digest for task in tasks).encode()).hexdigest()
    return Bundle(tasks, tuple(label for label in CORE_TASKS if label not in labels), digest)


def check_max_per_task(bundle: Bundle, max_per_task: int, option: str) -> None:
    """Raise UserError when so few examples leave none to ask after a task's shots, which are drawn from them; -1: all examples."""
    if max_per_task < 1 and max_per_task != -1:
        raise UserError(f"{option} is {max_per_task}: give 1 or more, or -1 for all")
    for task in bundle.tasks:
        if 0 <= max_per_task <= task.shots:
            raise UserError(
                f"{option} is {max_per_task}, too few for {task.label} with {task.shots} shots: give {task.shots + 1} or more"
            )


def open_configured_bundle(asked: EvaluateConfig) -> Bundle | None:
    """The bundle for CORE during training; None when it is off. Raises UserError for all that is wrong with it."""
    if not asked.core_every:
        return None
    bundle = open_bundle(asked.core_bundle, asked.core_tasks)
    check_max_per_task(bundle, asked.core_max_per_task, "evaluate.core_max_per_task")
    return bundle


def describe_bundle(bundle: Bundle) -> str:
    """One line for the log."""
    examples = sum(len(task.examples) for task in bundle.tasks)
    what = f"CORE bundle: {len(bundle.tasks)} tasks, {examples:,} examples, digest {bundle.digest[:12]}"
    return what + (
        f"; {len(bundle.missing)} of CORE's {len(CORE_TASKS)} tasks are missing, so their mean is not CORE"
        if bundle.missing
        else ""
    )


def _root(path: Path) -> Path | zipfile.Path:
    """The folder with core.yaml: the one given, or `eval_bundle` in it, in a zip too."""
    if not path.exists():
        raise UserError(
            f"the CORE bundle {path} does not exist: give a folder or zip with {_INDEX}, or none to download it"
        )
    try:
        root = path if path.is_dir() else zipfile.Path(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is neither a folder nor a whole zip ({error}): get the bundle again") from None
    for folder in (root, root / _FOLDER):
        if (folder / _INDEX).is_file():
            return folder
    raise UserError(f"{path} has no {_INDEX}: it is no CORE bundle, which holds {_INDEX}, {_BASELINES} and {_DATA}/")


def _text(file: Path | zipfile.Path) -> str:
    if not file.is_file():
        raise UserError(f"{file} is missing from the CORE bundle: get the bundle again")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start:,}): get the bundle again"
        ) from None


def _listed(root: Path | zipfile.Path) -> list[dict]:
    """core.yaml's tasks, each with the values that it needs."""
    file = root / _INDEX
    try:
        listed = yaml.safe_load(_text(file))["icl_tasks"]
        listed = [
            {
                "label": str(entry["label"]),
                "file": str(entry["dataset_uri"]),
                "kind": str(entry["icl_task_type"]),
                "shots": int(entry["num_fewshot"][0]),  # where several are listed the metric takes the first
                "delimiter": str(entry.get("continuation_delimiter", " ")),
            }
            for entry in listed
        ]
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML ({' '.join(str(error).split())}): get the bundle again") from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{file} is no list of tasks ({type(error).__name__}: {error}): icl_tasks has of each its label, dataset_uri, num_fewshot, icl_task_type"
        ) from None
    labels = [entry["label"] for entry in listed]
    for entry in listed:
        if labels.count(entry["label"]) > 1:
            raise UserError(f"{file} lists {entry['label']} twice: keep one")
        if entry["kind"] not in _KINDS:
            raise UserError(
                f"{file}: {entry['label']} is of the unknown type {entry['kind']!r}: it can be {', '.join(_KINDS)}"
            )
        if entry["shots"] < 0:
            raise UserError(f"{file}: {entry['label']} has {entry['shots']} shots: give 0 or more")
    if not listed:
        raise UserError(f"{file} lists no task: get the bundle again")
    return listed


def _baselines(file: Path | zipfile.Path) -> dict[str, str]:
    """Task -> its random baseline in percent, as written."""
    try:
        rows = list(csv.DictReader(io.StringIO(_text(file))))
        return {row["Eval Task"]: row["Random baseline"] for row in rows}
    except (KeyError, csv.Error) as error:
        raise UserError(
            f"{file} has no columns `Eval Task` and `Random baseline` ({error}): get the bundle again"
        ) from None


def _task(root: Path | zipfile.Path, entry: dict, baselines: dict[str, str]) -> Task:
    label, file, table = entry["label"], root / _DATA / entry["file"], root / _BASELINES
    if label not in baselines:
        raise UserError(f"{table} has no baseline for {label}: add its row, with the accuracy of guessing in percent")
    try:
        baseline = 0.01 * float(baselines[label])
        if not 0 <= baseline < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"{table}: the baseline of {label} is {baselines[label]!r}: give percent, 0 or more and less than 100"
        ) from None
    content = _text(file)
    examples = tuple(
        _example(line, number, file, entry["kind"])
        for number, line in enumerate(content.removesuffix("\n").split("\n"), 1)
    )
    if len(examples) <= entry["shots"]:
        raise UserError(
            f"{file} has {len(examples)} examples, too few for {entry['shots']} shots and a question: add more"
        )
    task = Task(label, entry["kind"], entry["shots"], entry["delimiter"], baseline, examples)
    facts = (
        json.dumps([task.label, task.kind, task.shots, task.delimiter, task.baseline])
        + hashlib.sha256(content.encode()).hexdigest()
    )
    return replace(task, digest=hashlib.sha256(facts.encode()).hexdigest())


def _example(line: str, number: int, file: Path | zipfile.Path, kind: str) -> dict:
    """One line of a task's data, with all that its kind needs."""
    where = f"{file} line {number}"
    try:
        example = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error.msg} at column {error.colno}): repair it or get the bundle again"
        ) from None
    if not isinstance(example, dict):
        raise UserError(f"{where} is not a JSON object: repair it or get the bundle again")
    choices, texts = _KINDS[kind]
    for key in texts:
        if not isinstance(example.get(key), str):
            raise UserError(
                f"{where} has no text `{key}`, which a {kind} task needs: repair it or get the bundle again"
            )
    if choices:
        options, gold = example.get(choices), example.get("gold")
        if not (isinstance(options, list) and len(options) > 1 and all(isinstance(option, str) for option in options)):
            raise UserError(
                f"{where} has no two texts or more in `{choices}`, which a {kind} task needs: repair it or get the bundle again"
            )
        if type(gold) is not int or not 0 <= gold < len(options):
            raise UserError(
                f"{where} has `gold` {gold!r}, which is none of its {len(options)} `{choices}`, counted from 0: repair it"
            )
    return example
