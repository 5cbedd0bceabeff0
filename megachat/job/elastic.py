"""torchrun's elastic agent, which here does not restart ranks after an error that a restart cannot fix."""

import os
import signal
import sys
import time
from datetime import timedelta

from torch.distributed import run
from torch.distributed.elastic.agent.server import WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api

from megachat.errors import CORRUPTION_STATUS, EXIT_STATUS, LOST_RANK_STATUS, SAVED_STATUS, UserError
from megachat.job.links import secret_for_ranks
from megachat.job.monitor_links import handled_signals
from megachat.job.recovery import give_restart_times

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)  # forwarded to the ranks
# A host without a sign of life for 8 s is lost. At the first start, enough hosts wait 10 s for those that may be late.
_RENDEZVOUS = "last_call_timeout=10,join_timeout=1800,keep_alive_interval=2,keep_alive_max_attempt=4"
# At a restart the living hosts join at once, after the last of them has left the round before and the lost ones are
# dropped. They look once a second.
_LAST_CALL_AGAIN = timedelta(seconds=3)


class Agent(api.LocalElasticAgent):
    """The agent of one of several hosts. final_statuses: exit statuses of a rank after which nothing is restarted."""

    final_statuses = frozenset({EXIT_STATUS, CORRUPTION_STATUS})
    interrupted = False
    ended: frozenset[int | None] = frozenset()  # exit statuses of the ranks that a signal has ended
    noticed: float | None = None  # time.time() at which this restart became necessary; None at the first start

    def _shutdown(self, death_sig=signal.SIGTERM, timeout=30):
        # At a second Ctrl-C torch would send SIGTERM. The ranks end at once if it is SIGINT again.
        self.interrupted = self.interrupted or death_sig == signal.SIGINT
        super()._shutdown(signal.SIGINT if self.interrupted else death_sig, timeout)
        if ranks := getattr(self._pcontext, "subprocess_handlers", {}):
            Agent.ended = frozenset(rank.proc.poll() for rank in ranks.values())

    def _restart_workers(self, group):
        self.noticed = time.time()
        group.spec.rdzv_handler.settings.timeout._last_call = _LAST_CALL_AGAIN
        super()._restart_workers(group)

    def _rendezvous(self, group):
        ended = time.time()
        super()._rendezvous(group)
        if self.noticed is not None:
            give_restart_times(self.noticed, ended, time.time())

    def _monitor_workers(self, group):
        result = super()._monitor_workers(group)
        statuses = {failure.exitcode for failure in result.failures.values()}
        if result.state == WorkerState.FAILED and statuses & self.final_statuses:
            self._remaining_restarts = 0
        if result.state == WorkerState.SUCCEEDED:
            # a host whose ranks do not fit the batch, and so have ended, stays until the first host's have finished
            if group.group_rank == 0:
                group.store.set("finished", "")
            elif not group.store.check(["finished"]):
                return RunResult(state=WorkerState.HEALTHY)
        return result


class AgentOfOneHost(Agent):
    """The agent of the only host: no other host could continue, so a stop of one rank is a stop of the job."""

    final_statuses = frozenset({EXIT_STATUS, CORRUPTION_STATUS, SAVED_STATUS})


def supervise(program: list[str], *, hosts: str, ranks: int, meet: str | None, restarts: int) -> int:
    """Runs the program's ranks on this host, again after each crash; returns the exit status.

    program: its file, or -m and its module, and its arguments. hosts: "N" or "MIN:MAX". ranks: on this host. meet:
    HOST[:PORT] of the hosts' rendezvous. Raises UserError if torch does not have this agent.
    """
    if not hasattr(api.LocalElasticAgent, "_monitor_workers"):
        raise UserError(
            "megachat does not support this torch's elastic agent: install torch 2.13, or use torchrun --max-restarts"
        )
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun prints a long notice if it sets this
    # else the agents keep the ranks' first store, where gloo would find the addresses of dead ranks or hosts
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if hosts == "1":
        os.environ.update(secret_for_ranks())
    api.LocalElasticAgent = AgentOfOneHost if hosts == "1" else Agent  # type: ignore[misc]  # torch has no other hook
    line = [
        f"--nnodes={hosts}",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
        "--monitor-interval=0.5",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meet or 'localhost:0'}",
        "--rdzv-id=megachat",
        f"--signals-to-handle={','.join(number.name for number in handled_signals(_SIGNALS))}",
        f"--rdzv-conf={_RENDEZVOUS}",
        *([] if meet else ["--local-addr=localhost"]),
    ]
    try:
        run.main([*line, *program])
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return 128 - status if status < 0 else status
    except SignalException as error:
        return SAVED_STATUS if Agent.ended == {SAVED_STATUS} else 128 + error.sigval
    except RendezvousError as error:
        why = f"{meet}: {type(error).__name__}, is its host up?"
        if isinstance(error, RendezvousClosedError):
            why = "another host's supervisor has ended the job, its log says why"
        print(f"error: the hosts could not meet again: {why}", file=sys.stderr, flush=True)
        return LOST_RANK_STATUS
    return 0
