"""Downloads the CORE bundle once for all processes of a host, and compares it with its first hash at every use."""

import fcntl
import zipfile
from collections.abc import Callable
from pathlib import Path

from megachat.errors import UserError
from megachat.files import PART, file_sha256, sync_and_rename, write_atomically

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # nanochat's source
BUNDLE_PATH = Path("data") / "eval_bundle.zip"


def download_bundle(
    log: Callable[[str], None] = print, *, url: str = BUNDLE_URL, path: Path = BUNDLE_PATH, retry_wait_s: float = 1.0
) -> Path:
    """Returns `path`, downloaded if it does not exist. Other processes wait for the one that downloads.

    The publisher provides no hash. The SHA-256 of the first file is saved beside it, in sha256sum's format, and
    compared at every use. Raises UserError if the download fails or is not a zip file, or if the file has changed
    since.
    """
    from megachat.prepare.download import download_file  # loads requests

    hash_file = path.with_name(path.name + ".sha256")
    if not (path.exists() and hash_file.exists()):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_name(path.name + ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed or the process ends
                part = path.with_name(path.name + PART)
                if not path.exists():
                    log(f"downloading the CORE bundle from {url} to {path}")
                    download_file(url, part, retry_wait_s=retry_wait_s)
                    if not zipfile.is_zipfile(part):
                        part.unlink()
                        raise UserError(f"{url} did not return a zip file: check the address; the download was deleted")
                if not hash_file.exists():  # also for a file that was placed there by hand
                    digest = file_sha256(path if path.exists() else part)
                    write_atomically(hash_file, f"{digest}  {path.name}\n".encode())
                if not path.exists():
                    sync_and_rename(part, path)  # last: a bundle that exists has its hash
        except OSError as error:
            raise UserError(
                f"{path} cannot be written or locked ({error.strerror}): download {url} yourself and give the file"
            ) from None
    first = (hash_file.read_text(encoding="utf-8", errors="replace").split() or ["nothing"])[0]
    current = file_sha256(path)
    if current != first:
        raise UserError(
            f"{path} is not the file that was first there (SHA-256 {current[:12]}, not {first[:12]}): "
            f"remove it and {hash_file.name} to download it again"
        )
    return path
