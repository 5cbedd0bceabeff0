"""A step that fails three times in a row is refused; a job that ends in order, or gets further, leaves no trace."""

import json

import pytest

from megachat.errors import UserError
from megachat.job.crash_guard import CrashGuard


def crash(folder, start: int, step: int) -> None:
    """A job that dies in `step`."""
    guard = CrashGuard(folder, writes=True)
    guard.begin(start)
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
            CrashGuard(tmp_path, writes=True).begin(4)
    assert crashes(tmp_path) == [7, 7, 7]
    guard = CrashGuard(tmp_path, writes=True)
    guard.begin(2, forget=True)
    assert not (tmp_path / "crashes.json").exists() and (tmp_path / "running").read_text() == "000000000002\n"
    guard.end()
    CrashGuard(tmp_path, writes=True).begin(4)


def test_two_times_or_another_step_between_are_not(tmp_path):
    crash(tmp_path, 4, 7)
    crash(tmp_path, 4, 7)
    crash(tmp_path, 4, 9)
    crash(tmp_path, 8, 9)
    CrashGuard(tmp_path, writes=True).begin(8)
    assert crashes(tmp_path) == [7, 7, 9, 9]


def test_an_end_in_order_is_no_crash(tmp_path):
    for _ in range(4):
        guard = CrashGuard(tmp_path, writes=True)
        guard.begin(3)
        guard.record_step(5)
        guard.end()
        assert list(tmp_path.iterdir()) == []
    crash(tmp_path, 0, 1)
    guard = CrashGuard(tmp_path, writes=True)
    guard.begin(0)
    guard.end()
    guard.forget()
    assert list(tmp_path.iterdir()) == []


def test_only_the_writer_writes(tmp_path):
    guard = CrashGuard(tmp_path, writes=False)
    guard.begin(3)
    guard.record_step(4)
    guard.end()
    guard.forget()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "running").write_text("torn")
    (tmp_path / "crashes.json").write_text("[{")
    CrashGuard(tmp_path, writes=True).begin(1)  # unreadable records count as none
    assert not (tmp_path / "crashes.json").exists()
