"""The performance matrix of one GPU: linears x attention kernels at d24 and d12, each case in a process of its own, and attention layers alone.

`python tools/bench.py gpu --out docs/benchmarks.md` measures what fits into --minutes, the most telling cases first; tools/bench/gpu_report.py
writes it down. nanochat's own model and optimizer take part when --nanochat names a clone of it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megachat.config import BatchConfig, Config  # noqa: E402
from megachat.device import peak_flops, synchronize  # noqa: E402
from megachat.errors import UserError  # noqa: E402
from megachat.job.launch import bootstrap_environment, choose_device  # noqa: E402
from tools.bench.gpu_report import gpu_facts, label, report, write_report  # noqa: E402
from tools.bench.nanochat import accumulate, build_nanochat, open_nanochat, require_clone  # noqa: E402

VOCAB, SEQUENCE, WARM_UP, TIMED, REFERENCE_TOKENS = 32768, 2048, 5, 10, 2**19
LINEARS = {  # name -> settings of precision
    "torch eager": {"compile": False},
    "torch compiled": {"compile": True},
    "te bf16": {"compile": True},
    "te tensorwise": {"compile": True, "fp8": "tensorwise", "fp8_backend": "te"},
    "te blockwise": {"compile": True, "fp8": "blockwise", "fp8_backend": "te"},
    "torch tensorwise": {"compile": True, "fp8": "tensorwise", "fp8_backend": "torch"},
}
KERNELS = ("te", "flash3", "flex", "flash2", "flash4", "sdpa")
BATCH = {24: (16, 2), 12: (32, 1)}  # depth -> rows a micro-batch, micro-batches: 65,536 tokens a step
ABOUT = (
    f"bfloat16, rows of {SEQUENCE} tokens, vocabulary {VOCAB}, windows SSSL, {WARM_UP} steps of warm-up, medians of {TIMED} steps, each case in a "
    f"process of its own. The optimizer's share is that of a step of {REFERENCE_TOKENS} tokens, from its own time and that of a micro-batch."
)


def cases(nanochat: str | None) -> list[dict]:
    """In the order in which they are measured."""

    def case(linears: str, attention: str = "auto", depth: int = 24, **more) -> dict:
        return {"linears": linears, "attention": attention, "depth": depth, **more}

    found = [case("torch compiled"), case("te tensorwise")]
    found += [case("nanochat", path=nanochat), case("nanochat fp8", path=nanochat)] if nanochat else []
    found += [
        case("attention"),
        case("torch tensorwise"),
        case("torch compiled", depth=12),
        case("te tensorwise", depth=12),
    ]
    if "recompute" in BatchConfig.model_fields:
        found += [case("torch compiled", recompute=kind) for kind in ("selective", "block")]
    found += [case("te bf16"), case("torch eager"), case("te blockwise"), case("torch tensorwise", depth=12)]
    found += [case("nanochat", depth=12, path=nanochat)] if nanochat else []
    found += [case("torch compiled", name) for name in KERNELS]
    found += [case("torch compiled", "sdpa", pattern="L")]
    found += [
        case(linears, depth=12, micro_rows=8) for linears in ("te tensorwise", "torch compiled")
    ]  # few tokens: does the host keep up?
    return found + [
        case(linears, name)
        for linears in LINEARS
        for name in ("te", "flash3", "flex", "sdpa")
        if linears != "torch compiled"
    ]


def case_config(case: dict) -> Config:
    """The run of a case, on one rank."""
    rows, accumulation = BATCH[case["depth"]]
    batch = {"micro_rows": case.get("micro_rows", rows), "accumulation": accumulation}
    batch |= {"recompute": case["recompute"]} if "recompute" in case else {}
    precision = {"compute": "bfloat16", "attention": case["attention"]} | LINEARS[case["linears"]]
    model = {"depth": case["depth"], "sequence_len": SEQUENCE, "window_pattern": case.get("pattern", "SSSL")}
    return Config.model_validate({"model": model, "batch": batch, "horizon": {"steps": 100}, "precision": precision})


def build(case: dict, device):
    """(take a step and return its loss, the plan, seconds of the optimizer in each step that was told apart, attention, lines of what was chosen)."""
    import torch
    from deepspeed.runtime.pipe import schedule

    from megachat.device import collective_backend
    from megachat.kernels.choice import describe_kernels
    from megachat.kernels.linear import Linear
    from megachat.kernels.te import TELinears
    from megachat.parallel.engine import start_collectives
    from megachat.parallel.mesh import build_mesh
    from megachat.planning.plan import resolve
    from megachat.programs.verify_layout import related_rows
    from megachat.train.build import build_training
    from megachat.train.step import set_schedules, update

    start_collectives(device, collective_backend(device), timedelta(seconds=600))
    config = case_config(case)
    plan = resolve(config, 1, VOCAB)
    training = build_training(config, plan, build_mesh(device), torch.ones(VOCAB, dtype=torch.int64))
    if case["linears"] == "te bf16":
        for linear in (
            module
            for module in training.layers.modules()
            if isinstance(module, Linear) and min(module.weight.shape) >= 128
        ):
            linear.product = TELinears(None).build(linear.weight)
    set_schedules(training, 10)
    rows, optimizer_s = related_rows(0, plan.rows_per_step, SEQUENCE + 1, VOCAB), []
    engine = training.engine

    def timed(function):
        def execute(self, **arguments):
            synchronize(device)
            begin = time.perf_counter()
            function(self, **arguments)
            synchronize(device)
            optimizer_s[-1] += time.perf_counter() - begin

        return execute

    def step(apart: bool = False) -> float:
        if (
            apart
        ):  # waiting for the device around the optimizer costs time, so these steps are not those that are counted
            optimizer_s.append(0.0)
            kinds = (schedule.ReduceGrads, schedule.OptimizerStep)
            engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {
                kind: timed(engine._INSTRUCTION_MAP[kind]) for kind in kinds
            }
        loss = update(training, rows)[0].item()
        engine.__dict__.pop("_INSTRUCTION_MAP", None)
        return loss

    return step, plan, optimizer_s, training.kernels.attention.name, describe_kernels(config, training.kernels, plan)


def nanochat_build(case: dict, device):
    """As `build`, of nanochat's own model and optimizer, compiled, as its training script sets them up."""
    from megachat.planning.plan import resolve
    from megachat.programs.verify_layout import related_rows

    plan = resolve(case_config(case | {"linears": "torch compiled"}), 1, VOCAB)
    _, kernels = open_nanochat(case["path"])
    model, run, optimizer = build_nanochat(case["path"], plan, "SSSL", device, fp8=case["linears"] == "nanochat fp8")
    rows, optimizer_s = related_rows(0, plan.rows_per_step, SEQUENCE + 1, VOCAB), []

    def step(apart: bool = False) -> float:
        loss = accumulate(run, rows, plan.micro_rows, device)
        if apart:
            synchronize(device)
        begin = time.perf_counter()
        optimizer.step()
        if apart:
            synchronize(device)
            optimizer_s.append(time.perf_counter() - begin)
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step, plan, optimizer_s, "flash3" if kernels.USE_FA3 else "sdpa", [f"nanochat in {case['path']}"]


