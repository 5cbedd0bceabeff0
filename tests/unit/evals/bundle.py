"""A small CORE bundle of a few generated lines, short enough for models of 64 bytes."""

import json
import zipfile
from pathlib import Path

import yaml

from megachat.evals.core_bundle import CORE_TASKS

# label -> (kind, shots, delimiter, baseline in percent); one of each kind is enough for most tests
THREE = {
    "arc_easy": ("multiple_choice", 1, "\nA: ", 50),
    "winograd": ("schema", 0, None, 50),
    "lambada_openai": ("language_modeling", 1, None, 0),
}
ALL = {label: THREE[list(THREE)[number % 3]] for number, label in enumerate(CORE_TASKS)}
_THINGS = "boat town river bread song rain bank wine".split()


def examples(kind: str, count: int) -> list[dict]:
    pairs = [(_THINGS[number % 8], _THINGS[(3 * number + 1) % 8]) for number in range(count)]
    if kind == "multiple_choice":
        return [
            {"query": f"Q: a {one}?", "choices": [f"{one} {number}", other], "gold": number % 2}
            for number, (one, other) in enumerate(pairs)
        ]
    if kind == "schema":
        return [
            {"context_options": [f"the {one} {number}", f"a {other}"], "continuation": "is old", "gold": number % 2}
            for number, (one, other) in enumerate(pairs)
        ]
    return [{"context": f"{number} {one} ", "continuation": other} for number, (one, other) in enumerate(pairs)]


def write_bundle(folder: Path, tasks: dict = THREE, count: int = 6) -> Path:
    """Writes a bundle folder with the given tasks and `count` examples each."""
    listed, rows = [], ["Eval Task,Task Type,#shots,Random baseline"]
    for label, (kind, shots, delimiter, baseline) in tasks.items():
        file = folder / "eval_data" / kind / f"{label}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(example) + "\n" for example in examples(kind, count)))
        entry = {"label": label, "dataset_uri": f"{kind}/{label}.jsonl", "num_fewshot": [shots], "icl_task_type": kind}
        listed.append(entry | ({"continuation_delimiter": delimiter} if delimiter else {}))
        rows.append(f"{label},{kind},{shots},{baseline}")
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": listed}, sort_keys=False))
    (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n")
    return folder


def zipped(folder: Path, path: Path, inside: str = "eval_bundle", compression: int = zipfile.ZIP_STORED) -> Path:
    """Writes the folder into a zip file under the name `inside`."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, Path(inside) / file.relative_to(folder))
    return path
