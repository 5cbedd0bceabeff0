"""Keeps a job going: after a crash its ranks start again from the newest complete checkpoint, on the hosts that are left.

    python launch/supervise.py --ranks 8 --config configs/d24.json                                     # one host
    python launch/supervise.py --hosts 2:4 --meet host-a:29400 --ranks 8 --config configs/d24.json     # on each of up to four hosts

What it does not know goes to pretrain.py. docs/checkpoints.md tells what it does when.
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
    parser.add_argument("--ranks", type=int, default=1, help="on this host, usually its GPUs")
    parser.add_argument(
        "--hosts", default="1", metavar="N or MIN:MAX", help="how many hosts take part, and with how few it goes on"
    )
    parser.add_argument(
        "--meet", metavar="HOST[:PORT]", help="where the hosts find each other; its supervisor has to live"
    )
    parser.add_argument("--restarts", type=int, default=100, help="most restarts in all")
    parser.add_argument("--resume", default="auto", help="only auto, which needs not be said")
    asked, arguments = parser.parse_known_args()
    if asked.resume != "auto":
        raise UserError(
            f"after a crash --resume {asked.resume} would go back there: start launch/pretrain.py from it once, then supervise"
        )
    if asked.hosts != "1" and not asked.meet:
        raise UserError("several hosts need --meet HOST[:PORT], the same on each of them")
    from megachat.job.elastic import supervise  # after parsing: --help need not load torch

    program = Path(__file__).with_name("pretrain.py")
    arguments = ["--resume=auto", "--elastic", *arguments]
    return supervise(program, arguments, hosts=asked.hosts, ranks=asked.ranks, meet=asked.meet, restarts=asked.restarts)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun says at length when it sets this itself
    # otherwise the agents keep the ranks' first store: gloo would find the addresses of ranks that are dead, or a host that is gone
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    main()
