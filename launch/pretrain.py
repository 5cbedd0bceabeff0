"""What every rank runs to pretrain: `deepspeed launch/pretrain.py --config configs/d4_cpu.json`; also under python, torchrun and mpirun."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.errors import user_errors_end_the_program  # noqa: E402
from megachat.job.hosts import check_launcher_hostfile  # noqa: E402


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))


@user_errors_end_the_program(rank=rank)
def main() -> int:
    parser = argparse.ArgumentParser(description="Pretrain a model.")
    parser.add_argument("--config", required=True, help="JSON file with what differs from the defaults")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a setting; values are JSON; repeatable",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue from the run's newest complete checkpoint, or from the one named",
    )
    parser.add_argument("--dry-run", action="store_true", help="print config, plan, parameters and owners, and stop")
    parser.add_argument("--world", type=int, help="with --dry-run: the number of ranks to plan for")
    parser.add_argument(
        "--memory-gb",
        type=float,
        help="with --dry-run: the memory of a GPU, to say what fits; default: of this machine's",
    )
    parser.add_argument(
        "--elastic",
        action="store_true",
        help="train on as many of the started ranks as fit the batch; supervise.py gives it",
    )
    parser.add_argument(
        "--local_rank", type=int, default=-1, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    arguments = parser.parse_args()
    if arguments.world is not None and (arguments.world < 1 or not arguments.dry_run):
        parser.error(
            "--world is the number of ranks, 1 or more, to plan for with --dry-run; a launcher says how many run"
        )
    if arguments.memory_gb is not None and (not arguments.memory_gb > 0 or not arguments.dry_run):
        parser.error("--memory-gb is the memory of a GPU, above 0, to plan for with --dry-run; a job asks its own")

    nodes = os.environ.get("CROSS_SIZE")  # deepspeed's number of hosts
    check_launcher_hostfile(int(nodes) if nodes else None)
    from megachat.programs.pretrain import pretrain  # after parsing: --help need not load torch

    how = {
        "resume": arguments.resume,
        "dry_run": arguments.dry_run,
        "world": arguments.world,
        "elastic": arguments.elastic,
    }
    how["memory_gb"] = arguments.memory_gb
    return pretrain(arguments.config, arguments.set, **how)


if __name__ == "__main__":
    main()
