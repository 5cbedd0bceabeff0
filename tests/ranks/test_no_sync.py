"""A training step does not make the host wait for a GPU, but for what SYNCHRONIZES lists.

On a CPU the same operations run, so the test needs no GPU. A read of a tensor's value, an operation whose result's
shape depends on values, and a copy to the CPU are waits there.
"""

import dataclasses
import functools
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megachat.train.step as step_module
from megachat.optim.graph import StepGraph, UpdateGraph
from megachat.programs.probe_step import timed_step
from megachat.train.build import Run
from megachat.train.step import set_schedules, train_step
from tests.harness import run_ranks
from tests.oracle import ROWS, TOKENS
from tests.test_house import BESIDE_STEP_PATH, STEP_PATH
from tests.training import SMALL_VOCAB, build, random_rows, rows_of_rank, small_config, take_step, whole_state
from tests.unit.optim.test_graph import FakeCuda

# (file, function, operation) -> why the step may wait there, or why it does not wait on a GPU
WAITS = {
    ("megachat/train/step.py", "train_step", "synchronize"): "a step's clock starts and stops when all work is done",
    ("megachat/train/step.py", "train_step", "item"): "the loss for the log, as the last thing of a step",
    ("megachat/optim/joint.py", "optimizer_step", "tolist"): "norm and requests: whether to skip the step",
    ("megachat/optim/joint.py", "optimizer_step", "item"): "no wait: the norm is on the host",
    ("deepspeed/runtime/utils.py", "is_invalid_grad_norm", "item"): "no wait: the norm is on the host",
    (
        "deepspeed/runtime/pipe/engine.py",
        "_exec_load_micro_batch",
        "to",
    ): "no wait: to the rank's device",
    ("deepspeed/runtime/pipe/engine.py", "_aggregate_total_loss", "to"): "no wait: to the rank's device, where it is",
}
_LOOKUP, _ROWS = "megachat/kernels/lookup.py", "megachat/optim/row_tables.py"
WAITS_OF_TABLES = {
    (_LOOKUP, "token_groups", "cpu"): "tokens with as many rows are read together; the host makes the groups",
    (_LOOKUP, "token_groups", "numpy"): "the same",
    (_LOOKUP, "_make_groups", "cpu"): "the same",
    (_LOOKUP, "_make_groups", "numpy"): "the same",
    (_LOOKUP, "_to", "to"): "no wait: to the rank's device",
    (_ROWS, "exchange_requests", "_unique2"): "how many distinct rows there are decides the size of what is sent",
    (_ROWS, "exchange_requests", "tolist"): "the same",
    (_ROWS, "exchange_requests", "repeat_interleave"): "the same",
    (_ROWS, "exchange_requests", "to"): "no wait: to the rank's device",
    (_ROWS, "add_pending", "_unique2"): "how many distinct rows have a gradient",
}
READS = "item tolist numpy cpu __contains__ is_nonzero equal allclose".split()
ITEMS = "__bool__ __int__ __float__ __index__ _local_scalar_dense".split()  # other forms of item()
SHAPED_BY_VALUES = {
    "nonzero", "argwhere", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "repeat_interleave", "item", "is_nonzero", "equal", "histc",
}  # fmt: skip


def place() -> tuple[str, str]:
    """The innermost frame outside of torch and this file: (file, function)."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            path = Path(frame.filename).as_posix()
            for part in ("/deepspeed/", "/megachat/"):
                if part in path:
                    return path[path.rindex(part) + 1 :], frame.name
            return path, frame.name
    raise AssertionError("no frame")


class Operations(TorchDispatchMode):
    """Notes operations whose result the host must know."""

    def __init__(self, noted: list):
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(one, torch.Tensor) and one.dtype in (torch.bool, torch.uint8) for one in tree_leaves(args[1])
        )
        if (
            name in SHAPED_BY_VALUES
            and not (name == "repeat_interleave" and (kwargs or {}).get("output_size"))
            or masks
        ):
            self.noted.append((*place(), f"{name} by a mask" if masks else name))
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes values that the host reads, and copies to the CPU, which are none on a CPU."""

    def __init__(self, noted: list):
        super().__init__()
        self.noted = noted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        name = "item" if name in ITEMS else name
        devices = [*args[1:], *(kwargs or {}).values()] if name == "to" else []
        if name in READS or any(str(one) == "cpu" for one in devices):
            self.noted.append((*place(), name))
        return function(*args, **(kwargs or {}))


def observed(config):
    """What makes the host wait in the third step, and the files of megachat/ that the second one runs."""
    training = build(config, SMALL_VOCAB)
    rows = [rows_of_rank(training, random_rows(step, ROWS, TOKENS, SMALL_VOCAB)) for step in range(3)]
    run = Run(**vars(training), folder=None, tokenizer=None, loader=iter(rows), bundle=None)
    train_step(run, 0)
    files = set()
    sys.setprofile(lambda frame, *_: files.add(frame.f_code.co_filename))
    train_step(run, 1)
    sys.setprofile(None)
    noted: list = []

    def synchronize(*_):
        noted.append((*place(), "synchronize"))

    step_module.synchronize = synchronize
    get_accelerator().synchronize = synchronize
    with Operations(noted), Reads(noted):
        train_step(run, 2)
    package = Path(step_module.__file__).parents[1]
    return noted, {Path(file).relative_to(package).as_posix() for file in files if file.startswith(f"{package}/")}


