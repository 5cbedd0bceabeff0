"""The launch environment, as each launcher leaves it, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megachat.device import choose_compute_dtype, device_name, peak_flops, peak_of_name
from megachat.errors import UserError
from megachat.job.launch import common_address, describe_environment

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import dataclasses, json, os
from megachat.device import bootstrap_environment
found = bootstrap_environment()
keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
print(json.dumps([dataclasses.asdict(found), {key: os.environ[key] for key in keys}]))
"""

_LAUNCH = ("RANK", "WORLD", "LOCAL", "MASTER", "OMPI", "SLURM", "CROSS", "TORCHELASTIC")


def bootstrapped(**variables: str):
    clean = {key: value for key, value in os.environ.items() if key.split("_")[0] not in _LAUNCH}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=clean | variables, capture_output=True, text=True
    )
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_one_process_takes_a_free_port():
    found, env = bootstrapped()
    assert (found["rank"], found["world_size"], found["launcher"], env["MASTER_ADDR"]) == (0, 1, "python", "127.0.0.1")
    assert int(env["MASTER_PORT"]) > 0


def test_torch_variables_are_taken_as_they_are():
    given = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "5",
        "LOCAL_WORLD_SIZE": "2",
    }
    found, env = bootstrapped(**given)
    place = {"master_address": "host", "master_port": 5, "agent_has_store": False, "attempt": 0}
    assert (
        found
        == {"rank": 3, "local_rank": 1, "world_size": 4, "local_size": 2, "launcher": "RANK and WORLD_SIZE"} | place
    )
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("host", "5")
    elastic, _ = bootstrapped(
        **given, TORCHELASTIC_RUN_ID="1", TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="2"
    )
    assert (elastic["launcher"], elastic["agent_has_store"], elastic["attempt"]) == ("torchrun", True, 2)
    assert "MASTER_PORT is 'ssh': set it to a number" in bootstrapped(**given | {"MASTER_PORT": "ssh"})
    assert bootstrapped(**given, CROSS_SIZE="1")[0]["launcher"] == "deepspeed"


def test_mpirun_with_a_master_needs_no_mpi4py():
    given = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    found, env = bootstrapped(**given, MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    assert (found["rank"], found["world_size"], found["launcher"]) == (1, 2, "mpirun")
    assert env["MASTER_PORT"] == "29511"


def test_slurm_on_several_nodes_needs_a_master():
    given = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
    assert "export MASTER_ADDR" in bootstrapped(**given)
    found, _ = bootstrapped(**given, MASTER_ADDR="n0")
    assert (found["rank"], found["local_rank"], found["world_size"], found["local_size"]) == (5, 1, 8, 4)


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
    own = ["192.168.5.1/255.255.255.0", bridge, data.format(1)]
    hosts = [("a", own), ("a", own), ("b", [bridge, data.format(2)]), ("c", [bridge, data.format(3)])]
    assert common_address(hosts) == "10.0.0.1"
    assert common_address([("a", own), ("b", [bridge])]) == "192.168.5.1", "through a router"
    with pytest.raises(UserError, match="no network but loopback"):
        common_address([("a", []), ("b", own)])


def test_collectives_use_the_network_of_rank_0():
    program = PROGRAM.splitlines()[1:3] + [
        "from megachat.device import use_network_of",
        "found = bootstrap_environment()",
    ]
    program += ["use_network_of('127.0.0.1', found)", "print(json.dumps([os.environ.get(k) for k in KEYS]))"]
    program.insert(0, 'KEYS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR")')
    given = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "5",
        "GLOO_SOCKET_IFNAME": "mine",
    }
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)], cwd=ROOT, env=os.environ | given, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == ["mine", "=lo", "127.0.0.1"], done.stderr


def test_dtype_is_asked_for_or_explained():
    cpu = torch.device("cpu")
    assert choose_compute_dtype("float16", cpu) == (torch.float16, "requested")
    dtype, reason = choose_compute_dtype("auto", cpu)
    assert (dtype == torch.bfloat16) == ("has native" in reason)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), torch.float32), ((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)],
)
def test_a_gpu_without_bfloat16_computes_in_float16_if_that_is_fast(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_compute_dtype("auto", torch.device("cuda", 0))[0] == dtype


def test_unknown_hardware_has_no_peak_and_the_environment_is_json():
    cpu = torch.device("cpu")
    assert peak_flops(cpu) is None
    described = describe_environment(cpu)
    json.dumps(described)
    assert described["packages"]["torch"] == torch.__version__
    assert described["device"] == device_name(cpu)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100X", None),
        ("NVIDIA H100", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_are_of_whole_names(name, peak):
    assert peak_of_name(name) == peak
