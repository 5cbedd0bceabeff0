"""The CORE bundle from the network: once for all processes of a host, checked against its hash ever after."""

import fcntl
import zipfile
from collections.abc import Callable
from pathlib import Path

from megachat.errors import UserError
from megachat.files import PART, file_sha256, sync_and_rename, write_atomically
from megachat.prepare.download import download_file

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # where nanochat takes it from
BUNDLE_PATH = Path("data") / "eval_bundle.zip"


def download_bundle(
    say: Callable[[str], None] = print, *, url: str = BUNDLE_URL, path: Path = BUNDLE_PATH, retry_wait_s: float = 1.0
) -> Path:
    """`path`, downloaded when it is not there; other processes that ask wait for the one that downloads.

    No hash of the bundle is published. The SHA-256 of what came first is written beside it and compared at every use. Raises UserError when the
    download fails, when what came is no zip, and when the file has changed since.
    """
    hashed = path.with_name(path.name + ".sha256")
    if not (path.exists() and hashed.exists()):  # the file comes last
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_name(path.name + ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, or with the process
                if not path.exists():
                    say(f"downloading the CORE bundle from {url} to {path}")
                    _download(url, path, hashed, retry_wait_s)
                elif not hashed.exists():  # put there by hand
                    _remember(hashed, path)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written or locked ({error.strerror}): download {url} yourself and give the file"
            ) from None
    wanted, found = hashed.read_text(encoding="utf-8").split()[0], file_sha256(path)
    if found != wanted:
        raise UserError(
            f"{path} is not the file that was first there (SHA-256 {found[:12]}, not {wanted[:12]}): remove it and {hashed.name} to get it again"
        )
    return path


def _download(url: str, path: Path, hashed: Path, retry_wait_s: float) -> None:
    part = path.with_name(path.name + PART)
    download_file(url, part, retry_wait_s=retry_wait_s)
    if not zipfile.is_zipfile(part):
        part.unlink()
        raise UserError(f"what {url} sent is not a zip: check the address; it was not kept")
    if not hashed.exists():
        _remember(hashed, part, path.name)
    sync_and_rename(part, path)


def _remember(hashed: Path, file: Path, name: str | None = None) -> None:
    """In sha256sum's format."""
    write_atomically(hashed, f"{file_sha256(file)}  {name or file.name}\n".encode())
