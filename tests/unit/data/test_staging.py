"""Rows on their way to a GPU, on a simulated one: streams run in any order that events allow."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from megachat.data import loader as loader_module
from megachat.data.staging import Staging, staging_for
from tests.limits import limit_s, until
from tests.unit.data.corpus import byte_tokenizer, random_texts, write_folder

SHAPE, STEPS = (3, 5), 12


class Event:
    def __init__(self, gpu):
        self.gpu, self.recorded, self.done = gpu, 0, 0

    def record(self, stream):
        self.recorded += 1
        stream.queue.append((lambda version=self.recorded: setattr(self, "done", version), None))

    def synchronize(self):
        while self.done < self.recorded:
            self.gpu.run(1)


class Stream:
    def __init__(self, gpu):
        self.gpu, self.queue = gpu, []
        gpu.streams.append(self)

    def wait_event(self, event):
        self.queue.append((lambda: None, (event, event.recorded)))

    def wait_stream(self, other):
        event = Event(self.gpu)
        event.record(other)
        self.wait_event(event)


class Buffer:
    """Device memory: a copy into it happens when its stream gets to it, from what the source holds then."""

    def __init__(self, gpu, shape):
        self.gpu, self.values = gpu, torch.zeros(shape, dtype=torch.int64)

    def copy_(self, source, non_blocking):
        assert non_blocking
        self.gpu.now.queue.append((lambda: self.values.copy_(source), None))


class FakeGpu:
    """torch.cuda as far as Staging uses it."""

    def __init__(self, seed):
        self.random, self.streams = random.Random(seed), []
        self.now = self.main = Stream(self)

    def Stream(self, device):
        return Stream(self)

    def Event(self):
        return Event(self)

    def current_stream(self, device):
        return self.now

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def empty(self, shape, dtype, pin_memory=False, device=None):
        return torch.zeros(shape, dtype=dtype) if pin_memory else Buffer(self, shape)

    def run(self, count):
        """Runs up to `count` operations, each of any stream that does not wait."""
        for _ in range(count):
            heads = [stream for stream in self.streams if stream.queue]
            ready = [s for s in heads if s.queue[0][1] is None or s.queue[0][1][0].done >= s.queue[0][1][1]]
            if not ready:
                assert not heads, "the streams wait for each other"
                return
            work, _ = self.random.choice(ready).queue.pop(0)
            work()

    def staging(self, shape):
        return Staging(torch.device("cuda:3"), shape, cuda=self, empty=self.empty)

    def read(self, rows, into):
        """A kernel that reads the rows."""
        self.main.queue.append((lambda: into.append(rows.values.clone()), None))


def train(gpu, lag):
    """What kernels of each step read, two per step, and what they should."""
    staging, seen, wanted = gpu.staging(SHAPE), [], []
    rows = np.empty(SHAPE, dtype=np.int64)  # one array for all steps: start() must not keep it
    rows[:] = 0
    staging.start(rows)
    for step in range(STEPS):
        taken = staging.take()
        rows[:] = step + 1
        staging.start(rows)
        for _ in range(2):
            gpu.read(taken, seen)
            wanted.append(torch.full(SHAPE, step))
            gpu.run(gpu.random.randrange(lag))
    gpu.run(10**6)
    return seen, wanted


def is_right(seen, wanted):
    return len(seen) == len(wanted) and all(torch.equal(one, other) for one, other in zip(seen, wanted, strict=True))


@pytest.mark.parametrize("lag", [1, 3, 8])
def test_kernels_read_the_rows_of_their_step_whatever_the_streams_order(lag):
    for seed in range(20):
        assert is_right(*train(FakeGpu(seed), lag)), seed


@pytest.mark.parametrize(
    "owner, name",
    [(Event, "synchronize"), (Stream, "wait_event")],
    ids=["the host does not wait for a copy", "no stream waits for the other"],
)
def test_the_simulation_finds_a_buffer_that_is_overwritten(owner, name, monkeypatch):
    monkeypatch.setattr(owner, name, lambda *_: None)
    assert not all(is_right(*train(FakeGpu(seed), 3)) for seed in range(20))


@pytest.mark.parametrize("waits", ["side", "main"])
def test_each_stream_must_wait(waits, monkeypatch):
    """Only one of the two waits: the other's missing one shows."""
    right = Stream.wait_event
    monkeypatch.setattr(
        Stream, "wait_event", lambda s, e: right(s, e) if (s is s.gpu.main) == (waits == "main") else None
    )
    assert not all(is_right(*train(FakeGpu(seed), 3)) for seed in range(20))


