"""Prints losses and norms of three steps of a layout as JSON: torchrun --nproc_per_node=2 -m tests.gpu.layout tensor"""

import json
import sys
from datetime import timedelta

import torch

from megachat.device import collective_backend
from megachat.job.launch import bootstrap_environment, choose_device
from megachat.parallel.build import start_collectives
from megachat.parallel.mesh import build_mesh
from megachat.planning.plan import resolve_without_text
from megachat.train.build import build_training_model
from megachat.train.step import set_schedules
from tests.training import SMALL_VOCAB, random_rows, small_config, take_step

AXES = {
    "data": {},
    "tensor": {"tensor": 2},
    "sequence": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
}


def main(axis: str) -> None:
    environment = bootstrap_environment()
    device, parallel = choose_device(environment), AXES[axis] if environment.world_size > 1 else {}
    start_collectives(device, collective_backend(device), timedelta(seconds=120))
    mesh = build_mesh(device, tensor=parallel.get("tensor", 1), pipeline=parallel.get("pipeline", 1))
    config = small_config(
        model={"head_size": 8, "kv_heads": 2, "depth": 4},
        lookup={"after_blocks": (0,), "rows": 400, "max_rows_per_token": 60},
        ngram={"blocks": (0,), "rows": 60},
        precision={"attention": "sdpa"},
        parallel=parallel,
    )
    plan = resolve_without_text(config, mesh.world.size, SMALL_VOCAB)
    training = build_training_model(config, plan, mesh, torch.ones(SMALL_VOCAB, dtype=torch.int64))
    results = []
    for step in range(3):
        set_schedules(training, step)
        rows = random_rows(step, plan.rows_per_step, config.model.sequence_len + 1, SMALL_VOCAB)
        results.append(take_step(training, rows.to(device))[:2])
    if environment.rank == 0:
        print(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
