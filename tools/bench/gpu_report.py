"""Writes the report of tools/bench/gpu.py: tables between two comments of a Markdown file, and all numbers as JSON."""

import platform
import re
import subprocess
from pathlib import Path

from megachat.errors import UserError
from megachat.files import write_atomically, write_json
from megachat.job.host_probe import installed_version
from megachat.text import markdown_table

BEGIN, END = "<!-- measured by tools/bench.py gpu: begin -->", "<!-- measured by tools/bench.py gpu: end -->"
PACKAGES = (
    "torch",
    "triton",
    "transformer-engine",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "deepspeed",
    "kernels",
)
OPTIONS = ("recipe", "pattern", "micro_rows", "recompute")  # settings in which a case differs from the others
_COUNTED = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def label(case: dict) -> str:
    """Returns a case's name in one line."""
    if case["linears"] == "attention":
        return f"attention of one layer of d{case['depth']}"
    return f"d{case['depth']}, {case['linears']}, attention {case['attention']}{options(case)}"


def options(case: dict) -> str:
    """Returns the settings in which a case differs, as ", micro_rows 8"."""
    return "".join(f", {name} {case[name]}" for name in OPTIONS if name in case)


def gpu_facts() -> dict:
    """Returns name, driver and memory of the GPUs from nvidia-smi, and versions. Unknown values are None."""
    import torch

    line = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=True)
        gpus = done.stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        gpus = None
    packages = {package: installed_version(package) for package in PACKAGES}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "packages": packages,
        "python": platform.python_version(),
    }


def judge_goals(results: list[dict]) -> list[tuple[str, str, str]]:
    """Returns (goal, measured value, "yes", "no" or "unknown") for each goal."""

    def best(depth: int, *linears: str, key: str = "tokens_per_sec") -> float | None:
        values = [
            entry[key]
            for entry in results
            if _plain(entry, depth) and entry["case"]["linears"] in linears and entry.get(key)
        ]
        return max(values, default=None)

    def row(what: str, value: float | None, reached: bool | None, shown: str) -> tuple[str, str, str]:
        return (
            what,
            "not measured" if value is None else shown.format(value),
            "unknown" if value is None or reached is None else "yes" if reached else "no",
        )

    def ratio(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    ours, theirs = best(24, "torch compiled"), best(24, "nanochat")
    fp8, of_depth_12 = best(24, "te tensorwise", "torch tensorwise"), best(12, "te tensorwise", "torch tensorwise")
    memory = ratio(best(24, "torch compiled", key="peak_memory_bytes"), best(24, "nanochat", key="peak_memory_bytes"))
    share, mfu = (best(24, "torch compiled", key=key) for key in ("optimizer_share_at_reference_batch", "mfu"))
    kernel = next(
        (entry["attention"] for entry in results if entry["case"]["linears"] == "nanochat" and "attention" in entry), ""
    )
    beside = f"{{:.2f}} times; its attention was {kernel}"
    to_theirs, to_bf16, small = ratio(ours, theirs), ratio(fp8, ours), ratio(of_depth_12, best(12, "torch compiled"))
    return [
        row("d24 in bfloat16: MFU at least 55 %", mfu, mfu and mfu >= 0.55, "{:.1%}"),
        row(
            "d24 in bfloat16: at least 1.10 times nanochat's tokens per second",
            to_theirs,
            to_theirs and to_theirs >= 1.10,
            beside,
        ),
        row("d24 in FP8: at least 1.15 times our bfloat16", to_bf16, to_bf16 and to_bf16 >= 1.15, "{:.2f} times"),
        row("d12 in FP8 beside our bfloat16", small, None, "{:.2f} times"),
        row("d24, 16 rows: peak memory at most 0.8 of nanochat's", memory, memory and memory <= 0.8, "{:.2f}"),
        row("d24: the optimizer at most 3 % of a step of 2^19 tokens", share, share and share <= 0.03, "{:.1%}"),
    ]


def _plain(entry: dict, depth: int) -> bool:
    """Returns True for a case of this depth without options and with the default kernel."""
    case = entry["case"]
    return case["depth"] == depth and case["attention"] == "auto" and not options(case)


def build_report(results: list[dict], where: dict, about: str, checks_log: str) -> str:
    """Returns Markdown. where: the environment and gpu_facts(). about: the method. checks_log: pytest's output."""
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items() if version)
    commit = f"commit {where['commit'][:7]}" if where["commit"] else "commit unknown"
    gpus = "; ".join(where["gpus"]) if where["gpus"] else where["device"]
    commit += " with changes" if where["uncommitted_changes"] else ""
    parts = [
        f"{commit.capitalize()}, {gpus}; CUDA {where['cuda']}, cuDNN {where['cudnn']}, {versions}. {about}",
        _table(["goal", "measured", "reached"], judge_goals(results)),
        _steps(results),
        *(_attention(entry) for entry in results if entry["case"]["linears"] == "attention"),
        f"Checks of tests/gpu: {checks_summary(checks_log)}. Their measurements are in the JSON file.",
    ]
    return "\n\n".join(parts)


