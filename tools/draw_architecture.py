"""Draws the pictures of docs/architecture.md from real configs and their plans: `python tools/draw_architecture.py`.

It writes SVG files to docs/pictures. A test draws them again and compares them with the committed files.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a clone that was not installed

WIDTH = 1040
COLORS = ("#3b75af", "#519e3e", "#c2691f", "#8d5fb3")  # one per grid rank; legible with white text
STYLE = """<style>
  text { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; fill: #1f2328 }
  .page { fill: #ffffff; stroke: #d0d7de }
  .card { fill: #f6f8fa; stroke: #afb8c1 }
  .soft { fill: #57606a; font-size: 12px }
  .head { font-size: 15px; font-weight: 600 }
  .title { font-size: 18px; font-weight: 600 }
  .on { fill: #ffffff; font-size: 12px }
  .code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 12px }
  .line { stroke: #57606a; fill: none; stroke-width: 1.5 }
  .tip { fill: #57606a }
  .pad { fill: #d0d7de }
  .away { stroke: #1f2328; stroke-width: 2; stroke-dasharray: 4 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .page { fill: #0d1117; stroke: #30363d }
    .card { fill: #161b22; stroke: #484f58 }
    .soft { fill: #9198a1 }
    .on { fill: #ffffff }
    .line { stroke: #9198a1 }
    .tip { fill: #9198a1 }
    .pad { fill: #30363d }
    .away { stroke: #e6edf3 }
  }
</style>"""


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, style: str = "card", fill: str = "", radius: int = 6) -> str:
    color = f' fill="{fill}"' if fill else ""
    size = f'width="{width:g}" height="{height:g}" rx="{radius}"'
    return f'<rect x="{x:g}" y="{y:g}" {size} class="{style}"{color}/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight arrow, horizontal or downward."""
    tip = f"M{x2:g} {y2:g}l-9 -5v10z" if y1 == y2 else f"M{x2:g} {y2:g}l-5 -9h10z"
    end = f"{x2 - 6:g} {y2:g}" if y1 == y2 else f"{x2:g} {y2 - 6:g}"
    return f'<path class="line" d="M{x1:g} {y1:g}L{end}"/><path class="tip" d="{tip}"/>'


def card(x: float, y: float, width: float, head: str, lines: Iterable[str], height: float = 0) -> tuple[str, float]:
    """A card with a heading and lines of text; a line in backquotes is code. Returns it and its height."""
    lines = list(lines)
    height = height or 46 + 20 * len(lines)
    parts = [box(x, y, width, height), text(x + 14, y + 26, head, "head")]
    for number, line in enumerate(lines):
        style = "code" if line.startswith("`") else "soft" if line.startswith("~") else ""
        if line:
            parts.append(text(x + 14, y + 50 + 20 * number, line.strip("`~"), style))
    return "\n".join(parts), height


def page(height: float, title: str, subtitle: str, parts: Iterable[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">'
    lines = [f"{head}<title>{escape(title)}</title>", STYLE, box(0.5, 0.5, WIDTH - 1, height - 1, "page", radius=10)]
    return "\n".join([*lines, text(28, 38, title, "title"), text(28, 60, subtitle, "soft"), *parts, "</svg>", ""])


def load(name: str, overrides: list[str], ranks: int):
    """Returns the config, the plan and the plan of the Muon partition of pipeline stage 0."""
    import torch

    from megachat.config import load_config
    from megachat.model.gpt import ModelOptions, build_layers
    from megachat.model.parameters import placed_parameters
    from megachat.optim.groups import assign_groups, muon_matrices
    from megachat.optim.partition_plan import make_plan
    from megachat.place import place_of
    from megachat.planning.plan import resolve_plan

    config = load_config(ROOT / "configs" / f"{name}.json", overrides)
    plan = resolve_plan(config, ranks, config.model.vocab_size or 4096)
    with torch.device("meta"):
        places = [place_of(parameter) for parameter in placed_parameters(build_layers(plan.dims, ModelOptions()))]
    matrices = muon_matrices(places, assign_groups(places), config.optimizer.muon_multiplier)
    return config, plan, make_plan(matrices, plan.layout.data, tensor=plan.layout.tensor)


def draw_step() -> str:
    """Config -> plan -> mesh -> step, for d4_cpu on 2 data x 2 tensor ranks."""
    config, plan, _ = load("d4_cpu", ["parallel.tensor=2"], 4)
    top, height, parts = 84, 268, []
    data, tensor = plan.layout.data, plan.layout.tensor
    settings = [
        f"`model.depth={config.model.depth}`",
        f"`model.sequence_len={config.model.sequence_len}`",
        f"`batch.tokens={config.batch.tokens}`",
        f"`batch.micro_rows={config.batch.micro_rows}`",
        f"`horizon.steps={config.horizon.steps}`",
        f"`parallel.tensor={config.parallel.tensor}`",
    ]
    derived = [
        f"width {plan.dims.width}, {plan.dims.heads} heads of {plan.dims.head_size}",
        f"{plan.parameters['total']:,} parameters",
        f"{plan.rows_per_step} rows per step = {plan.micro_rows} rows",
        f"x {plan.accumulation} micro-batches x {data} data ranks",
        f"{plan.steps} steps, {plan.total_tokens:,} tokens",
        f"data {data} x tensor {tensor} x pipeline {plan.layout.pipeline}",
    ]
    step = [
        f"{plan.accumulation} x forward and backward",
        "reduce gradients over the data axis",
        "one all-reduce: norm and requests",
        "finite? one clipping factor",
        "update with Muon and AdamW",
        "gather weights, block by block",
    ]
    cards = (
        (28, 190, "Config", settings, ["what was requested;", "never changed"], "config.py"),
        (246, 244, "Plan", derived, ["every derived number with", "its formula; a pure function"], "planning/plan.py"),
        (518, 204, "Mesh", [], ["process groups, built once", "and passed as one value"], "parallel/mesh.py"),
        (750, 262, "Step", step, ["optim/joint.py, called by", "parallel/engine.py"], "train/step.py"),
    )
    for x, width, head, lines, notes, file in cards:
        parts.append(card(x, top, width, head, lines, height)[0])
        parts += [text(x + 14, top + 212 + 20 * number, note, "soft") for number, note in enumerate(notes)]
        parts.append(text(x + 2, top + height + 22, file, "code"))
        if x > 28:
            parts.append(arrow(x - 25, top + height / 2, x - 4, top + height / 2))
    x = 518 + 14
    for rank in range(data * tensor):
        row, column = divmod(rank, tensor)
        left, y = x + column * 91, top + 40 + row * 74
        parts.append(box(left, y, 85, 68, "", COLORS[rank]))
        for number, words in enumerate((f"rank {rank}", f"data {row}", f"tensor {column}")):
            parts.append(text(left + 42.5, y + 20 + 18 * number, words, "on", "middle"))
    subtitle = (
        f"configs/d4_cpu.json with parallel.tensor={tensor} on {data * tensor} ranks; all numbers are from its plan"
    )
    return page(top + height + 40, "From a config to a training step", subtitle, parts)


def short_name(name: str) -> str:
    """transformer.h.2.attn.c_q.weight -> 2.q; the output projections of attention and MLP are o and proj."""
    _, _, block, kind, matrix, _ = name.split(".")
    return f"{block}.{'o' if (kind, matrix) == ('attn', 'c_proj') else matrix.removeprefix('c_').removeprefix('ve_')}"


def draw_partition(name: str, overrides: list[str], ranks: int, notes: list[str]) -> str:
    """One lane per rank and one column per bucket: each fragment has the color of its matrix's owner rank."""
    _, _, partition = load(name, overrides, ranks)
    left, lane, gap, top = 190.0 if overrides else 140.0, 46, 14, 122
    tensor, buckets = partition.tensor, partition.buckets
    narrow = 76.0  # of a bucket too small to draw to scale
    large = [bucket for bucket in buckets if bucket.kind != "tiny"]
    room = WIDTH - 28 - left - gap * (len(buckets) - 1) - narrow * (len(buckets) - len(large))
    scale = room / sum(bucket.shard_size for bucket in large)
    parts = []
    for rank in range(partition.grid_size):
        y = top + rank * (lane + 12)
        parts.append(box(28, y + 10, 26, 26, "", COLORS[rank], 13))
        parts.append(text(41, y + 28, str(rank), "on", "middle"))
        parts.append(text(62, y + 28, f"data {rank // tensor}" + (f", tensor {rank % tensor}" if tensor > 1 else "")))
    x = left
    for number, bucket in enumerate(buckets):
        width = narrow if bucket.kind == "tiny" else bucket.shard_size * scale
        caption = f"bucket {number}: {bucket.kind}" if width > 120 else bucket.kind
        parts.append(text(x, top - 24, caption, "head"))
        parts.append(text(x, top - 8, f"{bucket.shard_size:,} elements" + " per rank" * (width > 150), "soft"))
        for rank in range(partition.grid_size):
            parts.append(box(x, top + rank * (lane + 12), width, lane, "pad", radius=4))
        for index in bucket.matrices:
            owner, label = partition.owners[index], short_name(partition.matrices[index].name)
            for rank, fragment in partition.stored(index):
                y = top + rank * (lane + 12)
                begin, size = (value / bucket.shard_size * width for value in (fragment.offset, fragment.size))
                style = "away" if rank != owner else ""
                parts.append(box(x + begin + 1, y + 1, max(size - 2, 2), lane - 2, style, COLORS[owner], 3))
                if size >= 7 * len(label):
                    parts.append(text(x + begin + size / 2, y + lane / 2 + 4, label, "on", "middle"))
        x += width + gap
    bottom = top + partition.grid_size * (lane + 12) + 14
    parts.append(box(28, bottom - 10, 22, 14, "", COLORS[0], 3))
    parts.append(text(58, bottom + 2, "color: the owner rank, which orthogonalizes the matrix", "soft"))
    parts.append(box(398, bottom - 10, 22, 14, "away", COLORS[1], 3))
    parts.append(text(428, bottom + 2, "dashed: stored on another rank, so it travels to its owner and back", "soft"))
    parts.append(box(842, bottom - 10, 22, 14, "pad", radius=3))
    parts.append(text(872, bottom + 2, "padding", "soft"))
    parts += [text(28, bottom + 30 + 20 * number, line) for number, line in enumerate(notes)]
    count, total = len(partition.matrices), f"{partition.elements:,}"
    settings = f" with {' '.join(overrides)}" if overrides else ""
    subtitle = f"configs/{name}.json{settings} on {ranks} ranks: {count} matrices, {total} elements, "
    subtitle += f"{partition.padding} of padding, {len(buckets)} buckets"
    grid = f"{partition.data} data x {tensor} tensor ranks" if tensor > 1 else f"{partition.data} data ranks"
    return page(bottom + 30 + 20 * len(notes), f"The Muon partition on {grid}", subtitle, parts)


# The cards of draw_gradient: rows of (Muon's, AdamW's, the sparse tables'), each a heading and its lines.
_BEFORE = (
    (
        ("Backward", "hooks add each gradient to its bucket", "`MuonPartition._gradient_hook`"),
        ("Backward", "gradients add up over the micro-batches", "`DeepSpeedZeroOptimizer`"),
        ("Backward", "the sum of each row travels to its owner", "`RowTables._collect`"),
    ),
    (
        ("Reduce, while backward runs", "complete buckets: data axis -> shards", "`start_async_reduce, start_reduce`"),
        ("Reduce, after backward", "mean over the data axis -> ZeRO shares", "`ZeroAdamW.reduce`"),
        ("Reduce, on the owner", "sums by micro-batch and rank -> their mean", "`RowTables.wait_for_reduce`"),
    ),
)
_JOINT = (
    "one all-reduce over all ranks carries the squared norm of the whole gradient and the requests to stop",
    "not finite: discard all gradients and lower the loss scale; finite: one clipping factor and loss scale for all",
    "`optim/joint.py: optimizer_step`",
)
_AFTER = (
    (
        (
            "Update",
            "momentum on shards -> the matrix's owner",
            "the owner orthogonalizes the whole matrix",
            "directions travel back to the shards",
            "`MuonPartition.step, Exchange`",
        ),
        ("Update", "this rank's share of masters and moments", "", "", "`ZeroAdamW.apply`"),
        ("Update", "the owner's rows that were read", "in this step; no others change", "", "`RowTables.step`"),
    ),
    (
        ("Gather, lazily", "each block waits in the next forward", "`MuonPartition.wait_for_block`"),
        ("Gather", "all new weights, before apply() returns", "`DeepSpeedZeroOptimizer.step`"),
        ("Fetch, when read", "the next forward fetches the rows it reads", "`RowTables.read`"),
    ),
)


def draw_gradient() -> str:
    """The way of a gradient through a step, for the parameters of Muon and AdamW and for sparse tables."""
    overrides = ["parallel.tensor=2", "ngram.blocks=[1,3]"]
    _, plan, partition = load("d4_cpu", overrides, 4)
    width, lanes, y = 316, (28, 362, 696), 128.0
    tables = plan.parameters["ngram"]
    others = plan.parameters["total"] - partition.elements - tables
    counts = (
        ("Muon", f"{len(partition.matrices)} matrices, {partition.elements:,} elements"),
        ("AdamW", f"dense tables, head, scalars; {others:,} elements"),
        ("Sparse tables", f"n-gram values; {tables:,} elements"),
    )
    parts = []
    for x, (head, count) in zip(lanes, counts, strict=True):
        parts += [text(x, 94, head, "head"), text(x, 114, count)]

    def draw_rows(rows, y: float, arrow_above: bool) -> float:
        for row in rows:
            for x, (head, *lines) in zip(lanes, row, strict=True):
                if arrow_above:
                    parts.append(arrow(x + width / 2, y - 26, x + width / 2, y - 2))
                content, height = card(x, y, width, head, lines)
                parts.append(content)
            y, arrow_above = y + height + 28, True
        return y

    y = draw_rows(_BEFORE, y, arrow_above=False)
    parts += [arrow(x + width / 2, y - 26, x + width / 2, y - 2) for x in lanes]
    content, height = card(lanes[0], y, lanes[-1] + width - lanes[0], "The joint decision", _JOINT)
    parts.append(content)
    y = draw_rows(_AFTER, y + height + 28, arrow_above=True)
    subtitle = f"counts from the plan of configs/d4_cpu.json with {' '.join(overrides)} on 4 ranks"
    return page(y, "Where a gradient goes", subtitle, parts)


def draw_all() -> dict[str, str]:
    """Returns file name -> SVG."""
    buckets = [
        "A row is a rank: its shards hold float32 master weights, momentum and reduced gradients.",
        "Buckets are reduced in this order while backward runs, and gathered in the reverse order.",
        "aligned: every rank has the same shapes, no matrix is cut. flat: the other matrices, cut into equal shards.",
        "A label is block.matrix: q, k, v and o are attention's, fc and proj the MLP's, gate the value embeddings'.",
    ]
    grid = [
        "A matrix is cut over the tensor axis: each of 2 tensor ranks stores half of it, and one of them is the owner.",
        "The owner joins the halves and orthogonalizes the whole matrix: the result does not depend on the layout.",
    ]
    return {
        "step.svg": draw_step(),
        "muon_buckets.svg": draw_partition("demo", [], 4, buckets),
        "muon_grid.svg": draw_partition("d4_cpu", ["parallel.tensor=2"], 4, grid),
        "gradient.svg": draw_gradient(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="default docs/pictures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, picture in draw_all().items():
        (arguments.out / name).write_text(picture, encoding="utf-8")
        print(arguments.out / name)


if __name__ == "__main__":
    main()
