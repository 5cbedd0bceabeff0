"""Numbered parquet shards from the Hugging Face hub (or a mirror): parallel, retried, resumed where they stopped, checked before they count."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm

from megachat.errors import UserError
from megachat.files import PART, sync_and_rename
from megachat.prepare.manifest import ShardEntry, measure_shard, shard_name


@dataclass(frozen=True)
class HubSource:
    """A data set of shards 0 to last_index at base_url. The last is the validation shard, however few of the others are taken."""

    base_url: str
    last_index: int


# The addresses that nanochat trains on, so that results compare.
HUB_SOURCES = {
    "climbmix": HubSource("https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6542),
    "fineweb-edu": HubSource("https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main", 1822),
}
_ATTEMPTS = 5
_TIMEOUT_S = 30
_PIECE_BYTES = 1 << 15  # what a cut connection can lose


class _Retry(Exception):
    """This attempt failed; another may succeed."""


class _Stopped(Exception):
    """Another shard failed for good."""


def download_shards(
    folder: Path,
    source: HubSource,
    train_shards: int,
    *,
    workers: int = 4,
    retry_wait_s: float = 1.0,
    log: Callable[[str], None] = print,
) -> list[ShardEntry]:
    """Download shards 0 to train_shards-1 and the last one into `folder`. Whole shards that are already there stay.

    A shard under way is `NAME.part` and goes on from there, in this call or a later one. retry_wait_s: before the second attempt, doubled for each
    further one. Raises UserError for the first shard that fails for good; the others' parts stay for the next call.
    """
    names = [shard_name(index) for index in (*range(train_shards), source.last_index)]
    stop = threading.Event()
    # disable=None: only on a terminal.
    with (
        tqdm(desc=f"0/{len(names)} shards", unit="B", unit_scale=True, disable=None) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        fetch = _Fetch(source.base_url.rstrip("/"), folder, retry_wait_s, stop, bar)
        futures = [pool.submit(fetch.shard, name) for name in names]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                entry = future.result()
                bar.set_description(f"{done}/{len(names)} shards")
                if bar.disable:
                    log(f"{done}/{len(names)}: {entry.name}, {entry.bytes:,} bytes, {entry.documents:,} documents")
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def download_file(url: str, part: Path, *, retry_wait_s: float = 1.0) -> None:
    """Download one file to `part`, from where an earlier call left it; retried. What came is for the caller to check. Raises UserError."""
    with tqdm(desc=part.name, unit="B", unit_scale=True, disable=None) as bar:
        _Fetch(url, part.parent, retry_wait_s, threading.Event(), bar, hint="the address").retried(url, part)


@dataclass(frozen=True)
class _Fetch:
    base_url: str
    folder: Path
    retry_wait_s: float
    stop: threading.Event
    bar: tqdm
    hint: str = "--base-url and --shards"

    def shard(self, name: str) -> ShardEntry:
        path, part = self.folder / name, self.folder / (name + PART)
        if path.exists():
            try:
                return measure_shard(path)
            except UserError:
                path.unlink()
        url = f"{self.base_url}/{name}"
        self.retried(url, part)
        try:
            entry = measure_shard(part, name)
        except UserError:
            part.unlink(missing_ok=True)
            raise UserError(
                f"what {url} sent for {name} is not a whole parquet file with a `text` column of strings: check the address; it was not kept"
            ) from None
        sync_and_rename(part, path)
        return entry

    def retried(self, url: str, part: Path) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._once(url, part)
            except (_Retry, requests.RequestException) as error:
                if attempt == _ATTEMPTS:
                    kept = part.stat().st_size if part.exists() else 0
                    raise UserError(
                        f"{url} failed {_ATTEMPTS} times, at last with {_brief(error)}: run the same command again to go on "
                        f"from the {kept:,} bytes kept"
                    ) from None
                if self.stop.wait(self.retry_wait_s * 2 ** (attempt - 1)):
                    raise _Stopped from None
            except OSError as error:
                raise UserError(
                    f"{part} cannot be written ({error}): free the disk and run the same command again"
                ) from None

    def _once(self, url: str, part: Path) -> None:
        """Fetch what is missing of `part`. Raises _Retry when the answer is cut short or the server is in trouble."""
        have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        # identity: a compressed answer could not be resumed by byte.
        with requests.get(
            url, headers={**headers, "Accept-Encoding": "identity"}, stream=True, timeout=_TIMEOUT_S
        ) as answer:
            if answer.status_code == 416:  # nothing is missing, or the part is of another file
                if have and answer.headers.get("Content-Range") == f"bytes */{have}":
                    return
                part.unlink(missing_ok=True)
                raise _Retry("a file that has changed")
            if answer.status_code == 429 or answer.status_code >= 500:
                raise _Retry(f"HTTP {answer.status_code}")
            if answer.status_code not in (200, 206):
                raise UserError(f"{url} answers HTTP {answer.status_code}: check {self.hint}")
            start, total = _extent(answer)
            if start not in (0, have):
                part.unlink(missing_ok=True)
                raise _Retry("an answer for other bytes than asked")
            with part.open("ab" if start else "wb") as file:
                for piece in answer.iter_content(_PIECE_BYTES):
                    if self.stop.is_set():
                        raise _Stopped
                    file.write(piece)
                    self.bar.update(len(piece))
        got = part.stat().st_size
        if total is not None and got != total:
            if got > total:
                part.unlink(missing_ok=True)
            raise _Retry(f"{got:,} of {total:,} bytes")


def _extent(answer: requests.Response) -> tuple[int, int | None]:
    """(first byte sent, size of the whole file or None). A server that ignores Range answers 200 and starts from 0."""
    if answer.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if match is None:
            return -1, None
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _brief(error: Exception) -> str:
    return f"{error}" if isinstance(error, _Retry) else f"{type(error).__name__} ({str(error).splitlines()[0][:120]})"
