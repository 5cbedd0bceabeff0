"""Does FP8 pay for a config on this device? Go or no-go, as the time to an equal loss.

    megachat fp8-check --config d24 --steps 200 --ranks 8
    megachat fp8-check --config d4_cpu --steps 0              the matrix products only

Measures each matrix shape of the config, forward and backward with the cost of rounding, without and with FP8 in turn;
then trains the config without and with FP8 on the same rows. The loss must stay within --gate of the baseline's, and
the time to an equal val/bpb must be shorter. Runs, logs and fp8_check.json are written to --out; the same command
continues a check that was ended. Exit status: 0 whatever the verdict.
"""

import argparse
import json
from pathlib import Path

from megachat.commands.options import Parser, add_config, add_set, importing, require_minimum, text_moved
from megachat.errors import UserError
from megachat.planning.dimensions import FP8_TILES


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat fp8-check`."""
    add = parser.add_argument
    add_config(parser, required=True)
    add_set(parser, "a setting of all runs; values are JSON; repeatable")
    recipe = "default: precision.fp8 of the config, tensorwise if that is off"
    add("--recipe", choices=[*FP8_TILES], help=f"how numbers are rounded ({recipe})")
    add("--steps", type=int, default=100, help="steps of each paired run (default 100; 0: no runs, products only)")
    add(
        "--baselines", type=int, default=1, choices=[1, 2], help="2: the baseline also with another seed, for the noise"
    )
    # The default is the relative error of the loss that DeepSeek-V3 reports for its FP8 recipe against bfloat16: below
    # 0.25 % (arXiv 2412.19437, section 3.3).
    gate = "relative loss that FP8 may lose at the end (default 0.0025, as DeepSeek-V3 reports for its FP8)"
    add("--gate", type=float, default=0.0025, help=gate)
    add("--rounds", type=int, default=15, help="turns in which each product is measured (default 15)")
    add("--ranks", type=int, default=1, help="processes per run on this machine (default 1)")
    add("--out", type=Path, default=Path("runs/fp8_check"), help="folder of the runs (default runs/fp8_check)")
    add("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> None:
    """Prints the measurements, the losses and the verdict."""
    require_minimum(options, steps=0, rounds=2, ranks=1)
    if not 0 < options.gate < 1:
        raise UserError(f"--gate is {options.gate:g}: give the relative loss that FP8 may lose, between 0 and 1")
    from megachat.config import load_config
    from megachat.files import write_json

    fp8 = load_config(options.config, options.set).precision.fp8
    recipe = options.recipe or (fp8 if fp8 != "off" else "tensorwise")
    with importing():
        from megachat.programs.fp8_check import Fp8Question, fp8_check
        from megachat.studies.fp8 import check_lines
    names = ("config", "steps", "baselines", "gate", "rounds", "ranks", "out")
    question = Fp8Question(**{name: getattr(options, name) for name in names}, settings=options.set, recipe=recipe)
    with text_moved(options):
        result = fp8_check(question)
        write_json(options.out / "fp8_check.json", result)
        if not options.json:
            print("\n".join([*check_lines(result), f"{options.out} has the runs and fp8_check.json"]))
    if options.json:
        print(json.dumps(result, indent=1))
