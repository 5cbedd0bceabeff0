"""Measures the performance matrix of one GPU: linears x attention kernels at d24 and d12, and attention layers alone.

`python tools/bench.py gpu --out docs/benchmarks.md` measures the most important cases first, until --minutes are over.
Each case runs in a separate process, which starts this file. tools/bench/gpu_report.py writes the report. --nanochat
names a clone of nanochat, whose model and optimizer are then measured, too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megachat.activity import log_line  # noqa: E402
from megachat.config import Config, load_config  # noqa: E402
from megachat.device import peak_flops, seconds_of, synchronize  # noqa: E402
from megachat.errors import UserError  # noqa: E402
from megachat.job.launch import bootstrap_environment, choose_device  # noqa: E402
from megachat.settings import BatchConfig  # noqa: E402
from tools.bench.gpu_report import build_report, gpu_facts, label, write_report  # noqa: E402
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
RECIPES = {"speedrun_run6": 24, "speedrun_public": 22, "speedrun": 22}  # configs of the speedrun -> depth
BATCH = {24: (16, 2), 12: (32, 1)}  # depth -> rows per micro-batch, micro-batches: 65,536 tokens per step
ABOUT = (
    f"bfloat16, rows of {SEQUENCE} tokens, vocabulary {VOCAB}, windows SSSL, {WARM_UP} steps of warm-up, medians of "
    f"{TIMED} steps, each case in a separate process. The optimizer's share is computed for a step of "
    f"{REFERENCE_TOKENS} tokens, from its time and that of a micro-batch."
)


def cases(nanochat: str | None) -> list[dict]:
    """Returns the cases in the order in which they are measured."""

    def case(linears: str, attention: str = "auto", depth: int = 24, **more) -> dict:
        return {"linears": linears, "attention": attention, "depth": depth, **more}

    matrix = [case("torch compiled"), case("te tensorwise")]
    matrix += [case("nanochat", path=nanochat), case("nanochat fp8", path=nanochat)] if nanochat else []
    matrix += [
        case("attention"),
        case("torch tensorwise"),
        case("torch compiled", depth=12),
        case("te tensorwise", depth=12),
    ]
    matrix += [case("recipe", depth=depth, recipe=name) for name, depth in RECIPES.items()]
    if nanochat:  # run 6 is the case above
        matrix += [case("nanochat fp8", depth=22, recipe="speedrun_public", micro_rows=16, path=nanochat)]
    if "recompute" in BatchConfig.model_fields:
        matrix += [case("torch compiled", recompute=kind) for kind in ("selective", "block")]
    matrix += [case("te bf16"), case("torch eager"), case("te blockwise"), case("torch tensorwise", depth=12)]
    matrix += [case("nanochat", depth=12, path=nanochat)] if nanochat else []
    matrix += [case("torch compiled", name) for name in KERNELS]
    matrix += [case("torch compiled", "sdpa", pattern="L")]
    # few tokens: does the host keep up?
    matrix += [case(linears, depth=12, micro_rows=8) for linears in ("te tensorwise", "torch compiled")]
    return matrix + [
        case(linears, name)
        for linears in LINEARS
        for name in ("te", "flash3", "flex", "sdpa")
        if linears != "torch compiled"
    ]


def case_config(case: dict) -> Config:
    """Returns the config of a case, for one rank: a recipe's with two micro-batches, or one of the matrix."""
    if "recipe" in case:
        changes = ["batch.accumulation=2", "horizon.steps=100"]
        changes += [f"batch.micro_rows={case['micro_rows']}"] if "micro_rows" in case else []
        return load_config(ROOT / "configs" / f"{case['recipe']}.json", changes)
    rows, accumulation = BATCH[case["depth"]]
    batch = {"micro_rows": case.get("micro_rows", rows), "accumulation": accumulation}
    batch |= {"recompute": case["recompute"]} if "recompute" in case else {}
    precision = {"compute": "bfloat16", "attention": case["attention"]} | LINEARS[case["linears"]]
    model = {"depth": case["depth"], "sequence_len": SEQUENCE, "window_pattern": case.get("pattern", "SSSL")}
    return Config.model_validate({"model": model, "batch": batch, "horizon": {"steps": 100}, "precision": precision})