def test_calls_out_of_order_are_refused():
    staging = FakeGpu(0).staging(SHAPE)
    with pytest.raises(RuntimeError, match="without start"):
        staging.take()
    staging.start(np.zeros(SHAPE, dtype=np.int64))
    with pytest.raises(RuntimeError, match="without take"):
        staging.start(np.zeros(SHAPE, dtype=np.int64))


def test_every_name_of_a_gpu_is_staged_and_no_cpu(monkeypatch):
    monkeypatch.setattr("megachat.data.staging.Staging", lambda device, shape: (device, shape))
    for device in ("cuda", "cuda:3", torch.device("cuda"), torch.device("cuda", 3)):
        assert staging_for(device, SHAPE) == (torch.device(device), SHAPE)
    assert staging_for("cpu", SHAPE) is staging_for(torch.device("cpu"), SHAPE) is None


def test_the_loader_stages_a_step_ahead_and_its_state_is_that_of_the_rows_returned(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, [random_texts(120, 3), random_texts(20, 4)])
    settings = {"split": "train", "row_tokens": 20, "rows": 4, "streams": 2}
    with loader_module.Loader(folder, byte_tokenizer(), **settings) as loader:
        wanted = [next(loader) for _ in range(6)]
    gpu, devices = FakeGpu(1), []
    monkeypatch.setattr(
        loader_module, "staging_for", lambda device, shape: devices.append(device) or gpu.staging(shape)
    )
    seen = []
    with loader_module.Loader(folder, byte_tokenizer(), **settings, device="cuda:1") as loader:
        for step in range(4):
            gpu.read(next(loader), seen)
            assert loader.step == loader.state()["header"]["step"] == step + 1
            gpu.run(gpu.random.randrange(4))
            until(loader._packed.full, "rows that are packed ahead", every_s=0.005)
        assert loader._staged.step == 5, "the next step's rows are on their way"
        state = loader.state()
    gpu.run(10**6)
    with loader_module.Loader(folder, byte_tokenizer(), **settings, device="cuda:1", state=state) as loader:
        for _ in range(2):
            gpu.read(next(loader), seen)
            gpu.run(3)
    gpu.run(10**6)
    assert devices == ["cuda:1", "cuda:1"] and is_right(seen, wanted)


def test_an_error_behind_staged_rows_is_raised_in_its_turn(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, [random_texts(120, 3), random_texts(20, 4)])
    gpu, pack = FakeGpu(2), loader_module.Loader._pack

    def fail_at_two(loader, step):
        if step == 2:
            raise ZeroDivisionError("in the thread")
        return pack(loader, step)

    monkeypatch.setattr(loader_module, "staging_for", lambda device, shape: gpu.staging(shape))
    monkeypatch.setattr(loader_module.Loader, "_pack", fail_at_two)
    settings = {"split": "train", "row_tokens": 20, "rows": 4, "streams": 2, "prefetch_steps": 4}
    with loader_module.Loader(folder, byte_tokenizer(), **settings, device="cuda") as loader:
        loader._thread.join(limit_s())
        next(loader)
        next(loader)
        with pytest.raises(ZeroDivisionError, match="in the thread"):
            next(loader)
