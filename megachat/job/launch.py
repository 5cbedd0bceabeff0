"""Launch variables: this process's rank, its launcher, where rank 0 is, and what environment.json records."""

import atexit
import contextlib
import dataclasses
import ipaddress
import os
import platform
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil  # a dependency of DeepSpeed
import torch

from megachat.device import device_name
from megachat.errors import UserError
from megachat.job.host_probe import installed_version
from megachat.job.monitor_links import local_address


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

    Order: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (deepspeed, torchrun); Open MPI's variables, with
    mpi4py where it is installed; Slurm's; one process. Raises UserError when a job on several nodes has no MASTER_ADDR.
    """
    env = os.environ
    if all(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")):
        others = "deepspeed" if "CROSS_SIZE" in env else "RANK and WORLD_SIZE"
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else others
        rank, world, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
        local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world)
    elif "OMPI_COMM_WORLD_RANK" in env:
        launcher, (rank, world, local, local_size) = "mpirun", _from_open_mpi()
    elif int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        rank, world, local = (int(env[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
        launcher, local_size = "srun", _slurm_local_size()
        _require_master(launcher, world > local_size)
    else:
        launcher, rank, world, local, local_size = "python", 0, 1, 0, 1
        env["MASTER_ADDR"], env["MASTER_PORT"] = "127.0.0.1", str(free_port())
    env.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local), LOCAL_SIZE=str(local_size))
    try:
        port = int(env["MASTER_PORT"])
    except ValueError:
        raise UserError(f"MASTER_PORT is {env['MASTER_PORT']!r}: set it to a number, e.g. 29500") from None
    agent, attempt = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True", int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return LaunchEnvironment(rank, local, world, local_size, launcher, env["MASTER_ADDR"], port, agent, attempt)


def _from_open_mpi() -> tuple[int, int, int, int]:
    env = os.environ
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    rank, world, local, local_size = (int(env[f"OMPI_COMM_WORLD_{name}"]) for name in names)
    if world == 1:
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(free_port()))
    elif "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        try:
            from mpi4py import MPI
        except ImportError:
            _require_master("mpirun (without mpi4py)", world > local_size)
        else:
            address = "127.0.0.1"
            if world > local_size:
                address = common_address(MPI.COMM_WORLD.allgather((socket.gethostname(), _local_networks())))
            # mpi4py finalizes too late for a rank that ends at once, and mpirun takes that for a failure
            atexit.register(MPI.Finalize)
            master = env.get("MASTER_ADDR", address), env.get("MASTER_PORT") or str(free_port())
            env["MASTER_ADDR"], env["MASTER_PORT"] = MPI.COMM_WORLD.bcast(master, root=0)
    return rank, world, local, local_size


def _slurm_local_size() -> int:
    """Returns the number of tasks on this node. SLURM_TASKS_PER_NODE looks like "4(x2),1"."""
    env, counts = os.environ, []
    for part in env.get("SLURM_TASKS_PER_NODE", "").split(",") if "SLURM_NODEID" in env else ():
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1) if tasks else []
    return counts[int(env["SLURM_NODEID"])] if counts else int(env.get("SLURM_NTASKS_PER_NODE", "1"))


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
    """Have gloo and NCCL use the interface that leads to rank 0's host at the IP `address`, unless the user chose one.

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
            f"{launcher} started ranks on several nodes without MASTER_ADDR: export MASTER_ADDR as rank 0's host name"
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


def free_port() -> int:
    """Returns a port that no process listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_0_address() -> str:
    """Returns where the other ranks reach rank 0's host; known after bootstrap_environment()."""
    return os.environ["MASTER_ADDR"]


def choose_device(environment: LaunchEnvironment) -> torch.device:
    """Returns this process's GPU, or the CPU, whose cores the local ranks share unless the user set OMP_NUM_THREADS."""
    if torch.cuda.is_available():
        if environment.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {environment.rank} needs GPU {environment.local_rank} but this host shows "
                f"{torch.cuda.device_count()}: start fewer ranks"
            )
        torch.cuda.set_device(environment.local_rank)
        return torch.device("cuda", environment.local_rank)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None or (threads == "1" and environment.launcher == "torchrun"):  # torchrun sets 1 where it is unset
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // environment.local_size))
    return torch.device("cpu")


def describe_environment(device: torch.device) -> dict[str, object]:
    """Returns commit, versions, command and hardware, for environment.json."""
    names = "torch deepspeed numpy pyarrow tiktoken pydantic mpi4py transformer-engine wandb".split()
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "command": sys.argv,
        "host": socket.gethostname(),
        "device": device_name(device),
        "device_count": torch.cuda.device_count() if device.type == "cuda" else 0,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "packages": {name: installed_version(name) for name in names},
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
