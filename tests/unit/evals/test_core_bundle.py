import zipfile
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from megachat.errors import UserError
from megachat.evals import core_bundle, core_download
from megachat.evals.core_bundle import CORE_TASKS, check_max_per_task, configured_examples, open_bundle
from megachat.files import file_sha256
from megachat.settings import EvaluateConfig
from tests.unit.evals.bundle import ALL, examples, write_bundle, zipped
from tests.unit.prepare.test_download import mirror  # noqa: F401


@pytest.fixture
def folder(tmp_path):
    return write_bundle(tmp_path / "bundle")


def refused(path, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        open_bundle(path, *arguments)
    message = str(caught.value)
    assert "\n" not in message and ":" in message
    return message


def test_a_folder_and_its_zips_are_one_bundle(folder, tmp_path):
    bundle = open_bundle(folder)
    task = bundle.tasks[0]
    assert (task.label, task.kind, task.shots, task.delimiter, task.baseline) == (
        "arc_easy",
        "multiple_choice",
        1,
        "\nA: ",
        0.5,
    )
    assert [task.delimiter for task in bundle.tasks[1:]] == [" ", " "] and task.examples == tuple(
        examples("multiple_choice", 6)
    )
    assert len(bundle.missing) == 19 and "copa" in bundle.missing and "winograd" not in bundle.missing
    for inside in ("eval_bundle", "."):
        assert open_bundle(zipped(folder, tmp_path / "one.zip", inside)) == bundle
    folder.rename(tmp_path / "eval_bundle")
    assert open_bundle(tmp_path) == bundle  # the folder around it


def test_all_tasks_of_core_are_known(tmp_path):
    assert len(set(CORE_TASKS)) == 22
    bundle = open_bundle(write_bundle(tmp_path, ALL, 2))
    assert bundle.missing == () and [task.label for task in bundle.tasks] == list(CORE_TASKS)
    one = open_bundle(tmp_path, ["copa"])
    assert [task.label for task in one.tasks] == ["copa"] and len(one.missing) == 21 and one.digest != bundle.digest


def test_byte_order_marks_are_not_text(folder):
    before = open_bundle(folder)
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert open_bundle(folder) == before


def test_every_change_changes_the_digest(folder):
    before = open_bundle(folder).digest
    file = folder / "eval_meta_data.csv"
    file.write_text(file.read_text().replace(",50\n", ",51\n", 1))
    assert (other := open_bundle(folder).digest) != before
    file = folder / "eval_data/schema/winograd.jsonl"
    file.write_text(file.read_text().replace("old", "new", 1))
    assert open_bundle(folder).digest not in (before, other)


LINE = "eval_data/multiple_choice/arc_easy.jsonl line 3 "


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{'query'", LINE + "is not JSON (Expecting property name"),
        ("", LINE + "is not JSON"),
        ("[1]", LINE + "is not a JSON object"),
        ('{"choices": ["a", "b"], "gold": 0}', LINE + "has no text `query`, which a multiple_choice task needs"),
        ('{"query": "a", "choices": ["a"], "gold": 0}', LINE + "has fewer than two texts in `choices`"),
        (
            '{"query": "a", "choices": ["a", "b"], "gold": 2}',
            LINE + "has `gold` 2: give the index of one of its 2",
        ),
        ('{"query": "a", "choices": ["a", "b"], "gold": true}', LINE + "has `gold` True"),
        ("[" * 200_000, LINE + "cannot be read (maximum recursion depth exceeded"),
        ('{"query": ' + "7" * 5000 + "}", LINE + "cannot be read (Exceeds the limit"),
        (r'{"query": "\ud800", "choices": ["a", "b"], "gold": 0}', LINE + "cannot be read ('utf-8' codec"),
        ('{"query": "' + "a" * (1 << 20) + '"}', LINE + "has 1,048,589 characters, more than 1,048,576"),
    ],
)
def test_a_broken_line_is_named(folder, tmp_path, line, why):
    file = folder / "eval_data/multiple_choice/arc_easy.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    assert why in refused(folder)
    assert why in refused(zipped(folder, tmp_path / "broken.zip"))
    open_bundle(folder, ["winograd"])  # which does not need it


def rewritten(name: str, change):
    def spoil(folder):
        (folder / name).write_text(change((folder / name).read_text()))

    return spoil


def elsewhere(uri: str):
    return rewritten("core.yaml", lambda text: text.replace("schema/winograd.jsonl", uri))


def without(name: str):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (without("core.yaml"), "has no core.yaml"),
        (rewritten("core.yaml", lambda text: "icl_tasks: " + "[" * 200_000), "nested more than 20 deep"),
        (rewritten("core.yaml", lambda text: "a: &a [x]\nb: [*a, *a]\n" + text), "it has aliases"),
        (rewritten("core.yaml", lambda text: text + "# " + "a" * (1 << 18)), "core.yaml has more than 262,144 bytes"),
        (rewritten("core.yaml", lambda text: text + r'  continuation_delimiter: "\ud800"'), "core.yaml is not YAML"),
        (rewritten("eval_meta_data.csv", lambda text: text + "a" * (1 << 18)), "csv has more than 262,144 bytes"),
        (elsewhere("../schema.jsonl"), "the dataset_uri ../schema.jsonl of winograd lies outside of the bundle"),
        (elsewhere("/etc/passwd"), "the dataset_uri /etc/passwd of winograd lies outside of the bundle"),
        (without("eval_meta_data.csv"), "eval_meta_data.csv is missing from the CORE bundle"),
        (without("eval_data/schema/winograd.jsonl"), "eval_data/schema/winograd.jsonl is missing from the CORE bundle"),
        (rewritten("core.yaml", lambda text: "icl_tasks: ["), "core.yaml is not YAML"),
        (rewritten("core.yaml", lambda text: "a: 1"), "(KeyError: 'icl_tasks')"),
        (rewritten("core.yaml", lambda text: "icl_tasks: []"), "core.yaml lists no task"),
        (
            rewritten("core.yaml", lambda text: text.replace("label: winograd", "label: arc_easy")),
            "core.yaml lists arc_easy twice",
        ),
        (
            rewritten("core.yaml", lambda text: text.replace("type: schema", "type: essay")),
            "winograd has the unknown type 'essay'",
        ),
        (rewritten("core.yaml", lambda text: text.replace("- 1\n", "- 6\n", 1)), "has 6 examples, too few for 6 shots"),
        (
            rewritten("eval_meta_data.csv", lambda text: text.replace("winograd", "wino")),
            "has no baseline for winograd",
        ),
        (
            rewritten("eval_meta_data.csv", lambda text: text.replace("winograd,schema,0,50", "winograd,schema,0,")),
            "the baseline of winograd is ''",
        ),
        (
            rewritten("eval_meta_data.csv", lambda text: text.replace("winograd,schema,0,50", "winograd,schema,0,100")),
            "less than 100",
        ),
        (
            rewritten("eval_meta_data.csv", lambda text: text.replace("Random baseline", "Random")),
            "columns `Eval Task` and `Random baseline` (KeyError: 'Random baseline')",
        ),
        (
            lambda folder: (folder / "eval_data/schema/winograd.jsonl").write_bytes(b"\xff\n"),
            "winograd.jsonl is not UTF-8 text",
        ),
    ],
)
def test_bad_bundles(folder, spoil, why):
    spoil(folder)
    assert why in refused(folder)