def case_vocabulary(case: dict) -> int:
    """Returns the tokens of a case's vocabulary."""
    return case_config(case).model.vocab_size or VOCAB


def build_megachat_step(case: dict, device):
    """Builds the training of a case.

    Returns a function that takes a step and returns its loss, the plan, a list that gets the optimizer's seconds of
    each step with separate timing, the attention kernel, and lines with the chosen kernels.
    """
    import torch
    from deepspeed.runtime.pipe import schedule

    from megachat.job.join import start_mesh
    from megachat.kernels.choice import describe_kernels
    from megachat.kernels.linear import Linear
    from megachat.kernels.te import TELinears
    from megachat.planning.plan import resolve_plan
    from megachat.programs.verify_layout import related_rows
    from megachat.train.build import build_training_model
    from megachat.train.step import set_schedules, update

    config, vocabulary = case_config(case), case_vocabulary(case)
    plan = resolve_plan(config, 1, vocabulary)
    training = build_training_model(config, plan, start_mesh(config, device), torch.ones(vocabulary, dtype=torch.int64))
    if case["linears"] == "te bf16":
        for linear in (
            module
            for module in training.layers.modules()
            if isinstance(module, Linear) and min(module.weight.shape) >= 128
        ):
            linear.product = TELinears(None).build(linear.weight)
    set_schedules(training, 10)
    rows, optimizer_s = related_rows(0, plan.rows_per_step, SEQUENCE + 1, vocabulary), []
    engine = training.engine

    def timed(function):
        def execute(self, **arguments):
            synchronize(device)
            begin = time.perf_counter()
            function(self, **arguments)
            synchronize(device)
            optimizer_s[-1] += time.perf_counter() - begin

        return execute

    def step(separate: bool = False) -> float:
        if separate:  # waits for the device around the optimizer, which costs time: these steps are not counted
            optimizer_s.append(0.0)
            kinds = (schedule.ReduceGrads, schedule.OptimizerStep)
            engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {
                kind: timed(engine._INSTRUCTION_MAP[kind]) for kind in kinds
            }
        loss = update(training, rows)[0].item()
        engine.__dict__.pop("_INSTRUCTION_MAP", None)
        return loss

    return step, plan, optimizer_s, training.kernels.attention.name, describe_kernels(config, training.kernels, plan)


def build_nanochat_step(case: dict, device):
    """Does the same for nanochat's own model and optimizer, compiled and set up as in its training script."""
    from megachat.planning.plan import resolve_plan
    from megachat.programs.verify_layout import related_rows

    sizes = case | {"linears": "torch compiled"}  # a recipe's config has them without
    vocabulary = case_vocabulary(sizes)
    plan = resolve_plan(case_config(sizes), 1, vocabulary)
    _, kernels = open_nanochat(case["path"])
    model, run, optimizer = build_nanochat(case["path"], plan, "SSSL", device, fp8=case["linears"] == "nanochat fp8")
    rows, optimizer_s = related_rows(0, plan.rows_per_step, SEQUENCE + 1, vocabulary), []

    def step(separate: bool = False) -> float:
        loss = accumulate(run, rows, plan.micro_rows, device)
        if separate:
            synchronize(device)
        begin = time.perf_counter()
        optimizer.step()
        if separate:
            synchronize(device)
            optimizer_s.append(time.perf_counter() - begin)
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step, plan, optimizer_s, "flash3" if kernels.USE_FA3 else "sdpa", [f"nanochat in {case['path']}"]


