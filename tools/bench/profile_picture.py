"""Draws the picture of `tools/bench.py profile`: a bar with the parts of a step, and when they happen in one step."""

from collections.abc import Iterable, Mapping
from xml.sax.saxutils import escape, quoteattr

COLORS = ("#3b75af", "#519e3e", "#ef8636", "#c53a32", "#8d69b8", "#84584e", "#d57dbe", "#55bbcb", "#bcbd45", "#c7c7c7")
LEFT, WIDTH, LINE, LEAST = 110, 840, 22, 0.3  # pixels; spans closer than LEAST are drawn as one


def join_spans(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Joins sorted spans of pixels that are too close to be distinguished."""
    joined: list[tuple[float, float]] = []
    for begin, end in spans:
        if joined and begin - joined[-1][1] < LEAST:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return joined


def draw_profile(title: str, parts: Mapping[str, Mapping[str, float]], step: list[tuple[float, float, str]]) -> str:
    """Returns SVG. parts: name -> {"ms", "share"} of the mean step. step: (begin, end, part) of one step, in us.

    Parts without time are in the legend only.
    """
    colors = dict(zip(parts, COLORS, strict=True))
    begin, end = step[0][0], step[-1][1]
    shown = [name for name in parts if any(part == name for _, _, part in step)]
    drawn, x = [f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>'], float(LEFT)
    for name, part in parts.items():
        if part["ms"] > 0:
            tooltip = f"<title>{escape(name)}: {part['ms']:.2f} ms, {part['share']:.1%}</title>"
            width = WIDTH * part["share"]
            box = f'x="{x:.2f}" y="40" width="{width:.2f}" height="36" fill="{colors[name]}"'
            drawn.append(f'<rect class="part" data-part={quoteattr(name)} {box}>{tooltip}</rect>')
            x += width
    top = 92
    for number, (name, part) in enumerate(parts.items()):
        column, row = LEFT + number % 4 * (WIDTH // 4), top + number // 4 * LINE
        drawn.append(f'<rect x="{column}" y="{row}" width="12" height="12" fill="{colors[name]}"/>')
        drawn.append(
            f'<text class="legend" x="{column + 18}" y="{row + 11}">'
            f"{escape(name)} {part['ms']:.1f} ms, {part['share']:.1%}</text>"
        )
    top += (len(parts) + 3) // 4 * LINE + 30
    drawn.append(f'<text x="{LEFT}" y="{top - 8}">one step, {(end - begin) / 1000:.1f} ms</text>')
    for number, name in enumerate(shown):
        y, scale = top + number * LINE, WIDTH / (end - begin)
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        spans = (
            (LEFT + (low - begin) * scale, LEFT + (high - begin) * scale) for low, high, part in step if part == name
        )
        boxes = (
            f'<rect x="{low:.2f}" y="{y}" width="{max(high - low, LEAST):.2f}" height="{LINE - 4}"/>'
            for low, high in join_spans(spans)
        )
        drawn.append(f'<g class="lane" data-part={quoteattr(name)} fill="{colors[name]}">{"".join(boxes)}</g>')
    height = top + len(shown) * LINE + 12
    width = LEFT + WIDTH + 20
    font = 'font-family="sans-serif" font-size="12" role="img"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *drawn, "</svg>", ""])