def measure(case: dict) -> dict:
    """Numbers of one case, in this process."""
    import torch

    device = choose_device(bootstrap_environment())
    if case["linears"] == "attention":
        return measure_attention(case, device)
    step, plan, optimizer_s, attention, chosen = (nanochat_build if "path" in case else build)(case, device)
    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def timed(count: int, apart: bool) -> tuple[list[float], list[float]]:
        """(seconds, losses) of steps."""
        seconds, losses = [], []
        for _ in range(count):
            synchronize(device)
            begin = time.perf_counter()
            losses.append(step(apart))
            synchronize(device)
            seconds.append(time.perf_counter() - begin)
        return seconds, losses

    seconds, losses = timed(TIMED, apart=False)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    whole, _ = timed(3, apart=True)
    step_s, optimizer, peak = statistics.median(seconds), statistics.median(optimizer_s), peak_flops(device)
    passes = statistics.median(
        one - own for one, own in zip(whole, optimizer_s, strict=True)
    )  # of the same steps: others may be faster
    at_reference = optimizer / (optimizer + passes * REFERENCE_TOKENS / plan.tokens_per_step)
    return {
        "tokens_per_sec": plan.tokens_per_step / step_s,
        "step_s": seconds,
        "mfu": plan.flops_per_token * plan.tokens_per_step / step_s / peak if peak else None,
        "peak_memory_bytes": memory,
        "optimizer_s": optimizer_s,
        "optimizer_share_at_reference_batch": at_reference,
        "last_loss": losses[-1],
        "attention": attention,
        "chosen": chosen,
    }


