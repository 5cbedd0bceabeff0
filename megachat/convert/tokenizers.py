"""A checkpoint's tokenizer: identified by its fingerprint in megachat's formats, else by its number of tokens."""

from pathlib import Path

from megachat.convert.reader import CheckpointReader
from megachat.data.tokenizer import Tokenizer, load_origin, load_tokenizer
from megachat.errors import UserError
from megachat.prepare.tokenizer_training import NANOCHAT_FILE, import_nanochat


def find_tokenizer(source: CheckpointReader, requested: Path | None) -> Path | None:
    """Returns the folder of a checkpoint's tokenizer: the requested one, else the first of its tokenizer folders that
    has it, else None.

    Raises UserError if the requested tokenizer cannot be read or is not the checkpoint's.
    """
    fingerprint = (source.facts.get("tokenizer") or {}).get("fingerprint")
    if requested:
        actual = load_tokenizer(requested).fingerprint
        if fingerprint not in (None, actual):
            problem = f"its fingerprint is {actual[:12]}, not {fingerprint[:12]}"
            raise UserError(f"{requested} is not the checkpoint's tokenizer: {problem}")
        return requested
    for folder in source.tokenizer_folders:
        try:
            actual = load_tokenizer(folder).fingerprint
        except UserError:
            continue
        if fingerprint in (None, actual):
            return folder
    return None


def load_tokenizer_of(source: CheckpointReader, requested: Path | None = None) -> tuple[Tokenizer, dict]:
    """Returns (tokenizer, its origin) of a checkpoint of any format; requested: the folder to use.

    Raises UserError if there is none, or if it does not fit the model.
    """
    if "config" in source.facts:
        folder = find_tokenizer(source, requested)
        if folder is None:
            problem = f"the tokenizer of {source.folder} is not where its config says"
            raise UserError(f"{problem}: give its folder with --tokenizer")
        return load_tokenizer(folder), load_origin(folder)
    candidates = (requested,) if requested else source.tokenizer_folders
    folder = next((path for path in candidates if (path / NANOCHAT_FILE).is_file()), candidates[0])
    if not folder.is_dir():
        raise UserError(f"there is no tokenizer at {folder}: give megachat's or nanochat's folder with --tokenizer")
    tokenizer = import_nanochat(folder) if (folder / NANOCHAT_FILE).is_file() else load_tokenizer(folder)
    most = source.dims.vocab_size
    least = 1 if source.format == "huggingface" else most  # its tables may have rows that are no tokens
    if not least <= tokenizer.vocab_size <= most:
        problem = f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens and the model {most}"
        raise UserError(f"{problem}: give the model's own with --tokenizer")
    return tokenizer, {"imported": str(folder)}
