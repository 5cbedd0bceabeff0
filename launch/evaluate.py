"""What every rank runs to evaluate: `deepspeed launch/evaluate.py --checkpoint FOLDER --core`; docs/evaluation.md."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.errors import user_errors_end_the_program  # noqa: E402
from megachat.job.hosts import check_launcher_hostfile, launcher_rank  # noqa: E402


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint: CORE, bits per byte, samples.")
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="a run's folder (its newest step), a step's, or nanochat's"
    )
    parser.add_argument(
        "--core",
        nargs="?",
        const="",
        metavar="BUNDLE",
        help="the CORE metric; a folder or zip, else nanochat's is downloaded once",
    )
    parser.add_argument(
        "--bpb",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="bits per byte on validation text; a data folder, else the run's",
    )
    parser.add_argument("--sample", action="store_true", help="continue the configured prompts")
    parser.add_argument(
        "--max-per-task",
        type=int,
        default=-1,
        metavar="N",
        help="of CORE, examples of a task at most; -1: all, which is the metric",
    )
    parser.add_argument("--tasks", metavar="LABEL,LABEL", help="of CORE, only these")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON file; else RUN/evaluations/step_NNNNNN.json")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="where it is not found by itself")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a setting, as parallel.tensor=2",
    )
    parser.add_argument(
        "--local_rank", type=int, default=-1, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    return parser


@user_errors_end_the_program(rank=launcher_rank)
def main() -> None:
    arguments = command_line().parse_args()
    check_launcher_hostfile()
    from megachat.programs.evaluate import EvaluationRequest, evaluate  # after parsing: --help need not load torch

    tasks = tuple(arguments.tasks.split(",")) if arguments.tasks else None
    asked = EvaluationRequest(
        arguments.core, arguments.bpb, arguments.sample, tasks, arguments.max_per_task, arguments.out
    )
    evaluate(arguments.checkpoint, arguments.set, asked, tokenizer=arguments.tokenizer)


if __name__ == "__main__":
    main()
