"""What a checkpoint is, in figures and words, and whether it is good."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from megachat.checkpoint.facts import FACTS_NAME, find_file_problems, read_facts
from megachat.checkpoint.storage import INDEX_NAME, read_index
from megachat.convert.architecture import tensor_problems
from megachat.convert.formats import open_checkpoint
from megachat.convert.opened import Opened, load_arrays, open_megachat, step_folder_of
from megachat.data.loader_state import combined_ledger
from megachat.errors import UserError


def inspect(opened: Opened) -> dict:
    """JSON values: form, facts, tensors with shape and dtype, files, and the ledger of each packing stream."""
    tensors = {name: {"shape": list(entry.shape), "dtype": entry.dtype} for name, entry in opened.entries.items()}
    elements = sum(entry.elements for name, entry in opened.entries.items() if name.startswith("model/"))
    summary = {
        "form": opened.form,
        "folder": str(opened.folder),
        "parameters": elements,
        "bytes": sum(e.bytes for e in opened.entries.values()),
    }
    told = {"facts": opened.facts, "files": list(opened.files), "ledger": ledgers(opened), "tensors": tensors}
    return summary | {"remarks": list(opened.remarks)} | told


def ledgers(opened: Opened) -> dict:
    """{"combined": hex, "streams": {stream: {"ledger": hex, "rows": n, "next_document": n}}}; empty where no loader state is kept."""
    streams = {}
    for name in opened.files:
        if name.startswith("loader/stream_") and name.endswith(".npz"):
            saved = load_arrays(opened.folder / name)
            counters = saved["counters"].tolist()
            streams[int(name[-9:-4])] = {
                "ledger": saved["ledger"].tobytes().hex(),
                "rows": counters[2],
                "next_document": counters[0],
            }
    combined = combined_ledger({stream: entry["ledger"] for stream, entry in streams.items()})
    return {"combined": combined, "streams": streams} if streams else {}


def describe(told: dict) -> str:
    """`inspect`'s values as text."""
    facts, lines = (
        told["facts"],
        [
            f"{told['folder']}: {told['form']}, {told['parameters']:,} parameters, {told['bytes'] / 1e6:,.1f} MB of tensors"
        ],
    )
    for key in (
        "step",
        "format_version",
        "architecture_version",
        "layout",
        "model",
        "tokenizer",
        "loop",
        "adamw_steps",
        "loss_scaler",
        "config",
    ):
        if key in facts:
            lines.append(f"  {key}: {facts[key] if not isinstance(facts[key], dict) else json.dumps(facts[key])}")
    lines += [f"  remark: {remark}" for remark in told["remarks"]]
    for stream, entry in sorted(told["ledger"].get("streams", {}).items()):
        lines.append(
            f"  ledger of stream {stream}: {entry['ledger']} ({entry['rows']:,} rows, next document {entry['next_document']:,})"
        )
    if told["ledger"]:
        lines.append(f"  ledger of all streams: {told['ledger']['combined']}")
    hashes = facts.get("files", {}) if told["form"] in ("megachat", "safetensors") else {}
    for name in told["files"]:
        entry = hashes.get(name, {})
        lines.append(
            f"  file {name}" + (f": {entry['bytes']:,} bytes, SHA-256 {entry['sha256'] or 'not kept'}" if entry else "")
        )
    width = max(map(len, told["tensors"]), default=0)
    lines += [f"  {name:{width}} {entry['dtype']:8} {entry['shape']}" for name, entry in told["tensors"].items()]
    return "\n".join(lines)


def verify(path: Path) -> tuple[str, list[str]]:
    """(what was checked, every problem in words): files and their hashes, that each tensor is covered once, that nothing is missing.

    path: as for `open_checkpoint`. Raises UserError when it is no checkpoint of any format.
    """
    path = step_folder_of(Path(path))
    if not (path / FACTS_NAME).is_file():
        opened = open_checkpoint(path)
        return _told(opened.form, opened.files, opened.entries), _saved_hashes(opened) + tensor_problems(opened)
    try:
        facts = read_facts(path)
    except UserError as error:
        problems = _problems_of_damaged(path)
        return f"{path.name}: its files", problems if problems else [str(error)]
    problems = find_file_problems(path, facts)
    if not any(problem.startswith(INDEX_NAME) for problem in problems):
        opened = open_megachat(path)
        problems += _coverage_problems(path, facts) + tensor_problems(opened)
        if not problems and facts.get("ledger") not in (None, ledgers(opened).get("combined")):
            problems.append(f"loader tells of other documents than the ledger in {FACTS_NAME}")
        return _told(path.name, facts["files"], opened.entries), problems
    return _told(path.name, facts["files"], ()), problems


def _told(name: str, files, entries) -> str:
    return f"{name}: {len(files)} files, {len(entries)} tensors"


def _saved_hashes(opened: Opened) -> list[str]:
    return find_file_problems(opened.folder, opened.facts) if opened.form == "safetensors" else []


def _problems_of_damaged(path: Path) -> list[str]:
    """Every bad file of a checkpoint whose facts are refused, as far as its list of files can still be read."""
    try:
        facts = json.loads((path / FACTS_NAME).read_text(encoding="utf-8"))
        files = {
            name: entry if isinstance(entry, dict) else {"bytes": int(entry), "sha256": None}
            for name, entry in facts["files"].items()
        }
        return find_file_problems(path, {"files": files})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _coverage_problems(path: Path, facts: dict) -> list[str]:
    """Elements of a tensor that no piece holds, or two do; pieces outside their file."""
    problems = []
    for name, entry in read_index(path).items():
        boxes = [(piece["offset"], piece["size"]) for piece in entry["pieces"]]
        held = sum(math.prod(size) for _, size in boxes)
        if held != math.prod(entry["shape"]):
            problems.append(f"{name} has {held:,} of its {math.prod(entry['shape']):,} elements in its pieces")
        outside = any(
            o < 0 or o + s > whole
            for offset, size in boxes
            for o, s, whole in zip(offset, size, entry["shape"], strict=True)
        )
        if outside or _overlap(boxes):
            problems.append(f"{name} has pieces that overlap or lie outside it")
        for piece in entry["pieces"]:
            if piece["at"] + piece["bytes"] > facts["files"].get(piece["file"], {"bytes": -1})["bytes"]:
                problems.append(f"{name} has a piece outside the file {piece['file']}")
    return problems


def _overlap(boxes: Iterable[tuple[list[int], list[int]]]) -> bool:
    """True when two boxes share an element; each is compared with those that begin before it ends along dim 0."""
    ordered = sorted(boxes)
    for index, (offset, size) in enumerate(ordered):
        for other, other_size in ordered[index + 1 :]:
            if offset and other[0] >= offset[0] + size[0]:
                break
            if all(a < b + t and b < a + s for a, s, b, t in zip(offset, size, other, other_size, strict=True)):
                return True
    return False