def test_a_link_out_of_the_bundle_is_refused_and_one_inside_is_followed(folder, tmp_path):
    file = folder / "eval_data/schema/winograd.jsonl"
    file.rename(folder / "moved.jsonl")
    file.symlink_to(folder / "moved.jsonl")
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert open_bundle(linked) == open_bundle(folder)
    (folder / "moved.jsonl").rename(tmp_path / "moved.jsonl")
    file.unlink()
    file.symlink_to(tmp_path / "moved.jsonl")
    assert "the dataset_uri schema/winograd.jsonl of winograd lies outside of the bundle" in refused(folder)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_that_unpacks_to_gigabytes_is_refused_while_it_is_read(folder, tmp_path, monkeypatch, compression):
    monkeypatch.setattr(core_bundle, "_MOST_DATA_BYTES", 1 << 20)
    read = []
    whole = zipfile.ZipExtFile.read

    def counted(self, *sizes):
        content = whole(self, *sizes)
        read.append(len(content))
        return content

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    (folder / "eval_data/schema/winograd.jsonl").write_bytes(b" " * (1 << 23))
    archive = zipped(folder, tmp_path / "bomb.zip", compression=compression)
    assert archive.stat().st_size < 1 << 16
    assert "winograd.jsonl has more than 1,048,576 bytes" in refused(archive)
    assert max(read) == (1 << 20) + 1, "more than the limit was unpacked"


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_damaged_and_encrypted_members_are_refused(folder, tmp_path, compression):
    archive = zipped(folder, tmp_path / "damaged.zip", compression=compression)
    with zipfile.ZipFile(archive) as opened:
        member = opened.getinfo("eval_bundle/eval_data/schema/winograd.jsonl")
    content = bytearray(archive.read_bytes())
    begin = member.header_offset + 30 + len(member.filename) + 20
    content[begin : begin + 40] = bytes(range(200, 240))
    archive.write_bytes(content)
    assert "damaged.zip cannot be read" in refused(archive)
    content = bytearray(zipped(folder, tmp_path / "locked.zip").read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        begin = content.find(signature)
        while begin >= 0:
            content[begin + at] |= 1  # the flag of an encrypted member
            begin = content.find(signature, begin + 4)
    (tmp_path / "locked.zip").write_bytes(content)
    assert "locked.zip cannot be read" in refused(tmp_path / "locked.zip")


PIECES = rb"""[ { *a &a\ud800 !!python/name:os.system null 1e999 NaN -1 " : - !!binary <<: !!int ?""".split()
PIECES += [b"\x00", b"\xff", b"\n", b"\xef\xbb\xbf"]


@pytest.mark.parametrize("seed", range(4))
def test_a_bundle_with_any_damage_is_read_or_refused_in_one_sentence(folder, tmp_path, seed):
    """60 damages per seed; 2,500 were tried by hand. A name in the zip that is not UTF-8 was a traceback."""
    random = Random(seed)
    archive = zipped(folder, tmp_path / "damaged.zip", compression=random.choice([0, zipfile.ZIP_DEFLATED]))
    files = [file for file in folder.rglob("*") if file.is_file()]
    for number in range(60):
        target, path = (archive, archive) if number % 2 else (random.choice(files), folder)
        content = bytearray(whole := target.read_bytes())
        for _ in range(random.choice([1, 2, 5])):
            at = random.randrange(len(content))
            if number % 2 or random.random() < 0.5:
                content[at] = random.randrange(256)
            else:
                content[at : at + random.randrange(8)] = random.choice(PIECES) * random.choice([1, 1, 30])
        target.write_bytes(content)
        try:
            open_bundle(path)
        except UserError as error:
            assert "\n" not in str(error)
        target.write_bytes(whole)
    content = bytearray(archive.read_bytes())
    at = content.rindex(b"winograd.jsonl")  # in the directory of the zip file
    content[at] = 0xFF
    content[content.rindex(b"PK\x01\x02", 0, at) + 9] |= 8  # the flag of UTF-8 names
    archive.write_bytes(content)
    assert "codec can't decode" in refused(archive)


def test_bad_arguments(folder, tmp_path):
    assert "does not exist" in refused(tmp_path / "none")
    assert "copa is one of CORE's tasks but not in" in refused(
        folder, ["copa"]
    ) and ": it has arc_easy, winograd" in refused(folder, ["copa"])
    assert "essay is not a task of" in refused(folder, ["winograd", "essay"])
    (tmp_path / "text").write_text("no zip")
    assert "neither a folder nor a complete zip" in refused(tmp_path / "text")
    archive = zipped(folder, tmp_path / "cut.zip")
    content = bytearray(archive.read_bytes())
    at = content.index(b'"query"')
    content[at : at + 4] = b"XXXX"  # its checksum does not fit any more
    archive.write_bytes(content)
    assert "cannot be read (Bad CRC-32" in refused(archive)
    bundle = open_bundle(folder)
    check_max_per_task(bundle, -1, "--max-per-task")
    assert (
        configured_examples(EvaluateConfig(core_max_per_task=None)) == -1
        and configured_examples(EvaluateConfig()) == 500
    )
    check_max_per_task(bundle, 2, "--max-per-task")
    with pytest.raises(UserError, match="--max-per-task is 1.*arc_easy.* 1 shots.*2 or more"):
        check_max_per_task(bundle, 1, "--max-per-task")


# ---- the download, from the server of tests/unit/prepare/test_download.py


def download(mirror, path):  # noqa: F811
    return core_download.download_bundle(
        lambda line: None, url=f"{mirror.source.base_url}/eval_bundle.zip", path=path, retry_wait_s=0.001
    )


def test_downloaded_once_by_all_and_resumed(folder, tmp_path, mirror):  # noqa: F811
    write_bundle(folder, count=1000)
    mirror.files["eval_bundle.zip"] = zipped(folder, tmp_path / "source.zip").read_bytes()
    mirror.faults["eval_bundle.zip"] = ["503", "cut"]
    path = tmp_path / "data" / "eval_bundle.zip"
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: download(mirror, path), range(4))) == [path] * 4
    assert mirror.requests["eval_bundle.zip"] == 3 and mirror.ranges[0][1] > 0  # a refusal, a half, the rest
    assert open_bundle(path) == open_bundle(folder)
    assert (tmp_path / "data" / "eval_bundle.zip.sha256").read_text() == f"{file_sha256(path)}  eval_bundle.zip\n"


