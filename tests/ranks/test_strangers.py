"""A crowd of strangers at the failure monitor's port while ranks connect: all are dropped, and the job goes on."""

import json
import os
import resource
import socket
from pathlib import Path

import psutil
import torch

from megachat.job.failure_monitor import TICK_S, FailureMonitor
from megachat.parallel.collectives import all_reduce, barrier
from megachat.parallel.mesh import build_mesh
from tests.harness import run_ranks
from tests.limits import until

STRANGERS = 2000
FILES = 300  # that rank 0 may have open: far fewer than strangers
KINDS = (
    b"",
    b"[" * 200_000 + b"\n",
    b"\0" * 1000 + b"\n",
    b'{"rank": 1.5, "challenge": "", "proof": ""}\n',
    b"x" * 5000,
)


def crowd(address: tuple[str, int]) -> list[socket.socket]:
    """Connections of all kinds, which stay open on this side."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = STRANGERS + 500
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    strangers = []
    for number in range(min(STRANGERS, most - 500)):
        stranger = socket.create_connection(address)
        stranger.settimeout(0.0)
        try:
            stranger.send(KINDS[number % len(KINDS)])
        except ConnectionError:
            pass
        strangers.append(stranger)
    return strangers


def is_dropped(stranger: socket.socket) -> bool:
    try:
        while stranger.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def listening() -> list[str]:
    connections = psutil.Process().net_connections(kind="tcp")
    return sorted(f"{each.laddr.ip}:{each.laddr.port}" for each in connections if each.status == psutil.CONN_LISTEN)


def attacked(folder: str) -> dict:
    """Rank 1 sends a crowd to rank 0's hub before it connects itself; then both work for a while."""
    mesh, strangers, seen = build_mesh(torch.device("cpu")), [], {}
    rank = mesh.world.rank
    os.environ["MEGACHAT_SECRET"] = "a secret of 24 characters"
    os.dup2(os.open(Path(folder, f"err{rank}"), os.O_WRONLY | os.O_CREAT), 2)
    all_reduce(torch.ones(1), mesh.world, name="first")
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    before = {"files": open_files(), "listening": listening()}
    monitor = FailureMonitor(rank)
    connect = monitor._connect_to

    def with_a_crowd(hub_rank: int, address: tuple[str, int]):
        if (rank, hub_rank) == (1, 0):
            seen["address"] = address[0]
            strangers.extend(crowd(address))
        return connect(hub_rank, address)

    monitor._connect_to = with_a_crowd
    with monitor:
        monitor.connect(mesh, address="127.0.0.1", stall_s=20, slow_s=20, folder=Path(folder))
        seen["monitored"] = all(monitor._hub_links)
        barrier(mesh.world)
        until(lambda: listening() == before["listening"], "end of listening, as once all are connected", TICK_S)
        for _ in range(100):
            all_reduce(torch.ones(1), mesh.world, name="step")
        until(lambda: all(map(is_dropped, strangers)), "end of all strangers", TICK_S)
        seen["crowd"] = len(strangers)
        barrier(mesh.world)
    for stranger in strangers:
        stranger.close()
    seen["files"] = open_files() - before["files"]
    return seen


def test_a_crowd_takes_nothing_from_a_job(tmp_path):
    zero, one = run_ranks(attacked, 2, str(tmp_path))
    assert one["crowd"] >= 500 and one["address"] == "127.0.0.1"
    assert zero["monitored"] and one["monitored"], "both ranks are connected to both hubs"
    assert zero["files"] <= 0 and one["files"] <= 0
    assert [path.read_text() for path in sorted(tmp_path.glob("err*"))] == ["", ""], json.dumps([zero, one])
