"""Evaluate a checkpoint: CORE, bits per byte, samples. This is what every rank runs: `deepspeed --module megachat
evaluate --checkpoint FOLDER --core`, or alone for one rank. docs/evaluation.md explains the numbers.
"""

import argparse
import json
from pathlib import Path

from megachat.commands.options import (
    Parser,
    add_layout,
    add_local_rank,
    add_set,
    check_layout_ranks,
    importing,
    layout_settings,
    text_moved,
)
from megachat.errors import UserError
from megachat.job.hosts import check_launcher_hostfile


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat evaluate`."""
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
    controls = "with --core: also ask each example with another one's context: what does reading gain?"
    add("--controls", action="store_true", help=controls)
    add("--out", type=Path, metavar="FILE", help="the JSON file; default: RUN/evaluations/step_NNNNNN.json")
    tokenizer = "the checkpoint's tokenizer, if it is not where the config says"
    add("--tokenizer", type=Path, metavar="FOLDER", help=tokenizer)
    add_set(parser)
    add_layout(parser)
    add("--json", action="store_true", help="print the JSON file's content, and everything else on standard error")
    add_local_rank(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluates."""
    if options.core is None and options.bpb is None and not options.sample:
        raise UserError("nothing to evaluate: give one or more of --core, --bpb and --sample")
    if options.controls and options.core is None:
        raise UserError("--controls repeats CORE with other contexts: give --core as well")
    check_layout_ranks(options.layout)
    check_launcher_hostfile()
    with text_moved(options), importing(logged=True):
        from megachat.programs.evaluate import EvaluationRequest, evaluate

    chosen = ["evaluate.core_crop=true"] if options.core_crop else []
    chosen += ["evaluate.core_controls=true"] if options.controls else []
    request = EvaluationRequest(
        options.checkpoint,
        overrides=[*options.set, *layout_settings(options.layout), *chosen],
        core=options.core,
        bpb=options.bpb,
        sample=options.sample,
        tasks=tuple(options.tasks.split(",")) if options.tasks else None,
        max_per_task=options.max_per_task,
        out=options.out,
        tokenizer=options.tokenizer,
    )
    with text_moved(options):
        results = evaluate(request)
    if options.json and results is not None:
        print(json.dumps(results, indent=1))
