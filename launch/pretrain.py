"""What every rank runs to pretrain: `deepspeed launch/pretrain.py --config FILE`; or with python, torchrun, mpirun."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.errors import user_errors_end_the_program  # noqa: E402
from megachat.job.hosts import check_launcher_hostfile  # noqa: E402
from megachat.job.launchers import launcher_rank  # noqa: E402


@user_errors_end_the_program(rank=launcher_rank)
def main() -> int:
    parser = argparse.ArgumentParser(description="Pretrain a model.")
    add = parser.add_argument
    add("--config", required=True, help="JSON file with what differs from the defaults")
    setting = {"action": "append", "default": [], "metavar": "SECTION.KEY=VALUE"}
    add("--set", help="override a setting; values are JSON; repeatable", **setting)
    resume = "continue from the run's newest complete checkpoint, or from the given one"
    add("--resume", metavar="auto|PATH", help=resume)
    add("--dry-run", action="store_true", help="print config, plan, parameters and owners, and stop")
    add("--world", type=int, help="with --dry-run: the number of ranks to plan for")
    memory = "with --dry-run: the memory of a GPU, to show what fits; default: of this machine's"
    add("--memory-gb", type=float, help=memory)
    elastic = "train on as many of the started ranks as fit the batch; set by supervise.py"
    add("--elastic", action="store_true", help=elastic)
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # set by the deepspeed launcher
    arguments = parser.parse_args()
    world, memory_gb = arguments.world, arguments.memory_gb
    if world is not None and (world < 1 or not arguments.dry_run):
        parser.error(
            "--world is the number of ranks, 1 or more, to plan for with --dry-run; a launcher sets how many run"
        )
    if memory_gb is not None and (not memory_gb > 0 or not arguments.dry_run):
        parser.error("--memory-gb is the memory of a GPU, above 0, to plan for with --dry-run; a job reads its GPU's")
    check_launcher_hostfile()
    from megachat.programs.pretrain import pretrain  # after parsing: --help need not load torch

    return pretrain(
        arguments.config,
        arguments.set,
        resume=arguments.resume,
        dry_run=arguments.dry_run,
        world=world,
        elastic=arguments.elastic,
        memory_gb=memory_gb,
    )


if __name__ == "__main__":
    main()
