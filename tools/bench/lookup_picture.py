"""Draws validation curves of several variants against steps, seconds and FLOPs, with error bars, as SVG."""

from collections.abc import Callable, Mapping
from xml.sax.saxutils import escape

from tools.bench.profile_picture import COLORS

WIDTH, HEIGHT, GAP, TOP, BOTTOM, LINE = 300, 260, 70, 40, 48, 18  # pixels of a panel and around it
TICKS = 4


def draw_curves(title: str, variants: Mapping[str, Mapping]) -> str:
    """Returns SVG with a panel each for steps, seconds (if they were measured) and FLOPs.

    variants: name -> {"curve": [{"step", "flops", "bpb", "error"}]} and, if timed, "step_s". The first point of each
    curve is left out: it would hide the differences at the end.
    """
    curves = {name: variant["curve"][1:] for name, variant in variants.items()}
    axes: list[tuple[str, Callable]] = [("steps", lambda _, point: point["step"])]
    if all("step_s" in variant for variant in variants.values()):
        axes.append(("seconds of training steps", lambda name, point: point["step"] * variants[name]["step_s"]))
    axes.append(("training FLOPs, 10^12", lambda _, point: point["flops"] / 1e12))
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(curves)}
    dashes = {name: "none" if number < len(COLORS) else "4 3" for number, name in enumerate(curves)}
    bounds = [(point["bpb"], point["error"] or 0) for curve in curves.values() for point in curve]
    low, high = min(bpb - error for bpb, error in bounds), max(bpb + error for bpb, error in bounds)

    def y(bpb: float) -> float:
        return TOP + HEIGHT * (high - bpb) / ((high - low) or 1)

    drawn = [f'<text x="{GAP}" y="20" font-size="15">{escape(title)}</text>']
    for panel, (label, value) in enumerate(axes):
        left = GAP + panel * (WIDTH + GAP)
        values = [value(name, point) for name, curve in curves.items() for point in curve]
        least, most = min(values), max(values)
        drawn += _frame(left, label, least, most, low, high, y)
        for name, curve in curves.items():
            places = [(left + WIDTH * (value(name, point) - least) / (most - least), point) for point in curve]
            line = " ".join(f"{x:.1f},{y(point['bpb']):.1f}" for x, point in places)
            style = f'stroke="{colors[name]}" stroke-dasharray="{dashes[name]}" fill="none"'
            bars = "".join(
                f'<path d="M{x:.1f} {y(point["bpb"] - point["error"]):.1f}V{y(point["bpb"] + point["error"]):.1f}"/>'
                for x, point in places
                if point["error"]
            )
            drawn.append(f'<g class="curve" {style}><title>{escape(name)}</title><polyline points="{line}"/>{bars}</g>')
    for number, name in enumerate(curves):
        column, row = GAP + number % 5 * 200, TOP + HEIGHT + BOTTOM + number // 5 * LINE
        drawn.append(
            f'<path d="M{column} {row}h24" stroke="{colors[name]}" stroke-width="2" stroke-dasharray="{dashes[name]}"/>'
            f'<text class="legend" x="{column + 30}" y="{row + 4}">{escape(name)}</text>'
        )
    width = GAP + len(axes) * (WIDTH + GAP)
    height = TOP + HEIGHT + BOTTOM + (len(curves) + 4) // 5 * LINE
    font = 'font-family="sans-serif" font-size="12" role="img"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *drawn, "</svg>", ""])


def _frame(
    left: float, label: str, least: float, most: float, low: float, high: float, y: Callable[[float], float]
) -> list[str]:
    """Returns the frame of a panel with its ticks: x from `least` to `most`, y from `low` to `high` bits per byte."""
    box = f'x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"'
    drawn = [f'<rect {box} fill="none" stroke="#999"/>']
    for tick in range(TICKS + 1):
        x, bpb = left + WIDTH * tick / TICKS, low + (high - low) * tick / TICKS
        number = least + (most - least) * tick / TICKS
        drawn.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{number:.4g}</text>')
        drawn.append(f'<text x="{left - 6}" y="{y(bpb) + 4:.1f}" text-anchor="end">{bpb:.3f}</text>')
    drawn.append(f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 32}" text-anchor="middle">{escape(label)}</text>')
    return drawn