def test_a_download_that_changed_is_refused(folder, tmp_path, mirror):  # noqa: F811
    path, hashed = tmp_path / "eval_bundle.zip", tmp_path / "eval_bundle.zip.sha256"
    zipped(folder, path)  # put there by hand
    assert download(mirror, path) == path and hashed.exists() and mirror.requests["eval_bundle.zip"] == 0
    zipped(write_bundle(tmp_path / "other", count=7), path)
    with pytest.raises(UserError, match="eval_bundle.zip is not the file that was first there"):
        download(mirror, path)
    path.unlink()
    mirror.files["eval_bundle.zip"] = zipped(
        write_bundle(tmp_path / "third", count=8), tmp_path / "source.zip"
    ).read_bytes()
    with pytest.raises(UserError, match="is not the file that was first there"):  # a new download is refused, too
        download(mirror, path)
    hashed.write_bytes(b"")
    with pytest.raises(UserError, match="not nothing"):
        download(mirror, path)
    path.unlink()
    hashed.unlink()
    mirror.files["eval_bundle.zip"] = b"<html>"
    with pytest.raises(UserError, match="eval_bundle.zip did not return a zip"):
        download(mirror, path)
    assert not path.exists() and not hashed.exists()
    mirror.faults["eval_bundle.zip"] = ["404"]
    with pytest.raises(UserError, match="eval_bundle.zip answers HTTP 404: check the address"):
        download(mirror, path)
    for fault, words in (("gzip", "is sent with the encoding 'gzip'"), ("huge", "needs 10,000,000,000,000,000 bytes")):
        mirror.faults["eval_bundle.zip"] = [fault]
        with pytest.raises(UserError, match=words):
            download(mirror, path)
        assert not path.exists() and not hashed.exists()
