"""Two processes on one run folder."""

import json
import multiprocessing

import pytest

from megachat.errors import UserError
from megachat.job.run_lock import run_lock
from tests.limits import limit_s


def hold(folder, taken, end) -> None:
    with run_lock(folder):
        taken.set()
        end.wait(limit_s())


def test_the_second_learns_who_has_it_until_the_first_ends_however(tmp_path):
    context = multiprocessing.get_context("fork")
    taken, end = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "run", taken, end))
    holder.start()
    assert taken.wait(limit_s())
    with pytest.raises(
        UserError, match=rf"run is in use by another job, with rank 0 on \S+ \(pid {holder.pid}\) since "
    ) as error:
        with run_lock(tmp_path / "run"):
            pass
    assert "--set run.name=NAME" in str(error.value)
    holder.kill()
    holder.join()
    with run_lock(tmp_path / "run") as remark:
        assert remark is None and json.loads((tmp_path / "run" / "lock").read_text())["pid"] != holder.pid
    with run_lock(tmp_path / "run"):  # given back at the end of the block
        pass
