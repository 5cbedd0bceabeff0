"""Restarts a job's ranks after a crash, from the newest complete checkpoint and on the remaining hosts.

    python launch/supervise.py --ranks 8 --config configs/d24.json
    python launch/supervise.py --hosts 2:4 --meet host-a:29400 --ranks 8 --config configs/d24.json  # on each of 4 hosts

Other options are passed to pretrain.py. docs/checkpoints.md describes when it restarts what.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402


@user_errors_end_the_program
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--ranks", type=int, default=1, help="on this host, usually its GPUs")
    add("--hosts", default="1", metavar="N or MIN:MAX", help="how many hosts take part, and how few are enough")
    add("--meet", metavar="HOST[:PORT]", help="where the hosts find each other; its supervisor has to stay alive")
    add("--restarts", type=int, default=100, help="most restarts in all")
    add("--resume", default="auto", help="only auto, which is the default")
    options, arguments = parser.parse_known_args()
    if options.resume != "auto":
        raise UserError(
            f"after a crash --resume {options.resume} would go back there: start launch/pretrain.py from it once, "
            "then supervise"
        )
    if options.hosts != "1" and not options.meet:
        raise UserError("several hosts need --meet HOST[:PORT], the same on each of them")
    from megachat.job.elastic import supervise  # after parsing: --help need not load torch

    program = Path(__file__).with_name("pretrain.py")
    arguments = ["--resume=auto", "--elastic", *arguments]
    how = {"hosts": options.hosts, "ranks": options.ranks, "meet": options.meet, "restarts": options.restarts}
    return supervise(program, arguments, **how)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun prints a long notice if it sets this
    # else the agents keep the ranks' first store, where gloo would find the addresses of dead ranks or hosts
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    main()
