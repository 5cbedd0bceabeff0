"""The performance matrix of one GPU: linears x attention kernels at d24 and d12, each case in a process of its own, one table.

`python tools/bench.py gpu --out docs/benchmarks.md` measures what fits into --minutes, the most telling cases first, and writes the table between
two marker comments and every number beside it as JSON. nanochat's own model takes part when --nanochat names a clone of it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megachat.config import Config  # noqa: E402
from megachat.device import bootstrap_environment, choose_device, peak_flops, synchronize  # noqa: E402
from megachat.errors import UserError  # noqa: E402

VOCAB, SEQUENCE, WARM_UP, TIMED, REFERENCE_TOKENS = 32768, 2048, 5, 10, 2**19
BEGIN, END = "<!-- measured by tools/bench.py gpu: begin -->", "<!-- measured by tools/bench.py gpu: end -->"
LINEARS = {  # name -> settings of precision
    "torch eager": {"compile": False},
    "torch compiled": {"compile": True},
    "te bf16": {"compile": True},
    "te tensorwise": {"compile": True, "fp8": "tensorwise", "fp8_backend": "te"},
    "te blockwise": {"compile": True, "fp8": "blockwise", "fp8_backend": "te"},
    "torch tensorwise": {"compile": True, "fp8": "tensorwise", "fp8_backend": "torch"},
}
BATCH = {24: (16, 2), 12: (32, 1)}  # depth -> rows a micro-batch, micro-batches: 65,536 tokens a step


def cases(nanochat: str | None) -> list[dict]:
    """In the order in which they are measured."""

    def case(linears: str, attention: str = "auto", depth: int = 24, **more) -> dict:
        return {"linears": linears, "attention": attention, "depth": depth, **more}

    found = [case("torch compiled"), case("te tensorwise")]
    found += [case("nanochat", depth=24, path=nanochat), case("nanochat fp8", depth=24, path=nanochat)] if nanochat else []
    found += [case("torch tensorwise"), case("torch compiled", depth=12), case("te tensorwise", depth=12)]
    found += [case("te bf16"), case("torch eager"), case("te blockwise"), case("torch tensorwise", depth=12)]
    found += [case("nanochat", depth=12, path=nanochat)] if nanochat else []
    found += [case("torch compiled", name) for name in ("te", "flash3", "flex", "flash2", "flash4", "sdpa")]
    found += [
        case("torch compiled", "sdpa", pattern="L"),
        case("te tensorwise", depth=12, micro_rows=8),
        case("torch compiled", depth=12, micro_rows=8),
    ]
    return found + [case(linears, name) for linears in LINEARS for name in ("te", "flash3", "flex", "sdpa") if linears != "torch compiled"]


def label(case: dict) -> str:
    """One line that names a case."""
    more = "".join(f", {key} {case[key]}" for key in ("pattern", "micro_rows") if key in case)
    return f"d{case['depth']}, {case['linears']}, attention {case['attention']}{more}"


def case_config(case: dict) -> Config:
    """The run of a case, on one rank."""
    rows, accumulation = BATCH[case["depth"]]
    rows = case.get("micro_rows", rows)
    precision = {"compute": "bfloat16", "attention": case["attention"]} | LINEARS[case["linears"]]
    model = {"depth": case["depth"], "sequence_len": SEQUENCE, "window_pattern": case.get("pattern", "SSSL")}
    return Config.model_validate(
        {"model": model, "batch": {"micro_rows": rows, "accumulation": accumulation}, "horizon": {"steps": 100}, "precision": precision}
    )


def build(case: dict, device):
    """(take a step and return its loss, tokens a step, FLOPs a token, seconds of the optimizer in each step, what was chosen)."""
    import torch
    from deepspeed.runtime.pipe import schedule

    from megachat.device import collective_backend
    from megachat.kernels.linear import Linear
    from megachat.kernels.te import TELinears
    from megachat.parallel.engine import start_collectives
    from megachat.parallel.mesh import build_mesh
    from megachat.plan import resolve
    from megachat.train.build import build_training
    from megachat.train.kernels import describe_kernels
    from megachat.train.step import micro_batches, set_schedules
    from megachat.train.verify import related_rows

    start_collectives(device, collective_backend(device), timedelta(seconds=600))
    config = case_config(case)
    plan = resolve(config, 1, VOCAB)
    training = build_training(config, plan, build_mesh(device), torch.ones(VOCAB, dtype=torch.int64))
    if case["linears"] == "te bf16":
        for linear in (module for module in training.layers.modules() if isinstance(module, Linear) and min(module.weight.shape) >= 128):
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
        if apart:  # waiting for the device around the optimizer costs time, so these steps are not those that are counted
            optimizer_s.append(0.0)
            kinds = (schedule.ReduceGrads, schedule.OptimizerStep)
            engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {kind: timed(engine._INSTRUCTION_MAP[kind]) for kind in kinds}
        loss = engine.train_batch(micro_batches(rows, plan.micro_rows)).item()
        engine.__dict__.pop("_INSTRUCTION_MAP", None)
        return loss

    return step, plan.tokens_per_step, plan.flops_per_token, optimizer_s, describe_kernels(config, training.kernels, plan)


def build_nanochat(case: dict, device):
    """As `build`, of nanochat's own model and optimizer, compiled, as its training script sets them up."""
    import torch

    from megachat.plan import resolve
    from megachat.train.verify import related_rows

    sys.path.insert(0, case["path"])
    from nanochat.gpt import GPT, GPTConfig

    plan = resolve(case_config(case | {"linears": "torch compiled"}), 1, VOCAB)
    dims = plan.dims
    sizes = {"n_layer": dims.depth, "n_head": dims.heads, "n_kv_head": dims.kv_heads, "n_embd": dims.width}
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=SEQUENCE, vocab_size=VOCAB, window_pattern="SSSL", **sizes))
    model.to_empty(device=device)
    model.init_weights()
    if case["linears"] == "nanochat fp8":
        from nanochat.fp8 import Float8LinearConfig, convert_to_float8_training

        def fits(module, name) -> bool:
            sides = (getattr(module, "in_features", 0), getattr(module, "out_features", 0))
            return isinstance(module, torch.nn.Linear) and min(sides) >= 128 and not any(side % 16 for side in sides)

        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("tensorwise"), module_filter_fn=fits)
    optimizer, run, optimizer_s = model.setup_optimizer(), torch.compile(model, dynamic=False), []
    rows = related_rows(0, plan.rows_per_step, SEQUENCE + 1, VOCAB).to(device)

    def step(apart: bool = False) -> float:
        for part in rows.split(plan.micro_rows):
            loss = run(part[:, :-1].contiguous(), part[:, 1:].contiguous())
            (loss / plan.accumulation).backward()
        if apart:
            synchronize(device)
        begin = time.perf_counter()
        optimizer.step()
        if apart:
            synchronize(device)
            optimizer_s.append(time.perf_counter() - begin)
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step, plan.tokens_per_step, plan.flops_per_token, optimizer_s, [f"nanochat in {case['path']}"]


