"""Converts checkpoints: writes a temporary folder, reads it back, proves it, renames it. A failure leaves nothing."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megachat.checkpoint.facts import find_file_problems
from megachat.convert.architecture import require_finite
from megachat.convert.formats import format_of, open_checkpoint
from megachat.convert.megachat import write_megachat
from megachat.convert.proof import megachat_logits, prove
from megachat.convert.reader import CheckpointReader
from megachat.errors import UserError
from megachat.files import sync_to_disk, write_json


def certificate_path(target: Path) -> Path:
    """Returns the path of a conversion's certificate, which is next to its output."""
    return target.with_name(f"{target.name}.certificate.json")


def export_checkpoint(command: str, checkpoint: Path, target: Path, tokenizer: Path | None = None, **options) -> dict:
    """Converts a megachat checkpoint into the new folder `target` of another format and returns the certificate.

    command: of an entry in FORMATS. options: arguments of its prepare_export. Raises UserError if the conversion or its
    proof fails; no files are left in that case.
    """
    source = _open_source(checkpoint, "megachat")
    export = format_of(command).prepare_export(source, tokenizer, **options)
    require_finite(source)

    def make(temporary: Path) -> dict:
        export.write(temporary)
        back = export.read_back(temporary)
        return prove(
            export.expected or source,
            back,
            export.tolerance,
            source_logits=partial(megachat_logits, source),
            target_logits=export.target_logits and partial(export.target_logits, temporary),
            remarks=export.remarks,
        )

    return _write_proved(f"to-{command}", source, target, make)


def import_checkpoint(
    command: str, folder: Path, target: Path, tokenizer: Path | None = None, step: int | None = None, **options
) -> dict:
    """Converts a folder of another format into a megachat checkpoint and returns the certificate.

    target: a new run folder, or a step's folder if it has a step's name. step: which step, if `folder` has several.
    options: arguments of the format's prepare_import. Errors as in export_checkpoint.
    """
    form = format_of(command)
    new = form.prepare_import(_open_source(folder, form.name, step), tokenizer, **options)
    require_finite(new.source)
    expected = new.source.select(new.source.entries, facts=new.source.facts | new.facts)

    def make(temporary: Path) -> dict:
        written = write_megachat(new, temporary, target).select(expected.entries)
        return prove(
            expected,
            written,
            new.tolerance,
            source_logits=new.source_logits,
            remarks=new.remarks,
        )

    return _write_proved(f"from-{command}", new.source, target, make)


def _open_source(path: Path, name: str, step: int | None = None) -> CheckpointReader:
    source = open_checkpoint(path, step)
    if source.format != name:
        raise UserError(f"{path} has the format {source.format}, not {name}: use the conversion for that format")
    if "files" in source.facts and (problems := find_file_problems(source.folder, source.facts)):
        raise UserError(f"{source.folder} is damaged: {problems[0]}")
    return source


def _write_proved(kind: str, source: CheckpointReader, target: Path, make: Callable[[Path], dict]) -> dict:
    """Calls `make` to fill and prove a temporary folder, renames it to `target`, and returns the certificate.

    Raises UserError if the target exists or cannot be written, or if the proof fails; no files are left in that case.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists: give another name, or remove it")
    _check_space(target, sum(entry.bytes for entry in source.entries.values()))
    new_parents = [parent for parent in target.absolute().parents if not parent.exists()]
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    done = False
    try:
        temporary.mkdir(parents=True)
        certificate = {"conversion": kind} | make(temporary)
        if problem := certificate["first_difference"]:
            raise UserError(f"{target} was not written, because what was read back is not the source: {problem}")
        side = certificate["target"]
        side["folder"] = side["folder"].replace(str(temporary), str(target))
        for path in (*sorted(temporary.rglob("*"), reverse=True), temporary):  # the folder last
            sync_to_disk(path)
        write_json(certificate_path(target), certificate)
        temporary.rename(target)
        done = True
    except OSError as error:
        raise UserError(
            f"{target} could not be written ({error.strerror or error}): free space there or choose another folder"
        ) from error
    finally:
        if not done:
            shutil.rmtree(temporary, ignore_errors=True)
            certificate_path(target).unlink(missing_ok=True)
            for parent in new_parents:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
    return certificate


def _check_space(target: Path, needed_bytes: int) -> None:
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        sizes = f"{target} takes {needed_bytes / 1e6:,.1f} MB and {existing} has {free / 1e6:,.1f} MB free"
        raise UserError(f"{sizes}: free space there or choose another folder")
