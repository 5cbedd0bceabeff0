"""What `python launch/pretrain.py` imports before its first step ends: seconds of every start, with every launcher."""

import subprocess
import sys

from tests.runs.forked import ROOT, environment
from tests.runs.job import command

# torch.compile's parts, saving, downloads, and packages that others load if they are installed
UNUSED = "torch._dynamo torch._inductor torch.distributed.checkpoint sympy requests pandas transformers wandb".split()
FIRST_STEP = """
import os, sys
from megachat.train import trainer

def only_step(*arguments, **how):
    take_step(*arguments, **how)
    print("imported", [name for name in sys.argv.pop().split() if name in sys.modules], flush=True)
    os._exit(0)

take_step, trainer.train_step = trainer.train_step, only_step
from megachat.commands.main import door
door("pretrain")(sys.argv[1:-1])
"""


def test_the_first_step_needs_no_compiler_and_no_checkpoint(place):
    program = [sys.executable, "-c", FIRST_STEP, *command(place, "start")[1:], " ".join(UNUSED)]
    done = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert "imported []\n" in done.stdout, done.stdout + done.stderr
