"""torchrun's elastic agent, told what a restart cannot mend."""

import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.agent.server import WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api

from megachat.errors import EXIT_STATUS, LOST_RANK_STATUS, SAVED_STATUS, UserError

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # passed on to the ranks
_MEETING = "last_call_timeout=10,join_timeout=1800,keep_alive_interval=5,keep_alive_max_attempt=3"


class Agent(api.LocalElasticAgent):
    """One host's part. final: exit statuses of a rank after which nothing is started again."""

    final = frozenset({EXIT_STATUS})

    def _monitor_workers(self, group):
        result = super()._monitor_workers(group)
        if result.state == WorkerState.FAILED and any(
            failure.exitcode in self.final for failure in result.failures.values()
        ):
            self._remaining_restarts = 0
        if result.state == WorkerState.SUCCEEDED:
            # ranks that do not fit the batch end at once: their host stays, for the next start, until the ranks of the
            # first have finished
            if group.group_rank == 0:
                group.store.set("finished", "")
            elif not group.store.check(["finished"]):
                return RunResult(state=WorkerState.HEALTHY)
        return result


class AgentOfOneHost(Agent):
    """Where there are no other hosts to go on with, who tells a rank to stop means the job."""

    final = frozenset({EXIT_STATUS, SAVED_STATUS})


def supervise(program: Path, arguments: list[str], *, hosts: str, ranks: int, meet: str | None, restarts: int) -> int:
    """Run the program's ranks on this host, again after each crash; returns the exit status.

    hosts: "N" or "MIN:MAX". ranks: on this host. meet: HOST[:PORT] of the hosts' rendezvous. Raises UserError for a
    torch without this agent.
    """
    if not hasattr(api.LocalElasticAgent, "_monitor_workers"):
        raise UserError(
            "this torch has another elastic agent than megachat knows: install torch 2.13, or use torchrun --max-restarts"
        )
    api.LocalElasticAgent = AgentOfOneHost if hosts == "1" else Agent
    line = [f"--nnodes={hosts}", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.5"]
    line += [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meet or 'localhost:0'}",
        "--rdzv-id=megachat",
        f"--signals-to-handle={_SIGNALS}",
    ]
    line += [f"--rdzv-conf={_MEETING}", *([] if meet else ["--local-addr=localhost"])]
    try:
        run.main([*line, str(program), *arguments])
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return 128 - status if status < 0 else status
    except SignalException as error:
        return 128 + error.sigval
    except RendezvousError as error:
        closed = isinstance(error, RendezvousClosedError)
        why = (
            "another host's supervisor has ended the job and tells why"
            if closed
            else f"{meet}: {type(error).__name__}, is its host up?"
        )
        print(f"error: the hosts could not meet again: {why}", file=sys.stderr, flush=True)
        return LOST_RANK_STATUS
    return 0