def measure(case: dict) -> dict:
    """Measures one case in this process."""
    import torch

    device = choose_device(bootstrap_environment())
    if case["linears"] == "attention":
        return measure_attention(case, device)
    step, plan, optimizer_s, attention, chosen = (build_nanochat_step if "path" in case else build_megachat_step)(
        case, device
    )
    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def timed(count: int, separate: bool) -> tuple[list[float], list[float]]:
        """Returns the seconds and losses of steps."""
        losses: list[float] = []
        seconds = [seconds_of(lambda: losses.append(step(separate)), device) for _ in range(count)]
        return seconds, losses

    seconds, losses = timed(TIMED, separate=False)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    whole, _ = timed(3, separate=True)
    step_s, optimizer, peak = statistics.median(seconds), statistics.median(optimizer_s), peak_flops(device)
    # from the same steps as the optimizer's time
    passes = statistics.median(step - part for step, part in zip(whole, optimizer_s, strict=True))
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
    """Measures attention alone, forward and backward of one layer, with each available kernel, windowed and not."""
    import torch

    from megachat.kernels.choice import choose_attention
    from megachat.planning.plan import resolve_plan

    plan = resolve_plan(case_config(case | {"linears": "torch compiled", "attention": "auto"}), 1, VOCAB)
    dims, layers = plan.dims, {}
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
            layers[name] = {"problem": str(error)}
            continue
        layers[name] = {}
        for kind, window in (("S", min(dims.windows)), ("L", SEQUENCE)):
            seconds = []
            for _ in range(WARM_UP + TIMED):
                synchronize(device)
                begin = time.perf_counter()
                torch.autograd.grad(attend(*inputs, window), inputs, g)
                synchronize(device)
                seconds.append(time.perf_counter() - begin)
            layers[name][kind] = statistics.median(seconds[WARM_UP:])
    return {"layers": layers, "rows": plan.micro_rows}


def measure_all(requested: list[dict], minutes: float, after=lambda results: None) -> list[dict]:
    """Measures each case in a separate process until the time is over. A case that fails or is left out has the reason.

    after: called with the results so far after each case.
    """
    end, results = time.monotonic() + 60 * minutes, []
    for case in requested:
        left = end - time.monotonic()
        numbers = _measure_in_process(case, left) if left > 0 else {"left_out": "no time was left"}
        rate = f"{numbers['tokens_per_sec']:,.0f} tokens per second" if "mfu" in numbers else "done"
        outcome = numbers.get("failed") or numbers.get("left_out") or rate
        log_line(f"{label(case)}: {outcome}")
        results.append({"case": case} | numbers)
        after(results)
    return results


def _measure_in_process(case: dict, left_s: float) -> dict:
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
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        return {
            "failed": next((line for line in reversed(lines) if "Error" in line), lines[-1])[:300],
            "said": lines[-30:],
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


def bench_gpu(arguments: argparse.Namespace) -> dict:
    """Measures the matrix and writes the report. Raises UserError on a machine without a CUDA device."""
    import torch

    from megachat.job.launch import describe_environment

    if not torch.cuda.is_available():
        raise UserError(
            "this machine has no CUDA device, which `tools/bench.py gpu` requires: run it on one, or another kind"
        )
    if arguments.nanochat:
        require_clone(arguments.nanochat)
    checks = [json.loads(line) for line in Path(arguments.checks).read_text().splitlines()] if arguments.checks else []
    log = Path(arguments.checks_log).read_text() if arguments.checks_log else ""
    environment = describe_environment(torch.device("cuda"))
    facts = gpu_facts()
    where = environment | facts | {"packages": environment["packages"] | facts["packages"]}
    result = {"what": "training steps of one GPU", "checks": checks}

    def write(results: list[dict]) -> None:  # after each case, so that an interrupted run leaves its results
        if arguments.out:
            text = build_report(results, where, ABOUT, log)
            write_report(Path(arguments.out), text, result | {"found": results, "where": where})

    return result | {"found": measure_all(cases(arguments.nanochat), arguments.minutes or 12, write)}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
