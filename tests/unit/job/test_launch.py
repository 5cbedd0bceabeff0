"""The launch environment as each launcher leaves it, in processes of their own, and the threads of a CPU rank."""

import json
import os
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from megachat.device import device_name
from megachat.errors import UserError
from megachat.job.launch import LaunchEnvironment, choose_device, common_address, describe_environment, free_port
from megachat.job.links import listen
from tests.runs.forked import run_forked

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import dataclasses, json, os
from megachat.job.launch import bootstrap_environment
environment = bootstrap_environment()
keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
print(json.dumps([dataclasses.asdict(environment), {key: os.environ[key] for key in keys}]))
"""


def run_code(code: str, variables: dict[str, str]):
    """Runs the code in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(code)
        return run_forked([path], variables=variables)


def bootstrapped(**variables: str):
    done = run_code(PROGRAM, variables)
    return json.loads(done.out) if done.status == 0 else done.err.strip().splitlines()[-1]


def test_one_process_takes_a_free_port():
    environment, env = bootstrapped()
    assert (environment["rank"], environment["world_size"], environment["launcher"], env["MASTER_ADDR"]) == (
        0,
        1,
        "python",
        "127.0.0.1",
    )
    assert int(env["MASTER_PORT"]) > 0


def test_a_job_of_one_rank_takes_another_port_if_the_given_one_is_in_use():
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        environment, env = bootstrapped(**alone, MASTER_PORT=str(port))
    assert environment["master_port"] == int(env["MASTER_PORT"]) != port


def test_a_free_port_is_given_to_nobody_else_and_can_be_listened_on():
    port = free_port()
    for address in ("127.0.0.1", ""):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((address, port))
    with listen(port), socket.create_connection(("127.0.0.1", port)):
        pass
    assert len({free_port() for _ in range(16)}) == 16


def test_torch_variables_are_taken_as_they_are():
    given = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "5",
        "LOCAL_WORLD_SIZE": "2",
    }
    environment, env = bootstrapped(**given)
    place = {"master_address": "host", "master_port": 5, "agent_has_store": False, "attempt": 0}
    assert (
        environment
        == {"rank": 3, "local_rank": 1, "world_size": 4, "local_size": 2, "launcher": "RANK and WORLD_SIZE"} | place
    )
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("host", "5")
    elastic, _ = bootstrapped(
        **given, TORCHELASTIC_RUN_ID="1", TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="2"
    )
    assert (elastic["launcher"], elastic["agent_has_store"], elastic["attempt"]) == ("torchrun", True, 2)
    assert "MASTER_PORT is 'ssh', not a whole number from 1 to 65535" in bootstrapped(**given | {"MASTER_PORT": "ssh"})
    assert bootstrapped(**given, CROSS_SIZE="1")[0]["launcher"] == "deepspeed"


def test_mpirun_with_a_master_needs_no_mpi4py():
    given = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    environment, env = bootstrapped(**given, MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    assert (environment["rank"], environment["world_size"], environment["launcher"]) == (1, 2, "mpirun")
    assert env["MASTER_PORT"] == "29511"


def test_slurm_on_several_nodes_needs_a_master():
    given = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
    assert "export MASTER_ADDR" in bootstrapped(**given)
    environment, _ = bootstrapped(**given, MASTER_ADDR="n0")
    assert (environment["rank"], environment["local_rank"], environment["world_size"], environment["local_size"]) == (
        5,
        1,
        8,
        4,
    )


def test_slurm_nodes_may_have_unequal_tasks():
    given = {
        "SLURM_NTASKS": "9",
        "SLURM_PROCID": "8",
        "SLURM_LOCALID": "0",
        "SLURM_TASKS_PER_NODE": "4(x2),1",
        "MASTER_ADDR": "n0",
    }
    assert [bootstrapped(**given, SLURM_NODEID=node)[0]["local_size"] for node in "012"] == [4, 4, 1]


def test_rank_0_is_reached_by_a_network_that_all_hosts_have():
    bridge, data = "172.17.0.1/255.255.0.0", "10.0.0.{}/255.255.255.0"
    addresses = ["192.168.5.1/255.255.255.0", bridge, data.format(1)]
    hosts = [("a", addresses), ("a", addresses), ("b", [bridge, data.format(2)]), ("c", [bridge, data.format(3)])]
    assert common_address(hosts) == "10.0.0.1"
    assert common_address([("a", addresses), ("b", [bridge])]) == "192.168.5.1", "through a router"
    with pytest.raises(UserError, match="no network but loopback"):
        common_address([("a", []), ("b", addresses)])


def test_collectives_use_the_network_of_rank_0():
    program = PROGRAM.splitlines()[1:3] + [
        "from megachat.job.launch import use_network_of",
        "environment = bootstrap_environment()",
    ]
    program += ["use_network_of('127.0.0.1', environment)", "print(json.dumps([os.environ.get(k) for k in KEYS]))"]
    program.insert(0, 'KEYS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR")')
    given = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "5",
        "GLOO_SOCKET_IFNAME": "mine",
    }
    done = run_code("\n".join(program), given)
    assert json.loads(done.out) == ["mine", "=lo", "127.0.0.1"], done.err


@pytest.mark.parametrize(
    ("variable", "agent", "launcher", "shared"),
    [
        (None, {}, "deepspeed", True),
        ("1", {}, "torchrun", True),
        ("1", {"OMP_NUM_THREADS": "1"}, "torchrun", False),
        ("1", {}, "deepspeed", False),
        ("3", {}, "torchrun", False),
    ],
)
def test_local_ranks_share_the_cores_unless_the_user_set_the_threads(variable, agent, launcher, shared, monkeypatch):
    """torchrun sets OMP_NUM_THREADS=1 where the user did not: then its agent was started without it."""
    agents = SimpleNamespace(parent=lambda: SimpleNamespace(environ=lambda: agent))
    monkeypatch.setattr(psutil, "Process", lambda: agents)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    choose_device(LaunchEnvironment(0, 0, 2, 2, launcher, "localhost", 29500))
    assert threads == [4] * shared


def test_a_rank_uses_the_gpu_of_its_local_rank_or_the_only_one(monkeypatch):
    """Slurm and others show each task just its GPU, as number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    environment = LaunchEnvironment(1, 1, 2, 2, "srun", "localhost", 29500)
    for gpus, index in ((2, 1), (1, 0)):  # noqa: B007 (device_count reads gpus)
        assert choose_device(environment) == torch.device("cuda", index)
        assert os.environ["LOCAL_RANK"] == str(index), "DeepSpeed reads it"
    gpus = 3
    with pytest.raises(UserError, match="needs GPU 5 but this host shows 3"):
        choose_device(LaunchEnvironment(5, 5, 8, 8, "srun", "localhost", 29500))


def test_the_environment_is_json_and_keeps_the_begin_of_long_changes(monkeypatch):
    cpu = torch.device("cpu")
    described = describe_environment(cpu)
    json.dumps(described)
    monkeypatch.setattr(
        "megachat.job.launch.git", lambda *arguments: "-+" * 100_000 if arguments[0] == "diff" else "M file"
    )
    assert describe_environment(cpu)["diff"] == "-+" * 50_000
    assert described["packages"]["torch"] == torch.__version__ and described["packages"]["wandb"] is None
    assert described["device"] == device_name(cpu)
