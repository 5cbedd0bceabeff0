"""Reads the tasks of the CORE metric from a folder or a zip file, or from a bundle that is downloaded once.

A bundle contains `core.yaml` (label, data file, kind, shots and delimiter of each task), `eval_meta_data.csv` (each
task's random baseline) and `eval_data/` with one JSON object per line. CORE: DCLM, arXiv 2406.11794; the bundle is
nanochat's (https://github.com/karpathy/nanochat).
"""

import contextlib
import csv
import hashlib
import io
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from megachat.errors import UserError, raise_if_unreadable
from megachat.evals.core_download import download_bundle
from megachat.files import lfs_problem, path_kind, refuse_damaged
from megachat.settings import EvaluateConfig
from megachat.text import plural

CORE_TASKS = tuple(
    """
    hellaswag_zeroshot jeopardy bigbench_qa_wikidata arc_easy arc_challenge copa commonsense_qa piqa openbook_qa
    lambada_openai hellaswag winograd winogrande bigbench_dyck_languages agi_eval_lsat_ar bigbench_cs_algorithms
    bigbench_operators bigbench_repeat_copy_logic squad coqa boolq bigbench_language_identification
    """.split()
)
# kind -> (the key of its choices, its text keys)
_TASK_KEYS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "multiple_choice": ("choices", ("query",)),
    "schema": ("context_options", ("continuation",)),
    "language_modeling": (None, ("context", "continuation")),
}
# Far above the files of nanochat's bundle; a small zip file may unpack to any size
_MOST_INDEX_BYTES, _MOST_DATA_BYTES, _MOST_LINE, _MOST_DEPTH = 1 << 18, 1 << 29, 1 << 20, 20
# of damaged or encrypted members and unreadable folders
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, OSError, RuntimeError, ValueError),
)
_FOLDER, _INDEX, _BASELINES, _DATA = "eval_bundle", "core.yaml", "eval_meta_data.csv", "eval_data"
_Folder = Path | zipfile.Path


@dataclass(frozen=True)
class CoreTask:
    """One task. baseline: accuracy of guessing. examples: as parsed, in file order. digest: SHA-256 (hex) of it all."""

    label: str
    kind: str  # "multiple_choice", "schema" or "language_modeling"
    shots: int
    delimiter: str
    baseline: float
    examples: tuple[dict, ...]
    digest: str = ""


@dataclass(frozen=True)
class Bundle:
    """missing: CORE's tasks that the bundle lacks; the mean is then not CORE. digest: SHA-256 (hex) of the tasks."""

    tasks: tuple[CoreTask, ...]
    missing: tuple[str, ...]
    digest: str


def open_bundle(path: str | Path | None, only: Collection[str] | None = None) -> Bundle:
    """Reads the tasks of a folder or a zip file, in order; None downloads nanochat's bundle once.

    only: labels of the tasks to read. Every line of them is checked. Raises UserError that names the file and line that
    are wrong, or an unknown label.
    """
    path = download_bundle() if path is None else Path(path)
    root = _find_root(path)
    try:
        entries, baselines = _read_entries(root), _read_baselines(root / _BASELINES)
        labels = [entry["label"] for entry in entries]
        for label in only or ():
            if label not in labels:
                problem = "is one of CORE's tasks but not in" if label in CORE_TASKS else "is not a task of"
                raise UserError(f"{label} {problem} {path}: it has {', '.join(labels)}")
        tasks = tuple(_read_task(root, entry, baselines) for entry in entries if only is None or entry["label"] in only)
    except _UNREADABLE as error:
        raise_if_unreadable(getattr(error, "filename", None) or path, error)
        raise UserError(f"{path} cannot be read ({error}): get the bundle again") from None
    missing = tuple(label for label in CORE_TASKS if label not in {task.label for task in tasks})
    return Bundle(tasks, missing, hashlib.sha256("".join(task.digest for task in tasks).encode()).hexdigest())


def open_configured_bundle(config: EvaluateConfig) -> Bundle | None:
    """Opens the bundle for CORE during training; None if CORE is off. Raises UserError for invalid settings."""
    if not config.core_every:
        return None
    bundle = open_bundle(config.core_bundle, config.core_tasks)
    check_max_per_task(bundle, configured_examples(config), "evaluate.core_max_per_task")
    return bundle


