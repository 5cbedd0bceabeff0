"""Downloads of numbered parquet shards from the Hugging Face hub or a mirror: parallel, with retries, and checked."""

import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import requests

from megachat.activity import ProgressBar
from megachat.errors import UserError, summary
from megachat.files import PART, sync_and_rename
from megachat.prepare.manifest import ShardEntry, measure_shard, shard_name


@dataclass(frozen=True)
class HubSource:
    """A data set of shards 0 to last_index at base_url. The last is always the validation shard."""

    base_url: str
    last_index: int


# The data sets that nanochat trains on, so that results can be compared.
HUB_SOURCES = {
    "climbmix": HubSource("https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6542),
    "fineweb-edu": HubSource("https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main", 1822),
}
_ATTEMPTS = 5
_TIMEOUT_S = 30
_PIECE_BYTES = 1 << 15  # at most this much is lost when a connection breaks
_KEPT_FREE_BYTES = 64 << 20  # of the disk, which an answer without a length does not fill


class _Retry(Exception):
    """This attempt failed; another may succeed."""


class _Stopped(Exception):
    """Another shard failed on its last attempt."""


def shard_names(source: HubSource, train_shards: int) -> list[str]:
    """Returns the names of the shards that `download_shards` downloads."""
    return [shard_name(index) for index in (*range(train_shards), source.last_index)]


def download_shards(
    folder: Path,
    source: HubSource,
    train_shards: int,
    *,
    workers: int = 4,
    retry_wait_s: float = 1.0,
    log: Callable[[str], None] = print,
) -> list[ShardEntry]:
    """Downloads shards 0 to train_shards - 1 and the last one into `folder`. Complete shards there are kept.

    A partial shard is `NAME.part`; this call or a later one continues it. retry_wait_s: wait before the second
    attempt, doubled before each further one. Raises UserError for the first shard that fails on its last attempt; the
    other partial shards are kept for the next call.
    """
    names = shard_names(source, train_shards)
    stop = threading.Event()
    with ProgressBar(f"0/{len(names)} shards", None, "B") as progress, ThreadPoolExecutor(workers) as pool:
        downloader = _Downloader(retry_wait_s, stop, progress, "--base-url and --shards", len(names))
        base_url = source.base_url.rstrip("/")
        futures = [pool.submit(_download_shard, downloader, f"{base_url}/{name}", folder / name) for name in names]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                entry = future.result()
                progress.rename(f"{done}/{len(names)} shards")
                if progress.plain:
                    log(f"{done}/{len(names)}: {entry.name}, {entry.bytes:,} bytes, {entry.documents:,} documents")
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def download_file(url: str, part: Path, *, retry_wait_s: float = 1.0) -> None:
    """Downloads one file to `part`, with retries; an earlier call's partial file is continued.

    The caller checks the content. Raises UserError.
    """
    with ProgressBar(part.name, None, "B") as progress:
        _Downloader(retry_wait_s, threading.Event(), progress, "the address").download(url, part)


def _download_shard(downloader: "_Downloader", url: str, path: Path) -> ShardEntry:
    part = path.with_name(path.name + PART)
    if path.exists():
        try:
            entry = measure_shard(path)
        except UserError:
            path.unlink()
        else:
            downloader.count_size(part, entry.bytes, kept=entry.bytes)
            return entry
    downloader.download(url, part)
    try:
        entry = measure_shard(part, path.name)
    except UserError:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{url} did not return a complete parquet file with a `text` column of strings: check the address; "
            f"{path.name} was not kept"
        ) from None
    sync_and_rename(part, path)
    return entry


