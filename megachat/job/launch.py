"""Launch variables: this process's rank, its launcher, where rank 0 is, and what environment.json records."""

import atexit
import contextlib
import dataclasses
import ipaddress
import os
import platform
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import psutil  # a dependency of DeepSpeed
import torch

from megachat.device import device_name
from megachat.errors import UserError
from megachat.installation import git
from megachat.job.host_probe import installed_version
from megachat.job.launchers import TORCH, Launch, check_master, find_launch, number
from megachat.job.monitor_links import local_address

_holders: deque[socket.socket] = deque(maxlen=16)  # of the last ports that free_port() gave out


@dataclass(frozen=True)
class LaunchEnvironment:
    """This process's part in the job. launcher: the one that set the variables.

    agent_has_store: torchrun's agent, not rank 0, listens at the master's port. attempt: torchrun's restarts so far.
    """

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    launcher: str
    master_address: str
    master_port: int
    agent_has_store: bool = False
    attempt: int = 0


def bootstrap_environment() -> LaunchEnvironment:
    """Determines the launch variables, whoever started this process, and sets them for torch and DeepSpeed.

    Order: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (deepspeed, torchrun); the variables of the
    launchers in launchers.py, Open MPI's with mpi4py where it is installed; RANK and WORLD_SIZE alone; one process.
    Raises UserError for impossible values, when a job on several nodes has no MASTER_ADDR, and for a launcher that does
    not say enough.
    """
    env = os.environ
    launch = find_launch(env) or Launch("python", 0, 1, 0, 1)
    launcher, local = launch.launcher, launch.local_rank
    size = launch.local_size or (1 if local is None else launch.world)
    if launch.world == 1:
        if launcher != TORCH:
            env["MASTER_ADDR"] = "127.0.0.1"
            env.pop("MASTER_PORT", None)
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(free_port()))
    elif local is None and torch.cuda.device_count() > 1:
        raise UserError(
            f"rank {launch.rank} sees {torch.cuda.device_count()} GPUs, and {launcher} set no LOCAL_RANK that chooses "
            "one: set LOCAL_RANK, let each rank see one GPU, or start torchrun on each host"
        )
    elif launcher == "mpirun":
        _set_master_of_open_mpi(launch.world, size)
    else:
        _require_master(launcher, launch.world > (launch.local_size or 1))
    local = local or 0
    if launcher == TORCH:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_SIZE" in env else launcher
    ranks = {"RANK": launch.rank, "WORLD_SIZE": launch.world, "LOCAL_RANK": local, "LOCAL_SIZE": size}
    env.update({name: str(value) for name, value in ranks.items()})
    port = check_master(env["MASTER_ADDR"], env["MASTER_PORT"])
    agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launch.world == 1 and not agent:
        try:
            try_port(port)
        except OSError:  # no other rank needs to know the port
            port = free_port()
            env["MASTER_PORT"] = str(port)
    attempt = number("TORCHELASTIC_RESTART_COUNT", env.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return LaunchEnvironment(launch.rank, local, launch.world, size, launcher, env["MASTER_ADDR"], port, agent, attempt)


def _set_master_of_open_mpi(world: int, local_size: int) -> None:
    env = os.environ
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        try:
            from mpi4py import MPI
        except ImportError:
            return _require_master("mpirun (without mpi4py)", world > local_size)
        # mpi4py finalizes too late for a rank that ends at once, and mpirun takes that for a failure
        atexit.register(MPI.Finalize)
        if MPI.COMM_WORLD.size != world:
            return _require_master("mpirun (with an mpi4py for another MPI)", world > local_size)
        address = "127.0.0.1"
        if world > local_size:
            address = common_address(MPI.COMM_WORLD.allgather((socket.gethostname(), _local_networks())))
        master = env.get("MASTER_ADDR", address), env.get("MASTER_PORT") or str(free_port())
        env["MASTER_ADDR"], env["MASTER_PORT"] = MPI.COMM_WORLD.bcast(master, root=0)


def _local_networks() -> list[str]:
    """Returns this host's IPv4 addresses with their networks, as "10.0.0.1/255.255.255.0", without loopback."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return [
        f"{entry.address}/{entry.netmask}"
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]


def common_address(ranks: list[tuple[str, list[str]]]) -> str:
    """Returns the address at which all ranks reach rank 0. ranks: (host name, addresses with networks) in rank order.

    It is in a network that every host has, and is not another host's address too, as that of a container bridge is.
    Where there is no such address, the first of rank 0's.
    """
    first, candidates = ranks[0]
    others = [
        [ipaddress.ip_interface(text).ip for text in networks]
        for host, networks in dict(ranks).items()
        if host != first
    ]
    for text in candidates:
        here = ipaddress.ip_interface(text)
        if all(here.ip not in there and any(address in here.network for address in there) for there in others):
            return str(here.ip)
    if not candidates:
        raise UserError(f"the host {first} of rank 0 has no network but loopback: export MASTER_ADDR and MASTER_PORT")
    return candidates[0].partition("/")[0]


def use_network_of(address: str, environment: LaunchEnvironment) -> None:
    """Makes gloo and NCCL use the interface that leads to rank 0's host at the IP `address`, unless the user chose one.

    Gloo would take the interface of this host's name, which Debian maps to 127.0.1.1, and NCCL the first that is up.
    Where MASTER_ADDR is a loopback name, because it names this host, it becomes this host's address in that network.
    """
    env, local = os.environ, local_address(address)
    if local is None:
        return
    with contextlib.suppress(OSError):
        if socket.gethostbyname(environment.master_address).startswith("127."):
            env["MASTER_ADDR"] = local
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == local for entry in entries):
            env.setdefault("GLOO_SOCKET_IFNAME", name)
            env.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": exactly this one, else NCCL takes it for a prefix
            return


def _require_master(launcher: str, several_nodes: bool) -> None:
    env = os.environ
    if "MASTER_ADDR" not in env and several_nodes:
        raise UserError(
            f"{launcher} may have started ranks on several nodes, and there is no MASTER_ADDR: export MASTER_ADDR as "
            "rank 0's host name"
        )
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", "29500")


def with_fewer_ranks(environment: LaunchEnvironment, world: int) -> LaunchEnvironment:
    """Returns the environment of the same process, one of the first `world` ranks, in a job of only these."""
    os.environ["WORLD_SIZE"] = str(world)
    return dataclasses.replace(environment, world_size=world, local_size=min(environment.local_size, world))


def become_rank(rank: int, world: int, port: int) -> None:
    """Sets the launch variables of rank `rank` of `world` on this machine, for a tool that starts its own ranks."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def try_port(port: int) -> None:
    """Raises OSError, or OverflowError for no port number, if nothing can listen at `port` on every interface now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))


def free_port() -> int:
    """Returns a port on which nobody listens. On Linux nobody else is given it while this process lives."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that a listener may bind it, too
    holder.bind(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    if sys.platform == "linux":  # elsewhere the listener might not be able to
        _holders.append(holder)
    return port


@contextlib.contextmanager
def process_restored() -> Iterator[None]:
    """Gives this process its environment variables and signal handlers back after a job, because it may go on.

    A job sets variables for torch and DeepSpeed, and ignores further signals after it was stopped.
    """
    variables = dict(os.environ)
    main_thread = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    numbers = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}) if main_thread else []
    handlers = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not None}
    try:
        yield
    finally:
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def rank_0_address() -> str:
    """Returns where the other ranks reach rank 0's host; known after bootstrap_environment()."""
    return os.environ["MASTER_ADDR"]


