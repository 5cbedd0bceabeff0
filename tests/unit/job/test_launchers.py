"""What each launcher's variables say about a rank: known ones are read, and no rank of an unknown one trains alone."""

import os

import pytest
import torch

from megachat.errors import UserError
from megachat.job.launch import bootstrap_environment
from megachat.job.launchers import launcher_rank
from tests.runs.forked import environment

MASTER = {"MASTER_ADDR": "n0", "MASTER_PORT": "5000"}
ALL = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"} | MASTER
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(("RANK", "SIZE"), "58", strict=True)}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
ONE_TASK = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
FLUX = {"FLUX_TASK_RANK": "5", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "2"}


@pytest.fixture
def started(monkeypatch):
    """Starts this process with a launcher's variables only, on a host with some GPUs; returns its launch environment.

    It returns the sentence of a refusal.
    """

    def start(variables: dict[str, str], gpus: int = 0):
        for name in set(os.environ) - set(environment()):
            monkeypatch.delenv(name)
        for name in ("LOCAL_SIZE", *ALL):
            monkeypatch.setenv(name, "")  # so that what is set below is unset after the test
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        try:
            return bootstrap_environment()
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            return str(error)
        finally:
            for name in variables:
                monkeypatch.delenv(name, raising=False)

    return start


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        ("mpirun", OPEN_MPI | {"PMIX_RANK": "5"}),
        ("mpirun", OPEN_MPI | SLURM | {"SLURM_PROCID": "0"}),
        ("MVAPICH", {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}),
        ("mpiexec", HYDRA),
        ("mpiexec", HYDRA | SLURM | {"SLURM_PROCID": "1"}),  # Hydra starts one proxy per node through srun
        ("mpiexec", HYDRA | ONE_TASK),
        ("srun", SLURM | {"PMI_RANK": "5", "PMI_SIZE": "8", "PMIX_RANK": "5"}),
        ("PALS", {"PALS_RANKID": "5", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4"}),
        ("flux", FLUX | {"PMI_RANK": "5", "PMI_SIZE": "8"}),
        ("a PMI launcher", {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"}),
        ("horovodrun", {f"HOROVOD_{k}": v for k, v in zip(("RANK", "SIZE", "LOCAL_RANK"), "581", strict=True)}),
    ],
)
def test_launchers_that_say_everything(launcher, variables, started):
    job = started(variables | MASTER, gpus=4)
    assert (job.launcher, job.rank, job.world_size, job.local_rank) == (launcher, 5, 8, 1)
    assert job.local_size == (8 if launcher == "horovodrun" else 4) and job.master_address == "n0"
    if launcher != "mpirun":  # which has mpi4py
        assert "there is no MASTER_ADDR: export MASTER_ADDR as rank 0's host name" in started(variables, gpus=4)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "WORLD_SIZE": "4"},  # Kubeflow's PyTorchJob
        {"RANK": "1", "WORLD_SIZE": "4", "PET_NPROC_PER_NODE": "auto", "PET_NNODES": "4"},
        {"PMI_RANK": "1", "PMI_SIZE": "4"},
        {"PALS_RANKID": "1", "PALS_SIZE": "4"},
    ],
)
def test_without_a_local_rank_only_one_visible_gpu_is_safe(variables, started):
    for gpus in (0, 1):
        job = started(variables | MASTER, gpus)
        assert (job.rank, job.world_size, job.local_rank, job.local_size) == (1, 4, 0, 1)
    assert "rank 1 sees 8 GPUs, and " in started(variables | MASTER, gpus=8)
    assert "set no LOCAL_RANK that chooses one: set LOCAL_RANK" in started(variables | MASTER, gpus=8)
    assert "there is no MASTER_ADDR" in started(variables)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "1"}, "RANK of RANK and WORLD_SIZE is set, but no variable has the number of ranks"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE of RANK and WORLD_SIZE is set, but no variable has this process's rank"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK of a PMIx launcher is set, but no variable has the number of ranks: set RANK,"),
        ({"PALS_RANKID": "1"}, "PALS_RANKID of PALS is set, but no variable has the number of ranks"),
        ({"PET_NNODES": "2:4"}, "PET_NNODES of this pod are for torchrun: start `torchrun launch/pretrain.py"),
        ({"PET_NPROC_PER_NODE": "8"}, "are for torchrun"),
    ],
)
def test_a_launcher_that_says_too_little_is_refused_by_name(variables, sentence, started):
    assert sentence in started(variables)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (ALL | {"RANK": ""}, "RANK is '', not a whole number from 0 to 999999: correct or unset it"),
        (ALL | {"RANK": "-1"}, "RANK is '-1', not"),
        (ALL | {"RANK": "4"}, "RANK is 4 and WORLD_SIZE is 4: ranks are numbered from 0 to 3"),
        (ALL | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number from 1"),
        (ALL | {"WORLD_SIZE": "9" * 6000}, "WORLD_SIZE is '9999"),
        (ALL | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not"),
        (ALL | {"LOCAL_RANK": "1.0"}, "LOCAL_RANK is '1.0', not"),
        (ALL | {"LOCAL_RANK": "4"}, "LOCAL_RANK is 4, of WORLD_SIZE 4: it is numbered from 0 on each host"),
        (ALL | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1, of LOCAL_WORLD_SIZE 1"),
        (ALL | {"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x', not"),
        (ALL | {"MASTER_PORT": "99999"}, "MASTER_PORT is '99999', not a whole number from 1 to 65535"),
        (ALL | {"MASTER_PORT": ""}, "MASTER_PORT is '', not"),
        (ALL | {"MASTER_ADDR": ""}, "MASTER_ADDR is '', neither an IP address nor a host name"),
        (ALL | {"MASTER_ADDR": "a..b"}, "MASTER_ADDR is 'a..b', neither"),
        (ALL | {"MASTER_ADDR": "a" * 64}, "MASTER_ADDR is 'aaa"),
        (ALL | {"MASTER_ADDR": "n0:29500"}, "set it to rank 0's host, without a port"),
        (ALL | {"MASTER_ADDR": "-oProxyCommand"}, "MASTER_ADDR is '-oProxyCommand', neither"),
        (ALL | {"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is 'x', not"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "?"}, "OMPI_COMM_WORLD_SIZE is '?', not"),
        (SLURM | {"SLURM_PROCID": "8"} | MASTER, "SLURM_PROCID is 8 and SLURM_NTASKS is 8"),
        (HYDRA | {"PMI_RANK": ""}, "PMI_RANK is '', not"),
    ],
)
def test_impossible_values_are_one_sentence(variables, sentence, started):
    assert sentence in started(variables)
    assert launcher_rank() == 0, "an error is reported whatever the variables hold"


def test_good_addresses_and_single_processes(started):
    for address in ("n0", "n0.cluster.local.", "10.0.0.1", "fe80::1%eth0", "::1", "job_0-master", "a" * 63):
        assert started(ALL | {"MASTER_ADDR": address}).master_address == address
    for variables in ({}, {"WORLD_SIZE": "1"}, {"PET_NNODES": "1"}, ONE_TASK, ONE_TASK | {"PMIX_RANK": "0"}):
        job = started(variables | {"MASTER_PORT": "29500", "MASTER_ADDR": "elsewhere"}, gpus=8)
        assert (job.rank, job.world_size, job.master_address) == (0, 1, "127.0.0.1")
        assert job.master_port != 29500, "single processes on one host must not meet"
    assert started({"RANK": "0", "WORLD_SIZE": "1"}, gpus=8).world_size == 1


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "PMIX_RANK"])
def test_the_rank_of_an_error_is_the_launchers(name, monkeypatch):
    for each in set(os.environ) - set(environment()):
        monkeypatch.delenv(each)
    monkeypatch.setenv(name, "3")
    assert launcher_rank() == 3
