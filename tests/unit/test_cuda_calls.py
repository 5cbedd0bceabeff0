"""Every call of torch.cuda in megachat/ runs in a test on a CPU, with a stand-in where it needs a GPU."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import megachat
from megachat import device as device_module
from megachat.checkpoint.saver import Saver
from megachat.device import (
    compute_capability,
    device_name,
    gpu_id,
    memory_bytes,
    peak_memory_bytes,
    random_states,
    restore_random_states,
    synchronize,
    this_device,
)
from megachat.doctor import installed
from megachat.doctor import rank as doctor_rank
from megachat.errors import UserError
from megachat.job.launch import bootstrap_environment, describe_environment
from megachat.parallel.work_time import WorkTime
from megachat.programs import probe
from tests.unit.checkpoint.test_checkpoint import ALONE, whole

SOURCES, ROOT = Path(megachat.__file__).parent, Path(__file__).resolve().parents[2]
GPU, HERE = torch.device("cuda", 1), "tests/unit/test_cuda_calls.py::"
_DEVICE = f"{HERE}test_the_properties_of_a_gpu"
# file -> call -> the test that runs it, or why there is none. "": torch.cuda is passed on, and the test passes a
# stand-in.
CALLS = {
    "api/model.py": {"device_count": "tests/unit/test_api.py::test_bad_arguments_are_one_sentence_with_the_value"},
    "checkpoint/saver.py": {"synchronize": f"{HERE}test_a_save_waits_for_its_copies_from_the_gpu"},
    "data/staging.py": {
        "": "tests/unit/data/test_staging.py::test_kernels_read_the_rows_of_their_step_whatever_the_streams_order"
    },
    "device.py": {
        "is_available": _DEVICE,
        "get_device_capability": _DEVICE,
        "get_device_name": _DEVICE,
        "get_device_properties": _DEVICE,
        "mem_get_info": _DEVICE,
        "synchronize": _DEVICE,
        "max_memory_allocated": _DEVICE,
        "get_rng_state": f"{HERE}test_the_random_numbers_of_a_gpu_continue",
        "set_rng_state": f"{HERE}test_the_random_numbers_of_a_gpu_continue",
    },
    "doctor/installed.py": dict.fromkeys(
        ("is_available", "get_device_name", "device_count", "nccl.version"), f"{HERE}test_the_doctor_lists_the_gpus"
    ),
    "commands/speedrun.py": {"device_count": "as in job/launch.py; it only chooses the layout that is planned"},
    "doctor/rank.py": dict.fromkeys(("device_count", "get_device_name"), f"{HERE}test_the_doctor_measures_every_gpu"),
    "job/launch.py": {
        "is_available": "tests/unit/job/test_launch.py::test_a_rank_uses_the_gpu_of_its_local_rank_or_the_only_one",
        "set_device": "tests/unit/job/test_launch.py::test_a_rank_uses_the_gpu_of_its_local_rank_or_the_only_one",
        "device_count": f"{HERE}test_a_launcher_that_chooses_no_gpu_is_refused",
    },
    "optim/graph.py": {"": "tests/unit/optim/test_graph.py::test_a_replayed_update_is_equal_to_the_bit"},
    "parallel/work_time.py": {"Event": f"{HERE}test_the_time_of_work_is_that_between_events"},
    "programs/probe.py": {"device_count": f"{HERE}test_a_probe_starts_a_rank_per_gpu"},
    "programs/self_test.py": {"empty_cache": "it returns unused memory to the GPU and has no result"},
}


def calls_of(path: Path) -> set[str]:
    """The names after torch.cuda in a file, "" where nothing follows."""
    names, inner = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):  # from the outside in
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            base, parts = node, []
            while isinstance(base, ast.Attribute):
                inner.add(id(base))
                parts.insert(0, base.attr)
                base = base.value
            if isinstance(base, ast.Name) and base.id == "torch" and parts[0] == "cuda":
                names.add(".".join(parts[1:]))
    return names


def test_every_call_has_a_test():
    calls = {path.relative_to(SOURCES).as_posix(): calls_of(path) for path in SOURCES.rglob("*.py")}
    assert {path: names for path, names in calls.items() if names} == {
        path: set(names) for path, names in CALLS.items()
    }
    for tests in CALLS.values():
        for test in (test for test in tests.values() if "::" in test):
            path, name = test.split("::")
            assert f"def {name}(" in (ROOT / path).read_text(), test


def test_the_page_names_all_tests_that_need_a_gpu():
    """docs/performance.md, "What no GPU has proved"; tests/run_gpu.sh runs the whole folder."""
    page = (ROOT / "docs/performance.md").read_text().partition("## What no GPU has proved")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(tests/gpu/\w+\.py)`", page))
    assert named == {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert "-m pytest tests/gpu " in (ROOT / "tests/run_gpu.sh").read_text()


@pytest.fixture
def cuda(monkeypatch):
    """cuda(name=function, ...) replaces functions of torch.cuda; returns the names that were called."""
    called = []

    def replace(**functions):
        for name, function in functions.items():

            def noted(*arguments, name=name, function=function, **options):
                called.append((name, *arguments))
                return function(*arguments, **options)

            monkeypatch.setattr(torch.cuda, name, noted)
        return called

    return replace


def test_the_properties_of_a_gpu(cuda):
    properties = SimpleNamespace(uuid="GPU-1234")
    called = cuda(
        is_available=lambda: True,
        get_device_capability=lambda device: (9, 0),
        get_device_name=lambda device: "NVIDIA H100 80GB HBM3",
        get_device_properties=lambda device: properties,
        mem_get_info=lambda device: (70, 80),
        synchronize=lambda device: None,
        max_memory_allocated=lambda device: 60,
    )
    assert this_device() == torch.device("cuda") and device_module.has_native_bfloat16(GPU)
    assert (compute_capability(GPU), device_name(GPU), gpu_id(GPU)) == ((9, 0), "NVIDIA H100 80GB HBM3", "GPU-1234")
    assert device_module.peak_flops(GPU) == 989e12
    assert (memory_bytes(GPU, 8), peak_memory_bytes(GPU)) == (80, 60)
    synchronize(GPU)
    assert all(arguments == [GPU] for name, *arguments in called if name != "is_available"), "of this rank's GPU"


def test_the_random_numbers_of_a_gpu_continue(cuda):
    called = cuda(
        get_rng_state=lambda device: torch.arange(16, dtype=torch.uint8), set_rng_state=lambda state, device: None
    )
    restore_random_states(random_states(GPU), GPU)
    (_, read_from), (_, state, written_to) = called
    assert (read_from, written_to, state.tolist()) == (GPU, GPU, list(range(16)))


def test_the_time_of_work_is_that_between_events(cuda):
    """Events are counted in place of milliseconds."""
    count = iter(range(100))

    class Event:
        def record(self):
            self.at = 1000 * next(count)

        def elapsed_time(self, end):
            return end.at - self.at

    cuda(Event=lambda enable_timing: Event())
    work = WorkTime(cuda=True)
    work.start()
    with work.working():  # 0 to 3, less 1 to 2
        work.pause(launches=True)  # in the middle of a layer: not subtracted
        work.resume()
        work.pause(launches=False)
        work.resume()
    assert work.finish() == 3 - 1


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU, and whose copies arrive at the next synchronize()."""

    is_cuda = True