def measure(case: dict) -> dict:
    """Numbers of one case, in this process."""
    import torch

    device = choose_device(bootstrap_environment())
    step, tokens, flops, optimizer_s, chosen = (build_nanochat if "path" in case else build)(case, device)
    for _ in range(WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, losses = [], []
    for _ in range(TIMED):
        synchronize(device)
        begin = time.perf_counter()
        losses.append(step())
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    for _ in range(3):
        step(apart=True)
    step_s, optimizer, peak = statistics.median(seconds), statistics.median(optimizer_s), peak_flops(device)
    at_reference = optimizer / (optimizer + (step_s - optimizer) * REFERENCE_TOKENS / tokens)
    return {
        "tokens_per_sec": tokens / step_s,
        "step_s": seconds,
        "mfu": flops * tokens / step_s / peak if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "optimizer_s": optimizer_s,
        "optimizer_share_at_reference_batch": at_reference,
        "last_loss": losses[-1],
        "chosen": chosen,
    }


def measure_all(asked: list[dict], minutes: float) -> list[dict]:
    """Each case in a process of its own until the time is over; what fails or is left over says so."""
    end, found = time.monotonic() + 60 * minutes, []
    for case in asked:
        left = end - time.monotonic()
        if left <= 0:
            found.append({"case": case, "left_out": "no time was left"})
            continue
        command = [sys.executable, str(Path(__file__).resolve()), json.dumps(case)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(60, left))
        except subprocess.TimeoutExpired:
            found.append({"case": case, "left_out": "no time was left"})
            continue
        lines = done.stdout.strip().splitlines()
        numbers = (
            json.loads(lines[-1]) if not done.returncode and lines else {"failed": ((done.stderr.strip() or "no output").splitlines())[-1][:300]}
        )
        print(
            f"{label(case)}: {numbers.get('failed') or format(numbers['tokens_per_sec'], ',.0f') + ' tokens a second'}", file=sys.stderr, flush=True
        )
        found.append({"case": case} | numbers)
    return found


def table(found: list[dict], where: dict, checks: list[dict]) -> str:
    """Markdown of the results. where: of describe_environment and versions. checks: lines of the GPU tests' report."""
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items() if version and name in ("torch", "transformer-engine"))
    commit = str(where["commit"])[:7] + (" with changes" if where["uncommitted_changes"] else "")
    lines = [
        f"Commit {commit}, {where['device']}, {versions}; bfloat16, rows of {SEQUENCE} tokens, vocabulary {VOCAB}, windows SSSL, {WARM_UP} steps of "
        f"warm-up, medians of {TIMED} steps. The optimizer's share is that of a batch of {REFERENCE_TOKENS} tokens, from its own time and that of a "
        f"micro-batch. {len(checks)} lines of the GPU tests' report are in the JSON file.",
        "",
        "| model | linears | attention | tokens a second | of torch compiled | MFU | peak memory | optimizer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first: dict[int, float] = {}
    for entry in found:
        if "tokens_per_sec" in entry and entry["case"]["linears"] == "torch compiled" and "pattern" not in entry["case"]:
            first.setdefault(entry["case"]["depth"], entry["tokens_per_sec"])
    for entry in found:
        case = entry["case"]
        more = "".join(f", {key} {case[key]}" for key in ("pattern", "micro_rows") if key in case)
        attention = next((line.split()[1] for line in entry.get("chosen", []) if line.startswith("attention ")), case["attention"])
        head = f"| d{case['depth']}{more} | {case['linears']} | {attention} |"
        if "tokens_per_sec" not in entry:
            lines.append(f"{head} {entry.get('failed') or entry['left_out']} | | | | |".replace("\n", " "))
            continue
        ratio = f"{entry['tokens_per_sec'] / first[case['depth']]:.2f}" if case["depth"] in first else ""
        memory = f"{entry['peak_memory_bytes'] / 2**30:.1f} GiB" if entry["peak_memory_bytes"] else "unknown"
        mfu = f"{entry['mfu']:.1%}" if entry["mfu"] else "unknown"
        lines.append(f"{head} {entry['tokens_per_sec']:,.0f} | {ratio} | {mfu} | {memory} | {entry['optimizer_share_at_reference_batch']:.1%} |")
    return "\n".join(lines)


def write_report(path: Path, text: str, raw: dict) -> None:
    """Put the text between the markers of the Markdown file and the raw numbers beside it. Raises UserError without markers."""
    from megachat.data.atomic import write_whole

    page = path.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise UserError(f"{path} lacks the lines {BEGIN!r} and {END!r}: put them where the table is to stand")
    before, _, rest = page.partition(BEGIN)
    write_whole(path, f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}".encode())
    write_whole(path.with_name(path.stem + "_gpu.json"), json.dumps(raw, indent=1).encode() + b"\n")


def bench_gpu(arguments: argparse.Namespace) -> dict:
    """The kind "gpu" of tools/bench.py. Raises UserError on a machine without a CUDA device."""
    import torch

    from megachat.device import describe_environment

    if not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device, which the GPU benchmark is about: run it on one, or another kind of tools/bench.py")
    if arguments.nanochat and not (Path(arguments.nanochat) / "nanochat" / "gpt.py").is_file():
        raise UserError(
            f"--nanochat {arguments.nanochat} is no clone of nanochat, whose nanochat/gpt.py is not there: give its folder or leave it out"
        )
    checks = [json.loads(line) for line in Path(arguments.checks).read_text().splitlines()] if arguments.checks else []
    found, where = measure_all(cases(arguments.nanochat), arguments.minutes), describe_environment(torch.device("cuda"))
    result = {"what": "training steps of one GPU", "checks": checks, "found": found}
    if arguments.out:
        write_report(Path(arguments.out), table(found, where, checks), result | {"where": where})
    return result


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