def configured_examples(config: EvaluateConfig) -> int:
    """Returns the configured number of examples per task, -1 for all."""
    return -1 if config.core_max_per_task is None else config.core_max_per_task


def check_max_per_task(bundle: Bundle, max_per_task: int, option: str) -> None:
    """Raises UserError if so few examples (-1: all) do not suffice: a task's shots are drawn from the others."""
    if max_per_task < 1 and max_per_task != -1:
        raise UserError(f"{option} is {max_per_task}: give 1 or more, or -1 for all")
    for task in bundle.tasks:
        if 0 <= max_per_task <= task.shots:
            raise UserError(
                f"{option} is {max_per_task}, too few for {task.label} with {task.shots} shots: "
                f"give {task.shots + 1} or more"
            )


def describe_bundle(bundle: Bundle) -> str:
    """Returns one line for the log."""
    examples = sum(len(task.examples) for task in bundle.tasks)
    line = f"CORE bundle: {plural(len(bundle.tasks), 'task')}, {examples:,} examples, digest {bundle.digest[:12]}"
    if bundle.missing:
        line += f"; {len(bundle.missing)} of CORE's {len(CORE_TASKS)} tasks are missing, so the mean is not CORE"
    return line


def _find_root(path: Path) -> _Folder:
    """Returns the folder with core.yaml, on disk or in a zip file: the given one, or `eval_bundle` in it."""
    if not path_kind(path):
        raise UserError(
            f"the CORE bundle {path} does not exist: give a folder or zip file with {_INDEX}, or none to download it"
        )
    with refuse_damaged(path, "is neither a folder nor a complete zip file ({}): get the bundle again", *_UNREADABLE):
        root = path if path.is_dir() else zipfile.Path(path)
    for folder in (root, root / _FOLDER):
        if _is_file(folder / _INDEX):
            return folder
    raise UserError(f"{path} has no {_INDEX}: a CORE bundle contains {_INDEX}, {_BASELINES} and {_DATA}/")


def _is_file(file: _Folder) -> bool:
    return path_kind(file) == "file" if isinstance(file, Path) else file.is_file()