def test_a_save_waits_for_its_copies_from_the_gpu(cuda, monkeypatch):
    copies, wrote, real = [], [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **k: (copies.append(pin_memory), real(*a, **k))[1])
    called = cuda(synchronize=lambda: None)
    weight = torch.ones(3).as_subclass(OnGpu)
    saver = Saver(ALONE)

    def write(pieces, axis):
        wrote.append(pieces["model/a"][1][0][2].tolist())
        return Path("saved")

    saver.begin(whole({"model/a": weight}), write)
    assert copies == [True] and called == [("synchronize",)], "the copy is pinned, and complete when begin() returns"
    weight.add_(1)
    saver.wait()
    assert wrote == [[1.0] * 3]


def test_the_doctor_lists_the_gpus(cuda, monkeypatch):
    cuda(is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: real(*shape))
    facts = installed._torch_facts()
    assert (facts["torch_sees"], facts["nccl"]) == (["GPU 0", "GPU 1"], "2.27.5")


def test_the_doctor_measures_every_gpu(cuda, monkeypatch, capsys):
    devices, real = [], torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, dtype: (devices.append(device), real(2, 2))[1])
    monkeypatch.setattr(doctor_rank, "median_seconds", lambda action, device: (action(), 2.0)[1])
    monkeypatch.setattr(doctor_rank, "bootstrap_environment", lambda: SimpleNamespace(world_size=1, rank=0))
    monkeypatch.setattr(doctor_rank, "choose_device", lambda environment: torch.device("cuda", 0))
    cuda(device_count=lambda: 2, get_device_name=lambda: "NVIDIA H200")
    doctor_rank.main()
    (result,) = json.loads(capsys.readouterr().out)
    assert result == {"device": "NVIDIA H200", "matrix": [8192**3 * 20.0] * 2, "pairs": {}}
    assert devices == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_a_launcher_that_chooses_no_gpu_is_refused(cuda, monkeypatch):
    cuda(device_count=lambda: 4, get_device_name=lambda device: "NVIDIA H200")
    assert describe_environment(GPU)["device_count"] == 4
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="rank 1 sees 4 GPUs, and .* set no LOCAL_RANK that chooses one"):
        bootstrap_environment()


def test_a_probe_starts_a_rank_per_gpu(cuda, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(probe, "measure_machine", lambda config, vocab_size, ranks: seen.append(ranks) or {})
    monkeypatch.setattr(probe, "describe_probe", lambda document: [])
    for count in (8, 0):
        cuda(device_count=lambda count=count: count)
        options = SimpleNamespace(config=ROOT / "configs/d4_cpu.json", set=[], out=tmp_path / "probe.json", ranks=None)
        probe.probe_this_machine(options)
    assert seen == [(1, 8), (1, 2)]
