"""What all tests share: one thread, the order of the files, and which tests `tests/run.sh --quick` leaves out."""

import os
import random
import signal
from pathlib import Path

from tests.variables import remove_variables

remove_variables()
# One thread in every process that a test starts; read when torch is loaded. With two threads on two busy cores, each
# waits for the other, and a step of these small models takes up to ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch.compile compiles three programs to try the CPU's vector instructions, 20 s; which ones it takes does not change
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import megachat.device  # noqa: E402, F401  # sets environment variables before a test has torch compile anything
from megachat import activity  # noqa: E402

activity.ANNOUNCED_AFTER_S = 3600.0  # a busy machine adds no lines

# Started with nohup or `&`, the tests ignore these signals, and so would every program that they start. A handler of
# Python's does nothing here either, and programs start with the default.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

HERE = Path(__file__).parent
# A worker takes the next file when it is done with one: the longest come first, so that all workers end at about the
# same time.
LONGEST_FIRST = [
    "runs/test_multinode.py",
    "runs/test_faults.py",
    "ranks/test_compile.py",
    "ranks/test_layout_checkpoints.py",
    "runs/test_curves.py",
    "runs/test_speedrun.py",
    "runs/test_stalls.py",
    "runs/test_supervisor.py",
    "runs/test_wheel.py",
    "runs/test_verify.py",
    "ranks/test_verify_dry.py",
    "runs/test_layouts.py",
    "runs/test_hostfile.py",
    "runs/test_compile.py",
    "runs/test_slurm.py",
    "ranks/test_recompute.py",
    "test_repo.py",
    "runs/test_launchers.py",
    "runs/test_evaluate.py",
    "ranks/test_pipeline.py",
    "ranks/test_failure_monitor.py",
    "ranks/test_engine.py",
    "runs/test_stop.py",
    "ranks/test_fp8.py",
    "ranks/test_layouts.py",
    "ranks/test_muon_partition.py",
    "ranks/test_core.py",
    "runs/test_resume.py",
    "runs/test_doctor_hosts.py",
    "unit/planning/test_memory.py",
    "unit/convert/test_huggingface_code.py",
    "runs/test_studies.py",
    "runs/test_documented_commands.py",
    "unit/optim/test_row_tables.py",
    "unit/studies/test_report.py",
    "unit/test_config_fuzz.py",
    "unit/programs/test_explain.py",
    "unit/test_api.py",
]
QUICK_RANKS = {  # of tests/ranks and tests/runs, which are slow otherwise
    "ranks/test_harness.py": "",
    "ranks/test_layouts.py": "[dp2 tp2 pp2]",
    "ranks/test_tensor.py": "",
    "runs/test_dry_run.py": "test_a_dry_run",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {item: str(item.path.relative_to(HERE)) for item in items if HERE in item.path.parents}
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(names.get(item, ""), len(order)))
    for item, name in names.items():
        if name.startswith(("ranks/", "runs/")) and not (name in QUICK_RANKS and QUICK_RANKS[name] in item.name):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def same_environment():
    """Undoes what a test, or a program that it calls, changes in the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def one_thread():
    """Sets the number of threads of the ranks that tests start: other numbers may cut a matrix multiplication elsewhere
    and give other bits.
    """
    torch.set_num_threads(1)


def seed_all() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def same_random_numbers_in_fixtures():
    """As same_random_numbers, for the fixtures of a file."""
    seed_all()


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Gives a test the same random numbers whatever ran before it."""
    seed_all()
