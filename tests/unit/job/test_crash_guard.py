"""A step that fails three times in a row is refused; a job that ends in order, or gets further, leaves no trace."""

import json

import pytest

from megachat.errors import UserError
from megachat.job.crash_guard import CrashGuard


def crash(folder, start: int, step: int) -> None:
    """A job that dies in `step`."""
    guard = CrashGuard(folder, writes=True)
    guard.begin(print)
    for number in range(start, step + 1):
        guard.record_step(number)


def crashes(folder) -> list[int]:
    return [crash["step"] for crash in json.loads((folder / "crashes.json").read_text())]


def test_the_same_step_three_times_is_refused_until_the_user_chooses(tmp_path):
    for _ in range(3):
        crash(tmp_path, 4, 7)
    for _ in range(2):  # again and again
        with pytest.raises(
            UserError,
            match=r"step 7 of .* has failed 3 times in a row, the last time on 20\d\d-.* or remove crashes.json there",
        ):
            CrashGuard(tmp_path, writes=True).begin(print)
    assert crashes(tmp_path) == [7, 7, 7]
    guard = CrashGuard(tmp_path, writes=True)
    guard.begin(print, forget=True)
    assert list(tmp_path.iterdir()) == []
    guard.record_step(2)
    assert (tmp_path / "running").read_text() == "000000000002\n"
    guard.end()
    CrashGuard(tmp_path, writes=True).begin(print)


def test_two_times_or_another_step_between_are_not(tmp_path):
    crash(tmp_path, 4, 7)
    crash(tmp_path, 4, 7)
    crash(tmp_path, 4, 9)
    crash(tmp_path, 8, 9)
    CrashGuard(tmp_path, writes=True).begin(print)
    assert crashes(tmp_path) == [7, 7, 9, 9]


def test_an_end_in_order_is_no_crash(tmp_path):
    for _ in range(4):
        guard = CrashGuard(tmp_path, writes=True)
        guard.begin(print)
        guard.record_step(5)
        guard.end()
        assert list(tmp_path.iterdir()) == []
    crash(tmp_path, 0, 1)
    guard = CrashGuard(tmp_path, writes=True)
    guard.begin(print)
    guard.end()
    guard.forget()
    assert list(tmp_path.iterdir()) == []


def test_only_the_writer_writes(tmp_path):
    guard = CrashGuard(tmp_path, writes=False)
    guard.begin(print)
    guard.record_step(4)
    guard.end()
    guard.forget()
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_before_its_first_step_does_not_count(tmp_path):
    crash(tmp_path, 4, 7)
    for _ in range(5):  # for example a traceback while the model is built
        CrashGuard(tmp_path, writes=True).begin(print)
    assert crashes(tmp_path) == [7] and not (tmp_path / "running").exists()
    for _ in range(2):
        crash(tmp_path, 7, 7)  # dies in its first step, for example in a kernel
    with pytest.raises(UserError, match="step 7 of .* has failed 3 times in a row"):
        CrashGuard(tmp_path, writes=True).begin(print)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 13, b"[{", b"\xff", b'{"step": 7}', b'[{"step": Infinity, "seen": 1}]']
)
def test_records_that_cannot_be_read_are_set_aside(content, tmp_path):
    for _ in range(2):
        (tmp_path / "running").write_bytes(content)
        (tmp_path / "crashes.json").write_bytes(content)
        lines = []
        CrashGuard(tmp_path, writes=True).begin(lines.append)
        assert len(lines) == 2 and all("is damaged" in line and ".damaged" in line for line in lines)
    names = ["crashes.json.damaged", "crashes.json.damaged.2", "running.damaged", "running.damaged.2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {content}


def test_a_run_folder_that_vanished_is_reported(tmp_path):
    for at_start in (True, False):
        folder = tmp_path / "run"
        folder.mkdir()
        guard = CrashGuard(folder, writes=True)
        guard.begin(print)
        if not at_start:
            guard.record_step(3)
            (folder / "running").unlink()
        folder.rmdir()
        with pytest.raises(UserError, match="step 4: the run folder .*/run no longer exists"):
            guard.record_step(4)
        guard.end()