def choose_device(environment: LaunchEnvironment) -> torch.device:
    """Returns this process's GPU, or the CPU, whose cores the local ranks share unless the user set OMP_NUM_THREADS.

    The only visible GPU is this rank's, because Slurm and others show each task just its GPU.
    """
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        index = 0 if count == 1 else environment.local_rank
        if index >= count:
            raise UserError(f"rank {environment.rank} needs GPU {index} but this host shows {count}: start fewer ranks")
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed's device
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if "OMP_NUM_THREADS" not in os.environ or (environment.launcher == "torchrun" and _set_by_torchrun()):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // environment.local_size))
    return torch.device("cpu")


def _set_by_torchrun() -> bool:
    """Returns whether OMP_NUM_THREADS is torchrun's 1: the agent, this process's parent, was started without it."""
    try:
        return os.environ["OMP_NUM_THREADS"] == "1" and "OMP_NUM_THREADS" not in psutil.Process().parent().environ()
    except (psutil.Error, AttributeError):
        return True


_DIFF_CHARACTERS = 100_000  # of the uncommitted changes that are kept: what made a result, within reason


def describe_environment(device: torch.device) -> dict[str, object]:
    """Returns commit, uncommitted changes, versions, command and hardware, for environment.json."""
    names = "torch deepspeed numpy pyarrow tiktoken pydantic mpi4py transformer-engine wandb tensorboard trackio"
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(changes := git("status", "--porcelain", "--untracked-files=no")),
        "diff": (git("diff", "HEAD") or "")[:_DIFF_CHARACTERS] if changes else "",
        "command": sys.argv,
        "host": socket.gethostname(),
        "device": device_name(device),
        "device_count": torch.cuda.device_count() if device.type == "cuda" else 0,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "packages": {name: installed_version(name) for name in names.split()},
    }
