"""Names the predicted numbers of a plan on a machine: seconds of a step by part, hours and price. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

from megachat.config import Config
from megachat.planning.hardware import Machine
from megachat.planning.numbers import Number
from megachat.planning.plan import Plan
from megachat.planning.probe import Probe
from megachat.planning.step_time import PARTS, UNTIMED_STEPS, predict_run

_PART_FORMULAS = {
    "matrix products": "micro-batches of a step times, per shape and dtype, the longer of FLOPs over the reached rate "
    "and bytes over the memory's bandwidth",
    "attention": "micro-batches times pairs of query and visible key, forward and 2.5 times that backward",
    "elementwise": "micro-batches times the bytes that kernels move over the memory's bandwidth",
    "head and loss": "micro-batches times the head's products and the bytes that the loss moves per logit",
    "optimizer": "products of Newton-Schulz on the busiest rank, and bytes of Muon's shard and AdamW's share",
    "data axis": "latency per ring step and bytes of the ring over the link's bandwidth, less what computing hides",
    "tensor axis": "micro-batches times latency per ring step and bytes of the stream over the link's bandwidth",
    "pipeline axis": "micro-batches times the stream and its gradient, sent and received, over the link's bandwidth",
    "pipeline bubble": "one micro-batch of every stage but the slowest",
    "host": "what launching kernels takes longer than running them, and a constant per step",
}
TIME_NUMBERS = {
    f"time.{part.replace(' ', '_')}": Number(f"predicted seconds of a step: {part}", formula)
    for part, formula in _PART_FORMULAS.items()
}
TIME_NUMBERS |= {
    "time.step": Number("predicted seconds of a step", " + ".join(TIME_NUMBERS)),
    "time.clock_hours": Number(
        "predicted hours by the speedrun's clock", f"(stop_step - {UNTIMED_STEPS}) * time.step / 3600"
    ),
    "time.wall_hours": Number(
        "predicted hours of the wall clock", "stop_step times time.step, validations and saves, in hours"
    ),
    "price": Number("predicted price of the run", "time.wall_hours * price_per_hour * priced_units"),
}


@dataclass(frozen=True)
class Timing:
    """Where predicted numbers are from. price: of a GPU-hour, with a probe of a CPU of its hour. saved: bytes that a
    rank writes of a checkpoint."""

    machine: Machine | Probe
    price: float | None
    saved: Callable[[Config, Plan], float]

    @property
    def source(self) -> str:
        """Returns where the speeds are from."""
        if isinstance(self.machine, Probe):
            return f"measured speeds in {self.machine.source}"
        return f"predicted, not measured, from data sheets and assumed shares of them: {self.machine.gpu.source}"

    def numbers(self, config: Config, plan: Plan) -> dict[str, object]:
        """Returns the predicted numbers by their names in TIME_NUMBERS, and what their formulas use beside the plan.

        Raises UserError for a config that the probe does not predict.
        """
        units = plan.layout.world
        if isinstance(self.machine, Probe):
            config = self.machine.config_for(config, plan.dims.vocab_size)
            units = units if self.machine.on_gpu else 1
        run = predict_run(config, plan, self.machine, checkpoint_bytes=self.saved(config, plan))
        numbers: dict[str, object] = {f"time.{part.replace(' ', '_')}": run.step.parts[part] for part in PARTS}
        numbers |= {"time.step": run.step.total, "time.clock_hours": run.clock_hours, "time.wall_hours": run.wall_hours}
        if self.price is not None:
            numbers["price"] = run.wall_hours * self.price * units
        return numbers

    def constants(self, plan: Plan) -> dict[str, object]:
        """Returns what formulas use beside the numbers of a plan."""
        on_cpu = isinstance(self.machine, Probe) and not self.machine.on_gpu
        return {"price_per_hour": self.price or 0, "priced_units": 1 if on_cpu else plan.layout.world}