def measure_attention(case: dict, device) -> dict:
    """Seconds of attention alone, forward and backward of one layer, with each kernel that is here, for short windows and whole rows."""
    import torch

    from megachat.kernels.choice import choose_attention
    from megachat.planning.plan import resolve

    plan = resolve(case_config(case | {"linears": "torch compiled", "attention": "auto"}), 1, VOCAB)
    dims, told = plan.dims, {}
    shapes = [
        (plan.micro_rows, SEQUENCE, heads, dims.head_size) for heads in (dims.heads, dims.kv_heads, dims.kv_heads)
    ]
    g, *inputs = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for shape in (shapes[0], *shapes)
    )
    for name in KERNELS:
        try:
            attend = choose_attention(name, device, torch.bfloat16, dims).attend
        except UserError as error:
            told[name] = {"problem": str(error)}
            continue
        told[name] = {}
        for kind, window in (("S", min(dims.windows)), ("L", SEQUENCE)):
            seconds = []
            for _ in range(WARM_UP + TIMED):
                synchronize(device)
                begin = time.perf_counter()
                torch.autograd.grad(attend(*inputs, window), inputs, g)
                synchronize(device)
                seconds.append(time.perf_counter() - begin)
            told[name][kind] = statistics.median(seconds[WARM_UP:])
    return {"layers": told, "rows": plan.micro_rows}


def measure_all(asked: list[dict], minutes: float, after=lambda found: None) -> list[dict]:
    """Each case in a process of its own until the time is over; what fails or is left over says so. after: called with what there is after each."""
    end, found = time.monotonic() + 60 * minutes, []
    for case in asked:
        left = end - time.monotonic()
        numbers = _measured_apart(case, left) if left > 0 else {"left_out": "no time was left"}
        rate = f"{numbers['tokens_per_sec']:,.0f} tokens a second" if "mfu" in numbers else "done"
        told = numbers.get("failed") or numbers.get("left_out") or rate
        print(f"{label(case)}: {told}", file=sys.stderr, flush=True)
        found.append({"case": case} | numbers)
        after(found)
    return found


def _measured_apart(case: dict, left_s: float) -> dict:
    try:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), json.dumps(case)],
            capture_output=True,
            text=True,
            timeout=left_s,
        )
    except subprocess.TimeoutExpired:
        return {"left_out": "no time was left"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        return {
            "failed": next((line for line in reversed(said) if "Error" in line), said[-1])[:300],
            "said": said[-30:],
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


def bench_gpu(arguments: argparse.Namespace) -> dict:
    """The kind "gpu" of tools/bench.py. Raises UserError on a machine without a CUDA device."""
    import torch

    from megachat.job.launch import describe_environment

    if not torch.cuda.is_available():
        raise UserError(
            "this machine has no CUDA device, which the GPU benchmark is about: run it on one, or another kind of tools/bench.py"
        )
    if arguments.nanochat:
        require_clone(arguments.nanochat)
    checks = [json.loads(line) for line in Path(arguments.checks).read_text().splitlines()] if arguments.checks else []
    log = Path(arguments.checks_log).read_text() if arguments.checks_log else ""
    environment = describe_environment(torch.device("cuda"))
    facts = gpu_facts()
    where = environment | facts | {"packages": environment["packages"] | facts["packages"]}
    result = {"what": "training steps of one GPU", "checks": checks}

    def write(found: list[dict]) -> None:  # each time, so that a run that is broken off leaves what it has measured
        if arguments.out:
            write_report(
                Path(arguments.out), report(found, where, ABOUT, log), result | {"found": found, "where": where}
            )

    return result | {"found": measure_all(cases(arguments.nanochat), arguments.minutes, write)}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
