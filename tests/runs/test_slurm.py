"""launch/slurm.sbatch under a real Slurm on two hosts made of namespaces: several nodes, a signal, the requeue."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable

import pytest

from megachat import read_metrics
from tests.limits import limit_s
from tests.runs.job import BIN, begin, checkpoints, command
from tests.runs.network import SUBNET, two_hosts, why_not

LACKING = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name, path="/usr/sbin:/usr/bin")]
REASON = why_not() or (
    f"no {LACKING[0]} here: apt-get install slurmctld slurmd slurm-client munge" if LACKING else None
)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SETTINGS = f"""
ClusterName=tests
SlurmctldHost=host-a({SUBNET}.1)
AuthType=auth/munge
AuthInfo=socket={{folder}}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={{folder}}/state
SlurmdSpoolDir={{folder}}/%n
SlurmctldPidFile={{folder}}/slurmctld.pid
SlurmdPidFile={{folder}}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
NodeName=host-a NodeAddr={SUBNET}.1 CPUs=4 State=UNKNOWN
NodeName=host-b NodeAddr={SUBNET}.2 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """A cluster of host-a and host-b. Its daemons end with the hosts."""

    def __init__(self, network):
        self.network, self.folder = network, network.folder
        self.path = f"{network.folder}/bin:{BIN}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self.variables = {"SLURM_CONF": f"{self.folder}/slurm.conf"}
        (self.folder / "slurm.conf").write_text(SETTINGS.format(folder=self.folder))
        for name in ("state", "host-a", "host-b"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        places = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        places += [f"--key-file={key}", f"--seed-file={self.folder}/seed"]
        self._start("host-a", "munged", "--force", "--foreground", *places)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start("host-a", "slurmctld", "-D", "-c")
        for name in network.pids:
            self._start(name, "slurmd", "-D", "-N", name, "-d", "/usr/sbin/slurmstepd")
        self._until(lambda: self.do("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", "the nodes")

    def _start(self, host: str, *line: str) -> None:
        with open(self.folder / f"{line[0]}_{host}.log", "w") as log:
            words = [str(part) for part in self.network.at(host, list(line), **self.variables)]
            subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _until(self, true, what: str) -> None:
        deadline = time.monotonic() + limit_s()
        while not true():
            logs = {path.name: path.read_text()[-2000:] for path in self.folder.glob("*.log")}
            assert time.monotonic() < deadline, f"{what}: {logs}"
            time.sleep(0.2)

    def do(self, *line: str, **variables: str) -> str:
        """What a short command printed on host-a; "" if it failed."""
        process = begin(self.network.at("host-a", list(line), **self.variables, **variables))
        out, err = process.communicate(timeout=limit_s())
        return out if not process.returncode else ""

    def submit(self, *arguments: str, **variables: str) -> str:
        """Returns the id of a job of launch/slurm.sbatch, which writes to folder/ID.log."""
        options = [f"--output={self.folder}/%j.log", "--parsable"]
        job = self.do("sbatch", *options, *map(str, arguments), **variables).strip()
        assert job.isdecimal()
        return job

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def facts(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.do("scontrol", "show", "job", job)))

    def wait_until(self, job: str, true: Callable[[], bool]) -> None:
        self._until(true, f"job {job} does not get there")

    def wait(self, job: str) -> dict[str, str]:
        """Returns what Slurm says about a job that has ended."""
        running = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}
        deadline = time.monotonic() + limit_s()
        while (facts := self.facts(job))["JobState"] in running:
            assert time.monotonic() < deadline, f"{facts}\n{self.log(job)}"
            time.sleep(0.5)
        return facts


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("slurm")) as network:
        yield Slurm(network)


def test_a_job_on_two_nodes_saves_at_the_signal_and_is_requeued(slurm, place):
    """Slurm sends the signal before the time limit; here scancel does."""
    endless = {"horizon": {"steps": 5000}, "evaluate": {"every": 0}, "checkpoint": {"every": 1000}}
    program = command(place, "slurm", config=endless)[2:]
    job = slurm.submit("--nodes=2", "--ntasks-per-node=1", "--time=30", "launch/slurm.sbatch", *program)
    run = place.runs / "slurm"

    def steps() -> list[int]:
        lines = read_metrics(run) if (run / "metrics.jsonl").exists() else []
        return [line["step"] for line in lines if "train/loss" in line]

    slurm.wait_until(job, lambda: len(steps()) > 2)
    slurm.do("scancel", "--signal=USR1", job)
    slurm.wait_until(job, lambda: f"requeueing job {job}, which continues" in slurm.log(job))
    (saved,) = checkpoints(run)
    step = int(saved.removeprefix("step_"))
    slurm.wait_until(job, lambda: step in steps())
    facts = slurm.facts(job)
    slurm.do("scancel", "--signal=KILL", job)
    assert (facts["Restarts"], facts["NodeList"]) == ("1", "host-a,host-b"), slurm.log(job)
    assert steps() == list(range(len(steps()))), "the second start continued"
    starts = json.loads((run / "environment.json").read_text())
    assert [(start["launch"]["launcher"], start["launch"]["world_size"]) for start in starts] == [("srun", 2)] * 2
    assert [start["launch"]["local_size"] for start in starts] == [1, 1]


STAND_IN = """#!/bin/sh
task=${SLURM_ARRAY_TASK_ID:-none} start=${SLURM_RESTART_COUNT:-0}
echo "task $task start $start rank $SLURM_PROCID of $SLURM_NTASKS: $*"
case $task$start in none0 | 10) exit 75 ;; esac
"""


def test_only_the_task_of_an_array_that_saved_is_requeued(slurm):
    """A program stands in for the trainer: task 1 saves at its first start, and so does a job without an array."""
    folder = slurm.folder / "stand_in"
    folder.mkdir()
    for name in ("python", "deepspeed"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    sweep = slurm.folder / "sweep"
    sweep.write_text("--set run.name=first\n--set optimizer.warmup_steps=5\n")
    variables = {"PATH": f"{folder}:{slurm.path}", "SWEEP": str(sweep)}
    jobs = slurm.submit("--array=1-2", "--ntasks=1", "launch/slurm.sbatch", "configs/d12.json", **variables)
    variables.pop("SWEEP")
    alone = slurm.submit("--ntasks=2", "--no-requeue", "launch/slurm.sbatch", "configs/d12.json", **variables)
    first, second, ended = (slurm.wait(job) for job in (f"{jobs}_1", f"{jobs}_2", alone))
    assert [(each["JobState"], each["Restarts"]) for each in (first, second)] == [
        ("COMPLETED", "1"),
        ("COMPLETED", "0"),
    ]
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0") and "not requeued" in slurm.log(alone)
    lines = slurm.log(first["JobId"]).splitlines()
    arguments = "launch/pretrain.py --config configs/d12.json --resume auto --set run.name=d12-1 --set run.name=first"
    assert [line for line in lines if line.startswith("task")] == [
        f"task 1 start 0 rank 0 of 1: {arguments}",
        f"task 1 start 1 rank 0 of 1: {arguments} --resume auto",
    ]
    assert "--set run.name=d12-2 --set optimizer.warmup_steps=5\n" in slurm.log(second["JobId"])
