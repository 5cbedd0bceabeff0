"""What a checkpoint contains, in figures and words, and whether it is intact."""

import json
from collections import Counter
from pathlib import Path

from megachat.checkpoint.facts import FACTS_NAME, find_file_problems, read_facts
from megachat.checkpoint.index import INDEX_NAME, index_problems
from megachat.convert.architecture import tensor_problems, value_problems
from megachat.convert.formats import open_checkpoint
from megachat.convert.megachat import find_step_folder, open_megachat
from megachat.convert.reader import CheckpointReader, load_arrays
from megachat.data.loader_state import combined_ledger
from megachat.errors import UnreadableError, UserError
from megachat.files import LOADER
from megachat.text import text_table

_SHOWN_FACTS = (
    "step format_version architecture_version layout model tokenizer loop adamw_steps loss_scaler config".split()
)


def inspect_checkpoint(checkpoint: CheckpointReader) -> dict:
    """Returns JSON values: format, facts, tensors with shape and dtype, files, and the packing streams' ledgers."""
    entries = checkpoint.entries
    return {
        "form": checkpoint.format,
        "folder": str(checkpoint.folder),
        "parameters": sum(entry.elements for name, entry in entries.items() if name.startswith("model/")),
        "bytes": sum(entry.bytes for entry in entries.values()),
        "remarks": list(checkpoint.remarks),
        "facts": checkpoint.facts,
        "files": list(checkpoint.files),
        "ledger": read_ledgers(checkpoint),
        "tensors": {name: {"shape": list(entry.shape), "dtype": entry.dtype} for name, entry in entries.items()},
    }


def read_ledgers(checkpoint: CheckpointReader) -> dict:
    """Returns {"combined": hex, "streams": {stream: {"ledger": hex, "rows": n, "next_document": n}}}, or {} without
    loader state."""
    streams = {}
    for name in checkpoint.files:
        if name.startswith(f"{LOADER}/stream_") and name.endswith(".npz"):
            arrays = load_arrays(checkpoint.folder / name)
            if not {"counters", "ledger"} <= arrays.keys() or arrays["counters"].shape != (5,):
                raise UserError(f"{checkpoint.folder / name} has no counters or ledger: use another checkpoint")
            next_document, _, rows, *_ = arrays["counters"].tolist()
            ledger = arrays["ledger"].tobytes().hex()
            streams[int(name[-9:-4])] = {"ledger": ledger, "rows": rows, "next_document": next_document}
    combined = combined_ledger({stream: entry["ledger"] for stream, entry in streams.items()})
    return {"combined": combined, "streams": streams} if streams else {}


def format_summary(values: dict) -> str:
    """Returns the values of `inspect_checkpoint` in a few lines; what a format does not have is left out."""
    facts, ledger = values["facts"], values["ledger"]
    counts = Counter(name.partition("/")[0] for name in values["tensors"])
    model, loop, layout = facts.get("model", {}), facts.get("loop", {}), facts.get("layout", {})
    rows = [("parameters", f"{values['parameters']:,}")]
    if {"depth", "width", "sequence_len"} <= model.keys():
        rows.append(
            ("model", f"depth {model['depth']}, width {model['width']}, rows of {model['sequence_len']} tokens")
        )
    if tokenizer := facts.get("tokenizer"):
        rows.append(("tokenizer", f"{tokenizer['vocab_size']:,} tokens, fingerprint {tokenizer['fingerprint'][:12]}"))
    if "step" in facts:
        best = f", best validation bpb before {loop['min_val_bpb']:.4f}" if loop.get("min_val_bpb") else ""
        rows.append(("trained", f"{facts['step']:,} steps{best}"))
    if layout:
        rows.append(("saved by", " x ".join(f"{axis} {size}" for axis, size in layout.items())))
    rows.append(("tensors", ", ".join(f"{count} {kind}" for kind, count in counts.items())))
    if ledger:
        read = sum(entry["rows"] for entry in ledger["streams"].values())
        rows.append(("documents", f"{len(ledger['streams'])} streams, {read:,} rows packed, {ledger['combined'][:12]}"))
    rows += [("remark", remark) for remark in values["remarks"]]
    size = f"{len(values['files'])} files, {values['bytes'] / 1e6:,.1f} MB of tensors"
    heading = f"{values['folder']}: {values['form']}, {size}"
    return "\n".join([heading, *text_table([(f"  {label}", text) for label, text in rows])])


