"""launch/slurm.sbatch with programs that stand in for Slurm's; tests/runs/test_slurm.py has a real one."""

import os
import subprocess

import pytest

from tests.runs.forked import ROOT

SLURM = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "12345", "SLURM_NNODES": "2"}
SWEEP = "--set run.name=a --set optimizer.warmup_steps=10\n\n--set 'data.folder=\"a b\"'\n"


@pytest.fixture
def submit(tmp_path):
    """Runs the script as a job with more variables; the trainer ends with `status`."""
    (tmp_path / "srun").write_text(
        '#!/bin/sh\necho "srun $MASTER_ADDR:$MASTER_PORT cpus=$SRUN_CPUS_PER_TASK"; printf "<%s>" "$@"; exit $STATUS\n'
    )
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ $1 = show ] && printf "n1\\nn2\\n" || echo "scontrol $*"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "sweep").write_text(SWEEP)

    def run(*arguments: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess:
        given = SLURM | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": str(status)} | variables
        if "SWEEP" in variables:
            given["SWEEP"] = str(tmp_path / variables["SWEEP"])
        line = ["bash", ROOT / "launch" / "slurm.sbatch", *(arguments or ("configs/d4_cpu.json",))]
        return subprocess.run(line, env=given, cwd=ROOT, capture_output=True, text=True)

    return run


def words(done: subprocess.CompletedProcess) -> str:
    """The arguments of launch/pretrain.py."""
    return done.stdout.split("<launch/pretrain.py>")[1].split("\n")[0].split("requeueing")[0]


def test_a_job_resumes_and_is_requeued_only_when_it_has_saved(submit):
    done = submit("configs/d4_cpu.json", "--set", "horizon.steps=5", SLURM_CPUS_PER_TASK="12")
    assert done.returncode == 0 and "srun n1:22345 cpus=12\n" in done.stdout and "scontrol" not in done.stdout
    assert words(done) == "<--config><configs/d4_cpu.json><--resume><auto><--set><horizon.steps=5>"
    for status in (1, 2, 3, 4, 143):
        done = submit(status=status)
        assert done.returncode == status and "scontrol" not in done.stdout
    done = submit("configs/d4_cpu.json", "--resume", "runs/x/checkpoints/step_000020", status=75)
    assert done.returncode == 75 and done.stdout.endswith("scontrol requeue 12345\n")
    assert words(done).endswith("<--resume><runs/x/checkpoints/step_000020>")
    again = submit("configs/d4_cpu.json", "--resume", "runs/x/checkpoints/step_000020", SLURM_RESTART_COUNT="1")
    assert words(again).endswith("<--resume><runs/x/checkpoints/step_000020><--resume><auto>")


def test_a_task_of_an_array_takes_its_line(submit):
    array = {"SLURM_ARRAY_JOB_ID": "12300", "SWEEP": "sweep"}
    done = submit("configs/d4_cpu.json", "--set", "run.seed=1", SLURM_ARRAY_TASK_ID="1", status=75, **array)
    start = "<--config><configs/d4_cpu.json><--resume><auto><--set><run.seed=1>"
    assert words(done) == f"{start}<--set><run.name=d4_cpu-1><--set><run.name=a><--set><optimizer.warmup_steps=10>"
    assert done.stdout.endswith("scontrol requeue 12300_1\n"), "not the whole array"
    done = submit(SLURM_ARRAY_TASK_ID="3", **array)
    assert words(done).endswith('<--set><run.name=d4_cpu-3><--set><data.folder="a b">')


@pytest.mark.parametrize(
    ("variables", "fact"),
    [
        ({"SWEEP": "sweep"}, "SWEEP is for job arrays, one line per task: sbatch --array=1-3"),
        ({"SWEEP": "sweep", "SLURM_ARRAY_TASK_ID": "2"}, "has no line 2: --array counts its lines from 1"),
        ({"SWEEP": "sweep", "SLURM_ARRAY_TASK_ID": "0"}, "has no line 0"),
        ({"SWEEP": "nowhere", "SLURM_ARRAY_TASK_ID": "1"}, "nowhere cannot be read"),
        ({"SLURM_ARRAY_TASK_ID": "2"}, "would train the same run"),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "2"}, "use one of its 8 GPUs: sbatch --ntasks-per-node=8"),
    ],
)
def test_what_would_not_train_is_refused(submit, variables, fact):
    done = submit(**variables)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
    assert fact in done.stderr and done.stderr.count("\n") == 1
    assert submit(SLURM_GPUS_ON_NODE="8", SLURM_NTASKS="16").returncode == 0
