import contextlib
import gzip
import hashlib
import io
import re
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tqdm import tqdm

from megachat import activity
from megachat.errors import UserError
from megachat.job.launch import free_port
from megachat.prepare import download as download_module
from megachat.prepare.download import _PIECE_BYTES, HUB_SOURCES, HubSource, download_shards
from tests.unit.data.corpus import random_texts


def shard_bytes(seed):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": random_texts(4000, seed)}), file, compression="none")
    return file.getvalue()


class Mirror(ThreadingHTTPServer):
    """Serves `files`; `faults[name]` is a list of what to do wrong with the next requests of that file."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files = {f"shard_{index:05d}.parquet": shard_bytes(index) for index in (0, 1, 2, 9)}
        self.faults: dict[str, list[str]] = {}
        self.requests = Counter()
        self.sent_bytes = Counter()
        self.ranges = []
        self.knows_ranges = True

    @property
    def source(self):
        return HubSource(f"http://127.0.0.1:{self.server_address[1]}", 9)


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # chunks need it

    def do_GET(self):
        mirror, name = self.server, self.path.strip("/")
        mirror.requests[name] += 1
        faults = mirror.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        content = mirror.files.get(name)
        if content is None or fault in ("404", "403", "500", "503", "429"):
            return self.send_error(int(fault or 404))
        start = 0
        if self.headers["Range"] and mirror.knows_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            mirror.ranges.append((name, start))
        if self.headers["Range"] and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if fault in ("gzip", "br"):
            content = gzip.compress(content) if fault == "gzip" else content
            self.send_header("Content-Encoding", fault)
        if fault in ("endless", "longer than the range"):
            return self.send_chunks(content, start, fault)
        length = len(content) - start + (1000 if fault == "too long" else 0)
        if fault == "huge":
            length = 10**16
        self.send_header("Content-Length", "9" * 5000 if fault == "5,000 digits" else str(length))
        if start:
            shown = start + 1 if fault == "other range" else start
            self.send_header("Content-Range", f"bytes {shown}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        sent = content[start : start + (len(content) - start) // 2] if fault == "cut" else content[start:]
        mirror.sent_bytes[name] += len(sent)
        self.wfile.write(sent)
        self.close_connection = True

    def send_chunks(self, content, start, fault):
        """More bytes than the file has, without a length; "longer than the range": after a range that has one."""
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):
            for _ in range(1000):
                self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                self.server.sent_bytes["chunks"] += 0x10000

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror():
    server = Mirror()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def download(folder, mirror, shards=2, **changes):
    folder.mkdir(exist_ok=True)
    lines = []
    entries = download_shards(folder, mirror.source, shards, retry_wait_s=0.001, log=lines.append, **changes)
    return entries, lines


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_first_shards_and_always_the_last(tmp_path, mirror):
    entries, lines = download(tmp_path / "out", mirror)
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_00009.parquet"]
    assert names_in(tmp_path / "out") == names == [entry.name for entry in entries] and len(lines) == 3
    for entry in entries:
        content = mirror.files[entry.name]
        assert (tmp_path / "out" / entry.name).read_bytes() == content
        assert (entry.bytes, entry.sha256, entry.documents) == (len(content), hashlib.sha256(content).hexdigest(), 4000)
        assert entry.text_chars == sum(map(len, random_texts(4000, int(entry.name[6:11]))))
    download(tmp_path / "out", mirror)
    assert set(mirror.requests.values()) == {1}


def check_recovery(folder, mirror, faults):
    name = "shard_00001.parquet"
    mirror.faults[name] = list(faults)
    download(folder, mirror)
    assert names_in(folder) == ["shard_00000.parquet", name, "shard_00009.parquet"]
    assert (folder / name).read_bytes() == mirror.files[name]
    assert mirror.requests[name] == len(faults) + 1
    return mirror.sent_bytes[name] / len(mirror.files[name])


@pytest.mark.parametrize(
    "faults",
    [
        ["500"],
        ["503", "429", "cut"],
        ["cut", "cut", "cut", "cut"],
        ["too long"],
        ["cut", "other range"],
        ["cut", "500", "cut"],
    ],
)
def test_a_request_to_a_failing_server_is_repeated(tmp_path, mirror, faults):
    sent = check_recovery(tmp_path, mirror, faults)
    assert "other range" in faults or sent <= 1 + len(faults) * _PIECE_BYTES / len(mirror.files["shard_00001.parquet"])


def test_a_server_that_ignores_ranges_starts_the_file_again(tmp_path, mirror):
    mirror.knows_ranges = False
    assert check_recovery(tmp_path, mirror, ["cut", "500", "cut"]) == pytest.approx(2, abs=0.01)


def test_a_later_call_goes_on_from_the_part(tmp_path, mirror):
    name = "shard_00000.parquet"
    mirror.faults[name] = ["cut"] + ["500"] * 4
    with pytest.raises(UserError) as caught:
        download(tmp_path, mirror, workers=1)
    kept = (tmp_path / (name + ".part")).stat().st_size
    assert f"{mirror.source.base_url}/{name} failed 5 times, the last time with HTTP 500" in str(
        caught.value
    ) and f"the {kept:,} bytes kept" in str(caught.value)
    assert 0 < kept < len(mirror.files[name]) and not (tmp_path / name).exists()
    download(tmp_path, mirror)
    assert (name, kept) in mirror.ranges and (tmp_path / name).read_bytes() == mirror.files[name]
    assert not list(tmp_path.glob("*.part"))


def test_parts_that_are_whole_or_of_another_file(tmp_path, mirror):
    whole, longer = "shard_00000.parquet", "shard_00001.parquet"
    (tmp_path / (whole + ".part")).write_bytes(mirror.files[whole])
    (tmp_path / (longer + ".part")).write_bytes(mirror.files[longer] + b"more")
    download(tmp_path, mirror)
    assert mirror.sent_bytes[whole] == 0
    assert all((tmp_path / name).read_bytes() == mirror.files[name] for name in (whole, longer))


@pytest.mark.parametrize("status", ["404", "403"])
def test_a_refused_request_is_not_repeated(tmp_path, mirror, status):
    mirror.faults["shard_00009.parquet"] = [status] * 9
    with pytest.raises(UserError, match=f"shard_00009.parquet answers HTTP {status}: check --base-url and --shards"):
        download(tmp_path, mirror)
    assert mirror.requests["shard_00009.parquet"] == 1


@pytest.mark.parametrize("content", [b"<html>sorry</html>" * 100, shard_bytes(1)[:5000], b"", "damaged"])
def test_what_is_no_whole_parquet_file_is_not_kept(tmp_path, mirror, content):
    name = "shard_00001.parquet"
    if content == "damaged":
        good = mirror.files[name]
        content = good[:4] + bytes(len(good) // 2) + good[4 + len(good) // 2 :]
    mirror.files[name] = content
    with pytest.raises(UserError, match=f"{name} did not return a complete parquet file .*{name} was not kept"):
        download(tmp_path, mirror, workers=1)
    assert not any(name in path.name for path in tmp_path.iterdir())


def test_a_damaged_shard_in_place_is_fetched_again(tmp_path, mirror):
    name = "shard_00000.parquet"
    (tmp_path / name).write_bytes(mirror.files[name][:-100])
    download(tmp_path, mirror)
    assert (tmp_path / name).read_bytes() == mirror.files[name]


@pytest.mark.parametrize("encoding", ["gzip", "br"])
def test_a_compressed_answer_is_refused(tmp_path, mirror, encoding):
    """It may unpack to any size, and its bytes are not those that are announced."""
    mirror.faults["shard_00001.parquet"] = [encoding] * 5
    with pytest.raises(UserError, match=f"shard_00001.parquet is sent with the encoding '{encoding}', which was not"):
        download(tmp_path, mirror, workers=1)
    assert mirror.requests["shard_00001.parquet"] == 1 and not list(tmp_path.glob("shard_00001*"))


def test_no_more_bytes_than_announced_or_free(tmp_path, mirror, monkeypatch):
    name, part = "shard_00001.parquet", tmp_path / "shard_00001.parquet.part"
    mirror.faults[name] = ["huge"]
    with pytest.raises(UserError, match=r"shard_00001.parquet.part needs 10,000,000,000,000,000 bytes more, but the"):
        download(tmp_path, mirror, workers=1)
    mirror.faults[name] = ["5,000 digits"]
    download(tmp_path, mirror)  # as if there was no length
    (tmp_path / name).unlink()
    mirror.faults[name] = ["cut", "longer than the range"] + ["500"] * 3
    with pytest.raises(UserError):
        download(tmp_path, mirror)
    assert not part.exists() and mirror.sent_bytes["chunks"] < 1000 * 0x10000
    free = shutil.disk_usage(tmp_path).free

    def usage(path):
        return shutil._ntuple_diskusage(0, 0, (256 << 20) - sum(file.stat().st_size for file in tmp_path.glob("*")))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(download_module, "_KEPT_FREE_BYTES", 250 << 20)
    mirror.faults[name] = ["endless"]
    with pytest.raises(UserError, match="shard_00001.parquet.part needs .* but the disk has .* to spare"):
        download(tmp_path, mirror, workers=1)
    assert part.stat().st_size < 6 << 20 < free


def test_no_server(tmp_path):
    nobody = HubSource(f"http://127.0.0.1:{free_port()}", 9)
    with pytest.raises(UserError, match="failed 5 times, the last time with ConnectionError"):
        download_shards(tmp_path, nobody, 2, retry_wait_s=0.001, log=lambda line: None)


def test_the_addresses_are_nanochats():
    assert HUB_SOURCES["climbmix"] == HubSource(
        "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main", 6542
    )
    assert HUB_SOURCES["fineweb-edu"] == HubSource(
        "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main", 1822
    )


def test_progress_counts_bytes_of_all_shards(mirror, tmp_path, monkeypatch, capsys):
    """Also those that an earlier call has kept: here all of one shard and a part of the next."""
    monkeypatch.setattr(activity, "_LINE_EVERY_S", 0.0)
    names = list(mirror.files)
    (tmp_path / names[0]).write_bytes(mirror.files[names[0]])
    (tmp_path / (names[1] + ".part")).write_bytes(mirror.files[names[1]][:5000])
    download_shards(tmp_path, mirror.source, 3, workers=1, log=lambda line: None)
    lines = capsys.readouterr().out.splitlines()
    total = tqdm.format_sizeof(sum(map(len, mirror.files.values())))
    assert re.fullmatch(rf"\d/4 shards: {total}B of {total}B \(100%\), eta 0min", lines[-1]), lines[-1]
    assert all(re.match(r"\d/4 shards: \S+B of \S+B \(\d+%\)", line) for line in lines)
