"""Files beside a training: what cannot be read is set aside, and the rest of the folder stays."""

import json

import pytest

from megachat.errors import UnreadableError, UserError
from megachat.files import (
    check_writable,
    is_readable_json,
    read_side_file,
    refuse_damaged,
    set_aside,
    write_atomically,
    write_side_json,
)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_result_counts_as_none_and_is_set_aside_when_it_is_written_again(content, tmp_path):
    path, lines = tmp_path / "samples" / "step_000004.json", []
    path.parent.mkdir()
    path.write_bytes(content)
    assert not is_readable_json(path)
    write_side_json(path, {"text": "é"}, lines.append)
    assert is_readable_json(path) and path.with_name("step_000004.json.damaged").read_bytes() == content
    (line,) = lines
    assert line.startswith(f"{path} is damaged (") and "step_000004.json.damaged" in line and "\n" not in line
    write_side_json(path, {}, lines.append)
    assert len(lines) == 1 and json.loads(path.read_text()) == {}


def test_a_file_in_the_place_of_a_folder_and_a_folder_in_that_of_a_file_are_set_aside(tmp_path):
    lines = []
    (tmp_path / "samples").write_text("no folder")
    write_side_json(tmp_path / "samples" / "step_000004.json", {}, lines.append)
    (tmp_path / "environment.json").mkdir()
    assert read_side_file(tmp_path / "environment.json", json.loads, lines.append) is None
    assert (
        len(lines) == 2
        and (tmp_path / "samples.damaged").is_file()
        and (tmp_path / "environment.json.damaged").is_dir()
    )


def test_what_is_set_aside_replaces_nothing(tmp_path):
    names = []
    for number in range(3):
        (tmp_path / "file").write_text(str(number))
        names.append(set_aside(tmp_path / "file").name)
    assert names == ["file.damaged", "file.damaged.2", "file.damaged.3"]
    assert [(tmp_path / name).read_text() for name in names] == ["0", "1", "2"]


def test_a_damaged_file_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "index.json"

    def read():
        with refuse_damaged(path, "cannot be read ({}): copy it again"):
            return json.loads(path.read_bytes())["tensors"]

    for content, problem in (
        (b"{", "JSONDecodeError: Expecting"),
        (b"{}", "KeyError: 'tensors'"),
        (b"3", "TypeError: "),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value).startswith(f"{path} cannot be read ({problem}") and "): copy it again" in str(
            error.value
        )
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="index.json is a Git LFS pointer"):
        read()
    path.unlink()
    path.mkdir()
    with pytest.raises(UnreadableError, match="Is a directory"):
        read()
    with pytest.raises(RuntimeError, match="a bug"), refuse_damaged(path, "{}"):
        raise RuntimeError("a bug")


def test_a_failed_write_leaves_no_temporary_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_output_file_is_checked_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "out.json")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(UserError, match=r"--json .*new is a folder"):
        check_writable(tmp_path / "new", "--json")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / "file" / "out.json")
