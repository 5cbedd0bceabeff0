"""Reports what is installed, what a run would choose from it and why, and what is wrong.

With --hostfile it compares all hosts, and measures their matrix products and the bandwidth of every pair of hosts.
Exit status 0: healthy; 1: a trap, or a host that differs, is slow or does not answer; 2: a mistake in the command line.
docs/install.md explains the traps.
"""

import argparse
import json

from megachat.commands.options import Parser, add_config, add_set
from megachat.errors import UserError


def add_arguments(parser: Parser) -> None:
    """Adds the options of `megachat doctor`."""
    add = parser.add_argument
    add_config(parser, "report what a run with this config would choose; default: default settings")
    add_set(parser, "override a setting of --config")
    add("--json", action="store_true", help="print one line of JSON")
    add("--hostfile", help="examine and measure all hosts of this file over ssh")
    add("--master-port", type=int, default=29500, help="with --hostfile: port on the first host (default 29500)")
    add("--ssh-port", type=int, help="with --hostfile: ssh port of all hosts, if it is not 22")


def run(options: argparse.Namespace) -> int:
    """Examines this machine or all hosts; returns the exit status."""
    if options.set and not options.config:
        raise UserError("--set overrides a setting of --config: give --config, too")
    from megachat.config import Config, load_config
    from megachat.doctor.report import describe_examination, examine_this_host

    config = load_config(options.config, options.set) if options.config else Config()
    if not options.hostfile:
        examination = examine_this_host(config)
        print(json.dumps(examination) if options.json else describe_examination(examination))
        return 1 if examination["traps"] else 0
    from megachat.doctor.hosts import describe_hosts, examine_hosts, is_healthy
    from megachat.job.hosts import parse_hostfile

    hosts = parse_hostfile(options.hostfile)
    passed = ["--config", options.config] if options.config else []
    passed += [word for setting in options.set for word in ("--set", setting)]
    examination = examine_hosts(hosts, passed, port=options.master_port, ssh_port=options.ssh_port)
    slots = {host.name: host.slots for host in hosts}
    print(json.dumps(examination) if options.json else describe_hosts(examination, slots))
    return 0 if is_healthy(examination) else 1
