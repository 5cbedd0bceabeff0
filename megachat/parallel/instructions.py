"""The instructions of DeepSpeed's schedule: how they are recorded, and a schedule without an optimizer step."""

from collections.abc import Iterator

import torch
from deepspeed.runtime.pipe import schedule

from megachat.parallel.progress import profile_range

BACKWARD = "backward"
# Instruction of DeepSpeed's schedule -> its name in the failure monitor's report, whether it waits for another rank,
# and its range in a profile.
_INSTRUCTIONS = {
    schedule.LoadMicroBatch: ("loading a micro-batch", False, "data"),
    schedule.ForwardPass: ("forward", False, "forward"),
    schedule.BackwardPass: (BACKWARD, False, "backward"),
    schedule.SendActivation: ("sending activations to the next stage", True, "stages"),
    schedule.RecvActivation: ("receiving activations from the stage before", True, "stages"),
    schedule.SendGrad: ("sending gradients to the stage before", True, "stages"),
    schedule.RecvGrad: ("receiving gradients from the next stage", True, "stages"),
    schedule.ReduceTiedGrads: ("reducing tied gradients", False, "reduce"),
    schedule.ReduceGrads: ("reducing AdamW's gradients", True, "reduce"),
    schedule.OptimizerStep: ("optimizer step", True, "optimizer"),
}


def recorded(instruction, function):
    """Returns `function`, wrapped to note its start, to run in a profile range, and to measure its work."""
    text, waits, range_name = _INSTRUCTIONS[instruction]

    def execute(self, **arguments):
        progress = self.mesh.world.progress
        progress.note(text, waits=waits)
        if progress.sent is not None:
            if text == BACKWARD:
                progress.sent.append((BACKWARD, torch.zeros((), dtype=torch.int64, device=self.mesh.device)))
            progress.record_sent(text, self.sent(instruction, **arguments))
        with profile_range(range_name), progress.work.working(range_name in ("forward", "backward")):
            return function(self, **arguments)

    return execute


class ForwardAndBackward(schedule.TrainSchedule):
    """The training schedule without its end: nothing is reduced and no optimizer steps."""

    def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
        """Yields the instructions of each turn."""
        ends = schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep
        for instructions in super().steps():
            yield [instruction for instruction in instructions if not isinstance(instruction, ends)]