TABLES = {
    "lookup": {"after_blocks": (0,), "rows": 400, "max_rows_per_token": 60},
    "ngram": {"blocks": (0, 2), "rows": 60},
}
SEQUENCE = {"tensor": 2, "pipeline": 2, "sequence": True}
SCALES = ("query", "key", "mlp")
CASES = {
    "dp2": (2, {}, {"optimizer": {"clip_norm": 0.2, "z_loss": 1e-4, "qk_clip": 4.0}, "model": {"norm_scales": SCALES}}),
    "tp2 pp2 sequence": (4, SEQUENCE, {"model": {"aspect_ratio": 32, "kv_heads": 2}}),
    "lookup and ngram": (1, {}, TABLES),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_the_device_and_runs_files_only_as_listed(case):
    world, parallel, changes = CASES[case]
    config = small_config(**changes, parallel=parallel)
    ranks = run_ranks(observed, world, config)
    noted = {one for waits, _ in ranks for one in waits}
    listed = set(WAITS) | (set(WAITS_OF_TABLES) if changes is TABLES else set())
    assert noted <= listed, "\n".join(map(str, sorted(noted - listed)))
    assert set(WAITS) - {one for one in WAITS if one[2] == "to"} <= noted, "a wait that is gone stays listed"
    if changes is TABLES:
        assert set(WAITS_OF_TABLES) <= noted
        return
    files = {file for _, rank in ranks for file in rank}
    assert files <= {*STEP_PATH, *BESIDE_STEP_PATH}
    # a step reads the values of mesh.py; only a tensor axis communicates as tensor.py says
    assert set(STEP_PATH) - files == {"parallel/mesh.py"} | ({"parallel/tensor.py"} if not parallel else set())


class WatchedCuda(FakeCuda):
    """Notes what makes the host wait during a capture."""

    def __init__(self):
        super().__init__()
        self.noted: list = []

    @contextmanager
    def graph(self, graph, capture_error_mode):
        with Operations(self.noted), Reads(self.noted), super().graph(graph, capture_error_mode):
            yield


def spoil(adamw) -> None:
    adamw.local_gradients()[0].view(-1)[:1].fill_(torch.inf)


def updated():
    """The state after six steps, the fourth with a gradient that is not finite: as ZeRO does the update, with a graph,
    and with a graph and rates that are no tensors. Also the captures, the replays, and what made the host wait in the
    captures, of the graphs."""
    states, graphs = [], []
    for case in ("ZeRO", "graph", "rates"):
        training = build(small_config(**GRAPH), SMALL_VOCAB)
        if case != "ZeRO":
            graphs.append(WatchedCuda())
            of_cuda = UpdateGraph(training.engine.adamw, training.muon, StepGraph(graphs[-1]))
            training = dataclasses.replace(training, graph=of_cuda)
        adamw = training.engine.adamw
        for step in range(6):
            set_schedules(training, step)
            for group in adamw.param_groups if case == "ZeRO" else ():
                group["lr"] = torch.tensor(group["lr"]).item()  # rounded to float32
            for group in adamw.param_groups if case == "rates" else ():
                group["lr"] = torch.tensor(group["lr"].item())  # another tensor in each step
            rows = random_rows(step, ROWS, TOKENS, SMALL_VOCAB)
            if case == "ZeRO" and step == 5:  # megachat probe measures what a step does, the clip included
                timed_step(training, rows_of_rank(training, rows))
                continue
            how = {"inspect_gradients": functools.partial(spoil, adamw)} if step == 3 else {}
            *_, skipped = take_step(training, rows, **how)
            assert skipped == (step == 3)
        states.append(whole_state(training))
    differences = [
        [name for name in states[0] if not torch.equal(states[0][name], other[name])] for other in states[1:]
    ]
    return differences, [(one.captures, one.replays, one.noted) for one in graphs]


GRAPH = {
    "parallel": {"pipeline": 2},
    "precision": {"compute": "bfloat16"},
    "optimizer": {"clip_norm": 0.2, "qk_clip": 2.0, "warmup_steps": 8},  # every step has another rate
    "model": {"norm_scales": SCALES},
    "ngram": {"blocks": (0, 2), "rows": 60},
    "batch": {"micro_rows": 4},
}


def test_the_update_as_a_graph_waits_for_nothing_and_is_equal_to_the_bit():
    for (of_graph, of_fault), graphs in run_ranks(updated, 2):
        assert of_graph == [] and graphs == [(1, 3, [])] * 2
        assert of_fault, "a rate in another tensor is noticed"


def test_what_waits_is_noticed():
    x = torch.arange(4.0)
    waits = {
        "item": [lambda: x[0].item(), lambda: float(x[1]), lambda: bool(x[1]), lambda: [0, 1][x.long()[1]]],
        "tolist": [x.tolist],
        "cpu": [x.cpu],
        "to": [lambda: x.to("cpu"), lambda: x.to(device=torch.device("cpu"))],
        "nonzero": [x.nonzero],
        "_unique2": [x.unique],
        "masked_select": [lambda: x.masked_select(x > 1)],
        "index by a mask": [lambda: x[x > 1]],
        "index_put_ by a mask": [lambda: x.index_put_((x > 9,), torch.zeros(()))],
        "repeat_interleave": [lambda: x.repeat_interleave(x.long())],
    }
    for name, functions in waits.items():
        for function in functions:
            noted: list = []
            with Operations(noted), Reads(noted):
                function()
            assert name in {operation for *_, operation in noted}, name
    noted = []
    with Operations(noted), Reads(noted):
        x.to(torch.float64).mul_(2).sum().clamp_min(1), x[torch.tensor([1, 2])], x.repeat_interleave(2)
    assert noted == []
