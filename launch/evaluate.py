"""What every rank runs to evaluate: `deepspeed launch/evaluate.py --checkpoint FOLDER --core`; docs/evaluation.md."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.errors import user_errors_end_the_program  # noqa: E402
from megachat.job.hosts import check_launcher_hostfile  # noqa: E402
from megachat.job.launchers import launcher_rank  # noqa: E402


@user_errors_end_the_program(rank=launcher_rank)
def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint: CORE, bits per byte, samples.")
    add = parser.add_argument
    checkpoint = "a run folder (its newest step), a step folder, or a folder of another format"
    add("--checkpoint", required=True, type=Path, help=checkpoint)
    bundle = "the CORE metric; BUNDLE is a folder or zip file, nanochat's is downloaded once if not given"
    add("--core", nargs="?", const="", metavar="BUNDLE", help=bundle)
    bpb = "bits per byte on validation text; FOLDER is a data folder, by default the run's"
    add("--bpb", nargs="?", const="", metavar="FOLDER", help=bpb)
    add("--sample", action="store_true", help="continue the configured prompts")
    limit = "with --core: examples per task at most; default -1: all, which is the metric"
    add("--max-per-task", type=int, default=-1, metavar="N", help=limit)
    add("--tasks", metavar="LABEL,LABEL", help="with --core: only these tasks")
    add("--core-crop", action="store_true", help="with --core: crop prompts to the model's sequence_len")
    add("--out", type=Path, metavar="FILE", help="the JSON file; default: RUN/evaluations/step_NNNNNN.json")
    add(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="the checkpoint's tokenizer, if it is not where the config says",
    )
    setting = {"action": "append", "default": [], "metavar": "SECTION.KEY=VALUE"}
    add("--set", dest="overrides", help="override a setting; values are JSON; repeatable", **setting)
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # set by the deepspeed launcher
    options = vars(parser.parse_args())
    del options["local_rank"]
    if options.pop("core_crop"):
        options["overrides"].append("evaluate.core_crop=true")
    check_launcher_hostfile()
    from megachat.programs.evaluate import EvaluationRequest, evaluate  # after parsing: --help need not load torch

    options["tasks"] = tuple(options["tasks"].split(",")) if options["tasks"] else None
    evaluate(EvaluationRequest(**options))


if __name__ == "__main__":
    main()
