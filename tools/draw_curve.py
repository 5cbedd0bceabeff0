"""Draws the curves of a run from its metrics.jsonl as SVG: `python tools/draw_curve.py runs/demo --out demo.svg`.

On the left is the training loss of every step, on the right the validations. docs/pictures/demo.svg was made with it.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a clone that was not installed

from megachat import read_metrics  # noqa: E402
from megachat.errors import user_errors_end_the_program  # noqa: E402
from tools.draw_architecture import COLORS, WIDTH, box, page, text  # noqa: E402

LEFT, TOP, HEIGHT, GAP = 84, 104, 250, 96  # pixels of the panels and around them
PANEL = (WIDTH - LEFT - GAP - 60) / 2
TICKS = 4

Point = tuple[int, float]


def _panel(
    left: float, title: str, points: list[Point], color: str, last: int, low: float, high: float
) -> tuple[list, Callable]:
    """Returns the SVG of a panel with its axes and the line through the points, and the place of a point in it."""

    def place(step: float, value: float) -> tuple[float, float]:
        return left + PANEL * step / last, TOP + HEIGHT * (high - value) / ((high - low) or 1)

    parts = [text(left, TOP - 14, title, "head"), box(left, TOP, PANEL, HEIGHT, radius=0)]
    for tick in range(TICKS + 1):
        value, step = low + (high - low) * tick / TICKS, round(last * tick / TICKS)
        parts.append(text(left - 8, place(0, value)[1] + 4, f"{value:.2f}", "soft", "end"))
        parts.append(text(place(step, low)[0], TOP + HEIGHT + 18, f"{step:,}", "soft", "middle"))
    parts.append(text(left + PANEL / 2, TOP + HEIGHT + 38, "step", "soft", "middle"))
    line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
    return parts, place


def draw_curve(name: str, losses: list[Point], bits: list[Point], unigram: float | None = None) -> str:
    """Returns the SVG. losses: nats per token by step. bits: validation in bits per byte by step, also as numbers.

    unigram: the entropy of the token frequencies alone, drawn as a line.
    """
    last, values = max(step for step, _ in [*losses, *bits]) or 1, [value for _, value in losses]
    parts, _ = _panel(LEFT, "training loss, nats per token", losses, COLORS[0], last, min(values), max(values))
    high = max([value for _, value in bits] + ([unigram] if unigram else []))
    low = min(value for _, value in bits)
    left, margin = LEFT + PANEL + GAP, 0.1 * (high - low)
    right, place = _panel(left, "validation, bits per byte", bits, COLORS[1], last, low - margin, high + margin)
    for step, value in bits:
        x, y = place(step, value)
        right.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLORS[1]}"/>')
        right.append(text(x, y - 14, f"{value:.3f}", "soft", "middle"))
    if unigram:
        _, y = place(0, unigram)
        right.append(f'<path class="line" stroke-dasharray="5 4" d="M{left:g} {y:.1f}h{PANEL:g}"/>')
        right.append(text(left + 8, y + 18, f"token frequencies alone: {unigram:.3f}", "soft"))
    subtitle = f"until step {last:,}; drawn by tools/draw_curve.py from its metrics.jsonl"
    return page(TOP + HEIGHT + 58, f"The training of {name}", subtitle, parts + right)


@user_errors_end_the_program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run that has trained and validated")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file to write")
    parser.add_argument("--unigram", type=float, help="unigram entropy in bits per byte (`megachat demo` prints it)")
    arguments = parser.parse_args()
    metrics = read_metrics(arguments.run)
    curves = [
        [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        for key in ("train/loss", "val/bpb")
    ]
    if not all(curves):
        parser.error(f"{arguments.run} has no training step or no validation yet")
    picture = draw_curve(str(arguments.run), *curves, arguments.unigram)
    arguments.out.write_text(picture, encoding="utf-8")
    print(arguments.out)


if __name__ == "__main__":
    main()
