"""Pretrain, and restart the ranks after a crash, from the newest complete checkpoint and on the remaining hosts.

    megachat supervise --ranks 8 --config configs/d24.json
    megachat supervise --hosts 2:4 --meet host-a:29400 --ranks 8 --config configs/d24.json  # on each of 4 hosts

Other options are passed to pretrain. docs/checkpoints.md describes when it restarts what.
"""

import argparse
import re

from megachat.commands.options import Parser, passed_on, require_minimum
from megachat.errors import UserError
from megachat.installation import pretrain_program


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat supervise`."""
    add = parser.add_argument
    add("--ranks", type=int, default=1, help="on this host, usually its GPUs")
    add("--hosts", default="1", metavar="N or MIN:MAX", help="how many hosts take part, and how few are enough")
    add("--meet", metavar="HOST[:PORT]", help="where the hosts find each other; its supervisor has to stay alive")
    add("--restarts", type=int, default=100, help="most restarts in all")
    add("--resume", default="auto", help="only auto, which is the default")


def run(options: argparse.Namespace) -> int:
    """Supervises a job; returns the exit status."""
    require_minimum(options, ranks=1, restarts=0)
    if not re.fullmatch(r"0*[1-9]\d{0,5}(:0*[1-9]\d{0,5})?", options.hosts):
        raise UserError(f"--hosts is {options.hosts}: give the number of hosts, such as 2, or MIN:MAX, such as 2:4")
    if options.resume != "auto":
        raise UserError(
            f"after a crash --resume {options.resume} would go back there: start `megachat pretrain` from it once, "
            "then supervise"
        )
    if options.hosts != "1" and not options.meet:
        raise UserError("several hosts need --meet HOST[:PORT], the same on each of them")
    from megachat.commands.main import check_passed_on

    check_passed_on(options.rest)
    from megachat.job.elastic import supervise

    arguments = [*pretrain_program(), "--resume=auto", "--elastic", *passed_on(options), *options.rest]
    how = {"hosts": options.hosts, "ranks": options.ranks, "meet": options.meet, "restarts": options.restarts}
    return supervise(arguments, **how)
