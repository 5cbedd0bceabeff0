"""Checks the hosts of a hostfile before a job starts: `python launch/check_hosts.py HOSTFILE`; exit status 2 if bad."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that was not installed

from megachat.commands.options import Parser  # noqa: E402
from megachat.errors import UserError, user_errors_end_the_program  # noqa: E402
from megachat.job.hosts import check_hosts, parse_hostfile  # noqa: E402


@user_errors_end_the_program
def main() -> None:
    parser = Parser(
        description="Check the hosts of a hostfile over ssh: reachable, same code and versions, enough GPUs, port free."
    )
    parser.add_argument("hostfile", help="lines `NAME slots=N`, see launch/hostfile.example")
    parser.add_argument(
        "--master-port", type=int, default=29500, help="the port where rank 0, on the first host, will listen"
    )
    parser.add_argument("--ssh-port", type=int, help="ssh's port on all hosts, if not 22")
    parser.add_argument("--no-ssh", action="store_true", help="only read the file")
    parser.add_argument("--node-rank", type=int, help="with --no_ssh: a node rank that must be in the file")
    arguments = parser.parse_args()
    hosts = parse_hostfile(arguments.hostfile)
    count = f"{len(hosts)} host{'s' * (len(hosts) > 1)} with {sum(host.slots for host in hosts)} ranks"
    if arguments.node_rank is not None and not 0 <= arguments.node_rank < len(hosts):
        raise UserError(
            f"node rank {arguments.node_rank} is not in {arguments.hostfile}, which has {count}: "
            f"give 0 to {len(hosts) - 1}"
        )
    if arguments.no_ssh:
        return
    for remark in check_hosts(hosts, port=arguments.master_port, ssh_port=arguments.ssh_port):
        print(f"note: {remark}")
    print(f"{count}: reachable, same code, same versions")


if __name__ == "__main__":
    main()