@contextlib.contextmanager
def _parsing(file: _Folder, needs: str) -> Iterator[None]:
    """Turns an error while parsing a file into a UserError. needs: what the file must contain."""
    try:
        yield
    except (yaml.YAMLError, csv.Error, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{file} is not {needs} ({reason}): repair it or get the bundle again") from None


def _read_text(file: _Folder, most_bytes: int) -> str:
    if not _is_file(file):
        raise UserError(f"{file} is missing from the CORE bundle: get the bundle again")
    with file.open("rb") as opened:
        content = opened.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise UserError(f"{file} has more than {most_bytes:,} bytes, which no task of CORE needs: get the bundle again")
    if pointer := lfs_problem(content):
        raise UserError(f"{file} {pointer}")
    with _parsing(file, "UTF-8 text"):
        return content.decode("utf-8-sig")  # a byte order mark is not text


def _check_yaml(text: str) -> None:
    """Raises ValueError for a document that takes little space and much memory or time to load."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases, which may stand for gigabytes")
        if depth > _MOST_DEPTH:
            raise ValueError(f"it is nested more than {_MOST_DEPTH} deep")


def _read_entries(root: _Folder) -> list[dict[str, Any]]:
    """Returns the task entries of core.yaml, checked."""
    file = root / _INDEX
    text = _read_text(file, _MOST_INDEX_BYTES)
    with _parsing(file, "YAML with icl_tasks, each with label, dataset_uri, num_fewshot and icl_task_type"):
        _check_yaml(text)
        entries: list[dict[str, Any]] = [
            {
                "label": str(entry["label"]),
                "file": str(entry["dataset_uri"]),
                "kind": str(entry["icl_task_type"]),
                "shots": int(entry["num_fewshot"][0]),  # the metric uses the first of several
                "delimiter": str(entry.get("continuation_delimiter", " ")),
            }
            for entry in yaml.safe_load(text)["icl_tasks"]
        ]
        "".join(str(value) for entry in entries for value in entry.values()).encode()  # half of a surrogate pair fails
    labels = [entry["label"] for entry in entries]
    for entry in entries:
        if labels.count(entry["label"]) > 1:
            raise UserError(f"{file} lists {entry['label']} twice: keep one")
        if entry["kind"] not in _TASK_KEYS:
            raise UserError(
                f"{file}: {entry['label']} has the unknown type {entry['kind']!r}: use one of {', '.join(_TASK_KEYS)}"
            )
        if entry["shots"] < 0:
            raise UserError(f"{file}: {entry['label']} has {entry['shots']} shots: give 0 or more")
    if not entries:
        raise UserError(f"{file} lists no task: get the bundle again")
    return entries


def _read_baselines(file: _Folder) -> dict[str, str]:
    """Returns label -> random baseline in percent, as written."""
    text = _read_text(file, _MOST_INDEX_BYTES)
    with _parsing(file, "CSV with columns `Eval Task` and `Random baseline`"):
        return {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(io.StringIO(text))}


def _read_task(root: _Folder, entry: dict, baselines: dict[str, str]) -> CoreTask:
    label, shots, file, table = entry["label"], entry["shots"], root / _DATA / entry["file"], root / _BASELINES
    if label not in baselines:
        raise UserError(f"{table} has no baseline for {label}: add a row with the accuracy of guessing in percent")
    try:
        baseline = 0.01 * float(baselines[label])
    except (TypeError, ValueError):
        baseline = -1.0
    if not 0 <= baseline < 1:
        raise UserError(
            f"{table}: the baseline of {label} is {baselines[label]!r}: give percent, 0 or more and less than 100"
        )
    _check_inside(root, entry)
    content = _read_text(file, _MOST_DATA_BYTES)
    lines = content.removesuffix("\n").split("\n")
    examples = tuple(_parse_example(line, f"{file} line {n}", entry["kind"]) for n, line in enumerate(lines, 1))
    if len(examples) <= shots:
        raise UserError(f"{file} has {len(examples)} examples, too few for {shots} shots and a question: add more")
    settings = json.dumps([label, entry["kind"], shots, entry["delimiter"], baseline])
    digest = hashlib.sha256((settings + hashlib.sha256(content.encode()).hexdigest()).encode()).hexdigest()
    return CoreTask(label, entry["kind"], shots, entry["delimiter"], baseline, examples, digest)


def _check_inside(root: _Folder, entry: dict) -> None:
    """Raises UserError if a task's data file lies outside of the bundle, by its path or through a symbolic link."""
    path = PurePosixPath(entry["file"])
    inside = not path.is_absolute() and ".." not in path.parts
    if inside and isinstance(root, Path):
        inside = (root / _DATA / path).resolve().is_relative_to(root.resolve())
    if not inside:
        raise UserError(
            f"{root / _INDEX}: the dataset_uri {entry['file']} of {entry['label']} lies outside of the bundle: "
            f"put the file into {_DATA}/"
        )


def _parse_example(line: str, where: str, kind: str) -> dict:
    """Parses one line of a task's data and checks that it has what its kind needs."""
    fix = "repair it or get the bundle again"
    if len(line) > _MOST_LINE:
        raise UserError(f"{where} has {len(line):,} characters, more than {_MOST_LINE:,}: {fix}")
    try:
        example = json.loads(line)
        if "\\u" in line:
            json.dumps(example, ensure_ascii=False).encode()  # half of a surrogate pair, which is no text, fails
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg} at column {error.colno}): {fix}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read ({error}): {fix}") from None
    if not isinstance(example, dict):
        raise UserError(f"{where} is not a JSON object: {fix}")
    choices, text_keys = _TASK_KEYS[kind]
    for key in text_keys:
        if not isinstance(example.get(key), str):
            raise UserError(f"{where} has no text `{key}`, which a {kind} task needs: {fix}")
    if choices:
        options, gold = example.get(choices), example.get("gold")
        if not (isinstance(options, list) and len(options) > 1 and all(isinstance(option, str) for option in options)):
            raise UserError(f"{where} has fewer than two texts in `{choices}`, which a {kind} task needs: {fix}")
        if type(gold) is not int or not 0 <= gold < len(options):
            raise UserError(f"{where} has `gold` {gold!r}: give the index of one of its {len(options)} `{choices}`")
    return example