def format_details(values: dict) -> str:
    """Returns all values of `inspect_checkpoint` as text, below those of `format_summary`."""
    facts, ledger, lines = values["facts"], values["ledger"], list[str]()
    for key in _SHOWN_FACTS:
        if key in facts:
            lines.append(f"  {key}: {json.dumps(facts[key]) if isinstance(facts[key], dict) else facts[key]}")
    for stream, entry in sorted(ledger.get("streams", {}).items()):
        position = f"{entry['rows']:,} rows, next document {entry['next_document']:,}"
        lines.append(f"  ledger of stream {stream}: {entry['ledger']} ({position})")
    if ledger:
        lines.append(f"  ledger of all streams: {ledger['combined']}")
    hashes = facts.get("files", {}) if values["form"] in ("megachat", "safetensors") else {}
    for name in values["files"]:
        entry = hashes.get(name)
        content = f": {entry['bytes']:,} bytes, SHA-256 {entry['sha256'] or 'not recorded'}" if entry else ""
        lines.append(f"  file {name}{content}")
    width = max(map(len, values["tensors"]), default=0)
    lines += [f"  {name:{width}} {entry['dtype']:8} {entry['shape']}" for name, entry in values["tensors"].items()]
    return "\n".join(lines)


def verify_checkpoint(path: Path) -> tuple[str, list[str]]:
    """Checks files and hashes, that each element of a tensor is stored once and finite, and that no tensor is missing.

    Returns (what was checked, one phrase per problem). path: as for `open_checkpoint`. Raises UserError if it has no
    known format.
    """
    path = find_step_folder(Path(path))
    if not (path / FACTS_NAME).is_file():
        checkpoint = open_checkpoint(path)
        problems = find_file_problems(checkpoint.folder, checkpoint.facts) if checkpoint.format == "safetensors" else []
        problems += tensor_problems(checkpoint) or value_problems(checkpoint)
        return f"{checkpoint.format}: {len(checkpoint.files)} files, {len(checkpoint.entries)} tensors", problems
    try:
        facts = read_facts(path)
    except UnreadableError:
        raise
    except UserError as error:
        return f"{path.name}: its files", _problems_of_refused_facts(path) or [str(error)]
    problems, tensors = find_file_problems(path, facts), 0
    if any(problem.startswith(INDEX_NAME) for problem in problems):
        pass
    elif index_issues := index_problems(path, files=facts["files"]):
        problems += index_issues
    else:
        checkpoint = open_megachat(path)
        tensors = len(checkpoint.entries)
        problems += tensor_problems(checkpoint)
        if not problems:
            problems += value_problems(checkpoint)
        if not problems and facts.get("ledger") not in (None, read_ledgers(checkpoint).get("combined")):
            problems.append(f"loader has read other documents than the ledger in {FACTS_NAME} says")
    return f"{path.name}: {len(facts['files'])} files, {tensors} tensors", problems


def _problems_of_refused_facts(path: Path) -> list[str]:
    """Returns the bad files of a checkpoint whose facts are refused, if the list of its files can be read."""
    try:
        facts = json.loads((path / FACTS_NAME).read_text(encoding="utf-8"))
        files = {
            name: entry if isinstance(entry, dict) else {"bytes": int(entry), "sha256": None}
            for name, entry in facts["files"].items()
        }
        return find_file_problems(path, {"files": files})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
