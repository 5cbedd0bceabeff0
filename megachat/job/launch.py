"""Launch variables: which rank this process is, who started it, where rank 0 is, and what environment.json records."""

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
from importlib import metadata
from pathlib import Path

import torch

from megachat.device import device_name
from megachat.errors import UserError


@dataclass(frozen=True)
class LaunchEnvironment:
    """Where this process stands in the job. launcher: which variables told it.

    agent_has_store: torchrun's agent, not rank 0, listens at the master's port. attempt: how often torchrun has restarted the ranks.
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
    """Settle RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, whoever started us, and write them back for torch and DeepSpeed.

    Order: all five present (deepspeed, torchrun); Open MPI (through mpi4py when it is installed, else from its variables); Slurm; one process.
    Raises UserError when a multi-node job does not say where rank 0 is.
    """
    env = os.environ
    if all(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")):
        launcher = (
            "torchrun"
            if "TORCHELASTIC_RUN_ID" in env
            else "deepspeed"
            if "CROSS_SIZE" in env
            else "RANK and WORLD_SIZE"
        )
        rank, world, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
        local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world)
    elif "OMPI_COMM_WORLD_RANK" in env:
        launcher, (rank, world, local, local_size) = "mpirun", _from_open_mpi()
    elif int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        launcher, rank, world, local = (
            "srun",
            int(env["SLURM_PROCID"]),
            int(env["SLURM_NTASKS"]),
            int(env["SLURM_LOCALID"]),
        )
        local_size = _slurm_local_size()
        _require_master("srun", world > local_size)
    else:
        launcher, rank, world, local, local_size = "python", 0, 1, 0, 1
        env["MASTER_ADDR"], env["MASTER_PORT"] = "127.0.0.1", str(free_port())
    env.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local), LOCAL_SIZE=str(local_size))
    try:
        port = int(env["MASTER_PORT"])
    except ValueError:
        raise UserError(f"MASTER_PORT is {env['MASTER_PORT']!r}: set it to a number, as 29500") from None
    agent, attempt = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True", int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return LaunchEnvironment(rank, local, world, local_size, launcher, env["MASTER_ADDR"], port, agent, attempt)


def _from_open_mpi() -> tuple[int, int, int, int]:
    env = os.environ
    rank, world = int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_SIZE"])
    local, local_size = int(env["OMPI_COMM_WORLD_LOCAL_RANK"]), int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
    if world > 1 and ("MASTER_ADDR" not in env or "MASTER_PORT" not in env):
        try:
            from mpi4py import MPI
        except ImportError:
            _require_master("mpirun (without mpi4py)", world > local_size)
        else:
            address = (
                "127.0.0.1"
                if world == local_size
                else common_address(MPI.COMM_WORLD.allgather((socket.gethostname(), _own_networks())))
            )
            atexit.register(
                MPI.Finalize
            )  # mpi4py's own comes too late for a rank that ends at once, and mpirun takes that for a failure
            where = MPI.COMM_WORLD.bcast(
                (env.get("MASTER_ADDR", address), env.get("MASTER_PORT") or str(free_port())), root=0
            )
            env["MASTER_ADDR"], env["MASTER_PORT"] = where
    elif world == 1:
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(free_port()))
    return rank, world, local, local_size


def _slurm_local_size() -> int:
    """Tasks on this node; SLURM_TASKS_PER_NODE is as "4(x2),1"."""
    env, counts = os.environ, []
    for part in env.get("SLURM_TASKS_PER_NODE", "").split(",") if "SLURM_NODEID" in env else ():
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1) if tasks else []
    return counts[int(env["SLURM_NODEID"])] if counts else int(env.get("SLURM_NTASKS_PER_NODE", "1"))


def _own_networks() -> list[str]:
    """This host's IPv4 addresses with their networks, as "10.0.0.1/255.255.255.0", without loopback."""
    import psutil  # DeepSpeed needs it, so it is there

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        (name, entry)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and name in up
    ]
    return [f"{entry.address}/{entry.netmask}" for _, entry in found if not entry.address.startswith("127.")]