@dataclass(frozen=True)
class _Downloader:
    """Downloads files with retries. options: what the user checks when the server refuses a file.

    files: how many it downloads. sizes: file name -> bytes, where known, of which the bytes of all are estimated.
    """

    retry_wait_s: float
    stop: threading.Event
    progress: ProgressBar
    options: str
    files: int = 1
    sizes: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count_size(self, part: Path, size: int, *, kept: int) -> None:
        """Corrects the expected bytes of all files. kept: bytes that an earlier call has downloaded."""
        with self.lock:
            if part.name not in self.sizes:
                self.sizes[part.name] = size
                self.progress.skip(kept)
                self.progress.update(0, total=round(sum(self.sizes.values()) / len(self.sizes) * self.files))

    def download(self, url: str, part: Path) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._attempt(url, part)
            except (_Retry, requests.RequestException) as error:
                if attempt == _ATTEMPTS:
                    kept = part.stat().st_size if part.exists() else 0
                    raise UserError(
                        f"{url} failed {_ATTEMPTS} times, the last time with {_describe(error)}: "
                        f"run the same command again to continue after the {kept:,} bytes kept"
                    ) from None
                if self.stop.wait(self.retry_wait_s * 2 ** (attempt - 1)):
                    raise _Stopped from None
            except OSError as error:
                raise UserError(
                    f"{part} cannot be written ({error}): free disk space and run the same command again"
                ) from None

    def _attempt(self, url: str, part: Path) -> None:
        """Downloads the missing bytes of `part`. Raises _Retry if the server fails or the answer is incomplete."""
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"}  # a compressed answer could not be continued by byte
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
            if answer.status_code == 416:  # nothing is missing, or the partial file is of another file
                if have and answer.headers.get("Content-Range") == f"bytes */{have}":
                    return
                part.unlink(missing_ok=True)
                raise _Retry("a file that has changed")
            if answer.status_code == 429 or answer.status_code >= 500:
                raise _Retry(f"HTTP {answer.status_code}")
            if answer.status_code not in (200, 206):
                raise UserError(f"{url} answers HTTP {answer.status_code}: check {self.options}")
            encoding = answer.headers.get("Content-Encoding", "")
            if encoding.lower() not in ("", "identity"):
                raise UserError(
                    f"{url} is sent with the encoding {encoding[:40]!r}, which was not requested and may unpack to any "
                    f"size: use a server that sends files as they are, or check {self.options}"
                )
            start, total = _extent(answer)
            if start not in (0, have):
                part.unlink(missing_ok=True)
                raise _Retry("an answer with other bytes than requested")
            if total is not None:
                self.count_size(part, total, kept=start)
            self._write(answer, part, start, total)
        size = part.stat().st_size
        if total is not None and size != total:
            if size > total:
                part.unlink(missing_ok=True)
            raise _Retry(f"{size:,} of {total:,} bytes")

    def _write(self, answer: requests.Response, part: Path, start: int, total: int | None) -> None:
        """Writes the answer's bytes to `part`: never more than announced, and never the last of the disk."""
        size = start
        with part.open("ab" if start else "wb") as file:
            _check_free_space(part, 0 if total is None else total - start)
            for piece in answer.iter_content(_PIECE_BYTES):
                if self.stop.is_set():
                    raise _Stopped
                size += len(piece)
                if total is not None and size > total:
                    break
                if total is None:
                    _check_free_space(part, len(piece))
                file.write(piece)
                with self.lock:
                    self.progress.update(len(piece))
        if total is not None and size > total:
            part.unlink()
            raise _Retry(f"more than the announced {total:,} bytes")


def _check_free_space(part: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(part.parent).free - _KEPT_FREE_BYTES
    if needed_bytes > free_bytes:
        raise UserError(
            f"{part} needs {needed_bytes:,} bytes more, but the disk has {max(0, free_bytes):,} to spare: free disk "
            "space and run the same command again"
        )


def _extent(answer: requests.Response) -> tuple[int, int | None]:
    """Returns (first byte sent, size of the whole file or None). Status 200 means that the server ignored the range."""
    if answer.status_code == 206:
        extent = answer.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", extent)
        if match is None:
            return -1, None
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if re.fullmatch("[0-9]{1,18}", length) else None


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, _Retry) else summary(error)[:160]
