"""precision.compile: the same training, compiled once.

Graphs are traced and differentiated as ever, but run without a C++ compiler's minutes: tests/runs/test_compile.py has
the real thing.
"""

from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from megachat.evals.bpb import ValidationRows, bits_per_byte
from megachat.planning.dimensions import NORMS
from megachat.planning.plan import resolve_plan
from megachat.programs.verify_layout import warm_up
from megachat.train.compiled import NewGraphs
from megachat.train.micro_batch_replay import replay_micro_batch
from megachat.train.replicas import compare_replicas
from megachat.train.step import set_schedules
from tests.harness import run_ranks
from tests.training import build, random_rows, rows_of_rank, small_config, take_step

VOCAB, ROWS, LENGTH, STEPS = 97, 4, 160, 4
MODEL = {"aspect_ratio": 16, "head_size": 16, "kv_heads": None, "sequence_len": LENGTH, "window_pattern": "SSSL"}
TABLES = {
    "ngram": {"blocks": (0, 1), "rows": 50},
    "lookup": {"after_blocks": (1,), "rows": 300, "max_rows_per_token": 50},
}
SCALES = {"norm_scales": NORMS}
CASES = {
    "one, all kinds of blocks": (1, {}, {"depth": 12, "aspect_ratio": 8} | SCALES, {}, {}),
    "one, selective": (1, {}, {"depth": 2}, {"recompute": "selective"}, TABLES),
    "tp2 sequence, block": (2, {"tensor": 2, "sequence": True}, {"depth": 2} | SCALES, {"recompute": "block"}, TABLES),
    "pp2": (2, {"pipeline": 2}, {"depth": 2}, {}, TABLES),
}


def trained(config):
    """(loss and norm of every step, bits per byte on the way, graphs made by each step)."""
    training = build(config, VOCAB)
    warm_up(training)
    graphs, outcomes, made = NewGraphs(compiles=config.precision.compile), [], []
    for step in range(STEPS):
        set_schedules(training, step)
        graphs.count()
        rows = random_rows(step, ROWS, LENGTH + 1, VOCAB)
        if step:
            replay_micro_batch(training, rows_of_rank(training, rows), step, Path("no evidence"))
        outcomes.append(take_step(training, rows))
        compare_replicas(training, step + 1, Path("no evidence"))
        made.append(graphs.count())
        if step == 2:  # rows of two lengths, of which one is not training's
            rows = [random_rows(9, 2, length, VOCAB) for length in (LENGTH + 1, 97)]
            bits = [
                bits_per_byte(training.engine, ValidationRows(iter(two.split(1)), 2, 1, training.mesh), training.mesh)
                for two in rows
            ]
    return outcomes, bits, made


def trained_both_ways(config):
    plain = trained(config)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or torch would go on without compiling
    compile_function, attending = torch.compile, []

    def backend(graph, inputs):
        if not torch.is_inference_mode_enabled() and torch.is_grad_enabled():
            attending.append(any("scaled_dot_product" in str(node.target) for node in graph.graph.nodes))
        return aot_eager(graph, inputs)

    torch.compile = lambda *functions, **options: compile_function(*functions, **options | {"backend": backend})
    compiled = trained(config.model_copy(update={"precision": config.precision.model_copy(update={"compile": True})}))
    return plain, compiled, sum(attending)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_compiled_after_the_second_step_and_nothing_changes(case):
    world, parallel, model, batch, tables = CASES[case]
    batch = {"tokens": ROWS * LENGTH, "micro_rows": 2} | batch
    config = small_config(model=MODEL | model, parallel=parallel, batch=batch, **tables)
    for plain, compiled, attending in run_ranks(trained_both_ways, world, config):
        assert plain[2] == [0] * STEPS
        assert compiled[2][0] > 0 and compiled[2][2:] == [0] * (STEPS - 2), compiled[2]
        for (loss, norm, _), (wanted, norm_wanted, _) in zip(compiled[0], plain[0], strict=True):
            assert loss == pytest.approx(wanted, rel=1e-5) and norm == pytest.approx(norm_wanted, rel=1e-4)
        assert compiled[1] == pytest.approx(plain[1], rel=1e-5)
        if world == 1 and not batch.get("recompute"):  # one graph for all blocks of a kind
            dims = resolve_plan(config, 1, VOCAB).dims
            middle = (
                dims.depth // 2
            )  # from which the stream has a tensor more; before the first block two of it are one
            places = [
                (block == 0, block > middle, block == middle, block == dims.depth - 1) for block in range(dims.depth)
            ]
            kinds = {
                (dims.windows[block], dims.has_value_embedding(block), *place) for block, place in enumerate(places)
            }
            assert attending == len(kinds) < dims.depth