def common_address(told: list[tuple[str, list[str]]]) -> str:
    """The address at which all ranks reach rank 0, from every rank's (host name, addresses with networks) in rank order.

    It is in a network that every host has, and no other host's own, as those of container bridges are. Where there is none, the first of rank 0.
    """
    hosts = dict(told)
    own, others = told[0][1], [networks for host, networks in hosts.items() if host != told[0][0]]
    theirs = [[ipaddress.ip_interface(text).ip for text in networks] for networks in others]
    for text in own:
        here = ipaddress.ip_interface(text)
        if all(
            here.ip not in addresses and any(address in here.network for address in addresses) for addresses in theirs
        ):
            return str(here.ip)
    if not own:
        raise UserError(
            f"the host {told[0][0]} of rank 0 has no network but loopback: export MASTER_ADDR and MASTER_PORT"
        )
    return own[0].partition("/")[0]


def use_network_of(address: str, environment: LaunchEnvironment) -> None:
    """Have gloo and NCCL use the interface that leads to rank 0's host at the IP `address`, unless the user chose one.

    Gloo would take the one of this host's name, which Debian maps to 127.0.1.1, and NCCL the first that is up. Where MASTER_ADDR is a loopback
    name, because it names this host, it becomes this host's address in that network.
    """
    import psutil

    env = os.environ
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing; settles the route
            own = probe.getsockname()[0]
    except OSError:
        return
    with contextlib.suppress(OSError):
        if socket.gethostbyname(environment.master_address).startswith("127."):
            env["MASTER_ADDR"] = own
    name = next(
        (
            name
            for name, entries in psutil.net_if_addrs().items()
            if any(entry.address.partition("%")[0] == own for entry in entries)
        ),
        None,
    )
    if name:
        env.setdefault("GLOO_SOCKET_IFNAME", name)
        env.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # exactly this one: without the sign NCCL takes a prefix


def _require_master(launcher: str, several_nodes: bool) -> None:
    env = os.environ
    if "MASTER_ADDR" not in env and several_nodes:
        raise UserError(
            f"{launcher} started ranks on several nodes without MASTER_ADDR: export MASTER_ADDR as rank 0's host name"
        )
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", "29500")


def with_fewer_ranks(environment: LaunchEnvironment, world: int) -> LaunchEnvironment:
    """The same process in a world of the first `world` ranks; for those that stay."""
    os.environ["WORLD_SIZE"] = str(world)
    return dataclasses.replace(environment, world_size=world, local_size=min(environment.local_size, world))


def become_rank(rank: int, world: int, port: int) -> None:
    """Set the launch variables of rank `rank` of `world` on this machine, for a tool that starts its own ranks."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_0_address() -> str:
    """Where the other ranks reach rank 0's host; known after bootstrap_environment()."""
    return os.environ["MASTER_ADDR"]


def choose_device(environment: LaunchEnvironment) -> torch.device:
    """This process's accelerator, or the CPU with the cores of the machine shared between its local ranks."""
    if torch.cuda.is_available():
        if environment.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {environment.rank} wants GPU {environment.local_rank} but this host shows {torch.cuda.device_count()}: start fewer ranks"
            )
        torch.cuda.set_device(environment.local_rank)
        return torch.device("cuda", environment.local_rank)
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun writes 1 when nobody asked, so 1 means "not asked"
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // environment.local_size))
    return torch.device("cpu")


def describe_environment(device: torch.device) -> dict[str, object]:
    """Commit, versions, command and hardware, for environment.json."""
    here = Path(__file__).resolve().parents[1]
    versions = {}
    for package in (
        "torch",
        "deepspeed",
        "numpy",
        "pyarrow",
        "tiktoken",
        "pydantic",
        "mpi4py",
        "transformer-engine",
        "wandb",
    ):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "commit": _git(here, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git(here, "status", "--porcelain")),
        "command": sys.argv,
        "host": socket.gethostname(),
        "device": device_name(device),
        "device_count": torch.cuda.device_count() if device.type == "cuda" else 0,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "packages": versions,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
