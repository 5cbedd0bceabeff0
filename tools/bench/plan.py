"""Measures how far the planner's predicted step is from the step: calibrated by a probe of one config, compared on
others.
"""

import statistics
from argparse import Namespace
from datetime import timedelta

import torch

from megachat.activity import log_line
from megachat.config import load_config
from megachat.device import collective_backend
from megachat.job.launch import bootstrap_environment, choose_device
from megachat.job.local_ranks import run_local_ranks
from megachat.parallel.build import start_collectives
from megachat.parallel.mesh import build_mesh
from megachat.planning.plan import resolve_without_text
from megachat.planning.probe import Probe
from megachat.planning.step_time import predict_step
from megachat.programs.probe import describe_probe, measure_machine
from megachat.programs.probe_step import calibrate, random_rows, timed_step
from megachat.text import text_table
from megachat.train.build import build_training_model
from megachat.train.step import set_schedules

BASE = "as calibrated"
CASES: dict[str, tuple[int, list[str]]] = {  # ranks, settings
    BASE: (1, []),
    "depth 6": (1, ["model.depth=6"]),
    "micro_rows 1": (1, ["batch.micro_rows=1"]),
    "micro_rows 2": (1, ["batch.micro_rows=2"]),
    "micro_rows 8": (1, ["batch.micro_rows=8"]),
    "recompute block": (1, ["batch.recompute=block"]),
    "2 data ranks": (2, []),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "pipeline 2": (2, ["parallel.pipeline=2"]),
}
SECTION_SEC = 5.0  # of the probe


def measure_cases(config_path: str, cases: dict[str, list[str]], vocab_size: int, rounds: int) -> dict[str, list[dict]]:
    """Returns the seconds of the phases of each round by case; the cases take turns, and the first round is not
    counted. All ranks call it."""
    device = choose_device(bootstrap_environment())
    start_collectives(device, collective_backend(device), timedelta(seconds=600))
    models = {}
    for name, settings in cases.items():
        config = load_config(config_path, settings)
        mesh = build_mesh(device, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
        plan = resolve_without_text(config, mesh.world.size, vocab_size)
        training = build_training_model(config, plan, mesh, torch.ones(vocab_size, dtype=torch.int64))
        set_schedules(training, 0)
        models[name] = training, random_rows(plan, mesh.data.rank)
    results: dict[str, list[dict]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, (training, rows) in models.items():
            torch.distributed.barrier()
            step = timed_step(training, rows)
            if number:
                results[name].append(step)
    return results


def bench_plan(arguments: Namespace) -> dict:
    """Probes this machine with the config, then measures and predicts the cases in the same run."""
    config = load_config(arguments.config, arguments.set)
    vocab_size = config.model.vocab_size or arguments.vocab_size
    document = measure_machine(config, vocab_size, (1, 2), SECTION_SEC)
    log_line("\n".join(describe_probe(document)))
    measured: dict[str, list[dict]] = {}
    for ranks in (1, 2):
        cases = {name: [*arguments.set, *settings] for name, (count, settings) in CASES.items() if count == ranks}
        given = arguments.config, cases, vocab_size, arguments.rounds
        measured |= run_local_ranks(measure_cases, ranks, *given, preload=[__name__])[0]
        log_line(f"measured with {ranks} ranks")
    # the step of the calibration is measured again in turn with the others, so that a slower minute changes both
    base = min(measured[BASE], key=lambda one: sum(one.values()))
    calibrate(document, config, resolve_without_text(config, 1, vocab_size), base)
    results, rows = {}, [("case", "predicted ms", "measured ms", "error", "passes", "optimizer")]
    for name, (ranks, settings) in CASES.items():
        changed = load_config(arguments.config, [*arguments.set, *settings])
        plan = resolve_without_text(changed, ranks, vocab_size)
        step = predict_step(changed, plan, Probe(document), dtype=document["dtype"])
        seconds = min(measured[name], key=lambda one: sum(one.values()))  # other processes only add time
        total = sum(seconds.values())
        error = step.total / total - 1
        expected = {"optimizer": step.parts["optimizer"], "passes": step.total - step.parts["optimizer"]}
        errors = {phase: expected[phase] / seconds[phase] - 1 for phase in seconds}
        results[name] = {
            "predicted_ms": 1000 * step.total,
            "measured_ms": 1000 * total,
            "rounds_ms": [round(1000 * sum(one.values()), 1) for one in measured[name]],
            "error": error,
            "phases": {phase: {"measured_ms": 1000 * seconds[phase], "error": errors[phase]} for phase in seconds},
            "parts_ms": {part: round(1000 * sec, 2) for part, sec in step.parts.items() if sec},
        }
        cells = f"{1000 * step.total:.1f}", f"{1000 * total:.1f}", f"{error:+.1%}"
        rows.append((name, *cells, f"{errors['passes']:+.1%}", f"{errors['optimizer']:+.1%}"))
    sizes = sorted(abs(result["error"]) for name, result in results.items() if name != BASE)
    log_line("\n".join(text_table(rows, right=range(1, 6))))
    return {
        "what": "predicted against measured step, calibrated on the config with one process",
        "median_error": statistics.median(sizes),
        "worst_error": sizes[-1],
        "probe_step": document["step"],
        "cases": results,
    }
