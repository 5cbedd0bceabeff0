"""The picture of `tools/bench.py profile`: a bar of a step's parts, and when they happen in one step; plain SVG."""

from collections.abc import Iterable, Mapping
from xml.sax.saxutils import escape, quoteattr

COLOURS = ("#3b75af", "#519e3e", "#ef8636", "#c53a32", "#8d69b8", "#84584e", "#d57dbe", "#55bbcb", "#bcbd45", "#c7c7c7")
LEFT, WIDTH, LINE, LEAST = 110, 840, 22, 0.3  # pixels; LEAST: what is closer than this is drawn as one


def lane(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans of pixels, in order, such as cannot be told apart joined."""
    joined: list[tuple[float, float]] = []
    for begin, end in spans:
        if joined and begin - joined[-1][1] < LEAST:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return joined


def picture(title: str, parts: Mapping[str, Mapping[str, float]], step: list[tuple[float, float, str]]) -> str:
    """parts: name -> {"ms", "share"}, of the mean step. step: (begin, end, part) in microseconds, of one step, without holes. Parts without time
    are left out of the bar and the lanes, and stay in the legend."""
    colours = dict(zip(parts, COLOURS, strict=True))
    begin, end = step[0][0], step[-1][1]
    shown = [name for name in parts if any(part == name for _, _, part in step)]
    drawn, x = [f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>'], float(LEFT)
    for name, own in parts.items():
        if own["ms"] > 0:
            told = f"<title>{escape(name)}: {own['ms']:.2f} ms, {own['share']:.1%}</title>"
            drawn.append(
                f'<rect class="part" data-part={quoteattr(name)} x="{x:.2f}" y="40" width="{WIDTH * own["share"]:.2f}" height="36" '
            )
            drawn[-1] += f'fill="{colours[name]}">{told}</rect>'
            x += WIDTH * own["share"]
    top = 92
    for number, (name, own) in enumerate(parts.items()):
        column, row = LEFT + number % 4 * (WIDTH // 4), top + number // 4 * LINE
        drawn.append(f'<rect x="{column}" y="{row}" width="12" height="12" fill="{colours[name]}"/>')
        drawn.append(
            f'<text class="legend" x="{column + 18}" y="{row + 11}">{escape(name)} {own["ms"]:.1f} ms, {own["share"]:.1%}</text>'
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
            for low, high in lane(spans)
        )
        drawn.append(f'<g class="lane" data-part={quoteattr(name)} fill="{colours[name]}">{"".join(boxes)}</g>')
    height = top + len(shown) * LINE + 12
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" font-family="sans-serif" font-size="12" role="img">'
    return "\n".join(
        [head, f'<rect width="{LEFT + WIDTH + 20}" height="{height}" fill="white"/>', *drawn, "</svg>", ""]
    )
