"""The launch environment, as each launcher leaves it, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from megachat.device import choose_compute_dtype, describe_environment, device_name, peak_flops

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
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=clean | variables, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_one_process_takes_a_free_port():
    found, env = bootstrapped()
    assert (found["rank"], found["world_size"], found["launcher"], env["MASTER_ADDR"]) == (0, 1, "python", "127.0.0.1")
    assert int(env["MASTER_PORT"]) > 0


def test_torch_variables_are_taken_as_they_are():
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "5", "LOCAL_WORLD_SIZE": "2"}
    found, env = bootstrapped(**given)
    assert found == {"rank": 3, "local_rank": 1, "world_size": 4, "local_size": 2, "launcher": "RANK and WORLD_SIZE"}
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("host", "5")
    assert bootstrapped(**given, TORCHELASTIC_RUN_ID="1")[0]["launcher"] == "torchrun"
    assert bootstrapped(**given, CROSS_SIZE="1")[0]["launcher"] == "deepspeed"


def test_mpirun_with_a_master_needs_no_mpi4py():
    given = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    found, env = bootstrapped(**given, MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    assert (found["rank"], found["world_size"], found["launcher"]) == (1, 2, "mpirun")
    assert env["MASTER_PORT"] == "29511"


def test_slurm_on_several_nodes_needs_a_master():
    given = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
    assert "export MASTER_ADDR" in bootstrapped(**given)
    found, _ = bootstrapped(**given, MASTER_ADDR="n0")
    assert (found["rank"], found["local_rank"], found["world_size"], found["local_size"]) == (5, 1, 8, 4)


def test_dtype_is_asked_for_or_explained():
    cpu = torch.device("cpu")
    assert choose_compute_dtype("float16", cpu) == (torch.float16, "asked for")
    dtype, reason = choose_compute_dtype("auto", cpu)
    assert (dtype == torch.bfloat16) == ("has native" in reason)


def test_unknown_hardware_has_no_peak_and_the_environment_is_json():
    cpu = torch.device("cpu")
    assert peak_flops(cpu) is None
    described = describe_environment(cpu)
    json.dumps(described)
    assert described["packages"]["torch"] == torch.__version__
    assert described["device"] == device_name(cpu)