def checks_summary(log: str) -> str:
    """Returns the counts in the last such line of pytest's output, or that there is none."""
    lines = [line for line in log.splitlines() if _COUNTED.search(line) and " in " in line]
    return ", ".join(f"{count} {what}" for count, what in _COUNTED.findall(lines[-1])) if lines else "not finished"


def _table(head: list[str], rows) -> str:
    cells = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(markdown_table([head, *cells]))


def _steps(results: list[dict]) -> str:
    base: dict[int, float] = {}  # depth -> the first plain rate of torch compiled
    for entry in results:
        depth = entry["case"]["depth"]
        if entry["case"]["linears"] == "torch compiled" and _plain(entry, depth) and "tokens_per_sec" in entry:
            base.setdefault(depth, entry["tokens_per_sec"])
    rows = []
    for entry in results:
        case = entry["case"]
        if case["linears"] == "attention":
            continue
        start = [f"d{case['depth']}{options(case)}", case["linears"], entry.get("attention") or case["attention"]]
        if "tokens_per_sec" not in entry:
            rows.append([*start, entry.get("failed") or entry["left_out"], "", "", "", ""])
            continue
        ratio = f"{entry['tokens_per_sec'] / base[case['depth']]:.2f}" if case["depth"] in base else "unknown"
        mfu = f"{entry['mfu']:.1%}" if entry["mfu"] else "unknown"
        memory = f"{entry['peak_memory_bytes'] / 2**30:.1f} GiB" if entry["peak_memory_bytes"] else "unknown"
        rows.append(
            [
                *start,
                f"{entry['tokens_per_sec']:,.0f}",
                ratio,
                mfu,
                memory,
                f"{entry['optimizer_share_at_reference_batch']:.1%}",
            ]
        )
    return _table(
        ["model", "linears", "attention", "tokens per second", "of torch compiled", "MFU", "peak memory", "optimizer"],
        rows,
    )


def _attention(entry: dict) -> str:
    if "layers" not in entry:
        return f"Attention of one layer: {entry.get('failed') or entry['left_out']}."
    rows = []
    for name, times in entry["layers"].items():
        cells = [f"{times[kind] * 1000:.2f} ms" for kind in ("S", "L")] if "S" in times else [times["problem"], ""]
        rows.append([name, *cells])
    model = f"one layer of d{entry['case']['depth']}, {entry['rows']} rows"
    about = f"Attention alone, forward and backward of {model}; S: the short window."
    return f"{about}\n\n" + _table(["kernel", "S", "L"], rows)


def write_report(path: Path, text: str, raw: dict) -> None:
    """Writes the text between the markers of a Markdown file, and the numbers beside it. Raises UserError."""
    page = path.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise UserError(f"{path} lacks the lines {BEGIN!r} and {END!r}: add them where the tables belong")
    before, _, rest = page.partition(BEGIN)
    write_atomically(path, f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}".encode())
    write_json(path.with_name(path.stem + "_gpu.json"), raw)
