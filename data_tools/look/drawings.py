"""The page's pictures: a histogram and a rank-frequency curve as inline SVG, coloured by the page's variables."""

import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 460, 220
_LEFT, _BOTTOM, _TOP = 44, 26, 16
_LABEL_EVERY_PIXELS = 52
_BAR = Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2" fill="{}"><title>{}</title></rect>')


def histogram(bins: Sequence[dict[str, int]], colour: str) -> Markup:
    """Bars of doubling bins; each tells its range and count when pointed at."""
    most = max((entry["documents"] for entry in bins), default=1)
    step = (WIDTH - _LEFT) / max(len(bins), 1)
    every = max(1, math.ceil(_LABEL_EVERY_PIXELS / step))
    parts = [_axis(most)]
    for number, entry in enumerate(bins):
        x = _LEFT + number * step
        height = (HEIGHT - _TOP - _BOTTOM) * entry["documents"] / most
        height = max(height, 1.5) if entry["documents"] else 0
        title = f"{entry['from']:,} to {entry['below'] - 1:,}: {entry['documents']:,} documents"
        place = (x + 1.5, HEIGHT - _BOTTOM - height, max(step - 3, 1), height)
        parts.append(_BAR.format(*place, colour, title))
        if number % every == 0:
            parts.append(_label(x + step / 2, HEIGHT - 8, short(entry["from"], 1024), "middle"))
    return _svg(parts, "histogram of document lengths")


def rank_curve(curves: Sequence[tuple[str, Sequence[Sequence[int]]]]) -> Markup:
    """Counts over ranks, both axes logarithmic; one line per source in its colour."""
    most_rank = max((points[-1][0] for _, points in curves if points), default=2)
    most = max((points[0][1] for _, points in curves if points), default=2)
    wide, high = WIDTH - _LEFT - 8, HEIGHT - _TOP - _BOTTOM
    parts = [Markup("")]
    for power in range(int(math.log10(most)) + 1):
        y = HEIGHT - _BOTTOM - high * power / max(math.log10(most), 1e-9)
        parts.append(Markup('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}" stroke="var(--grid)"/>')
                     .format(_LEFT, WIDTH, y, y))  # fmt: skip
        parts.append(_label(_LEFT - 6, y + 4, short(10**power), "end"))
    for power in range(int(math.log10(most_rank)) + 1):
        x = _LEFT + wide * power / max(math.log10(most_rank), 1e-9)
        parts.append(_label(x, HEIGHT - 8, short(10**power), "middle" if power else "start"))
    for colour, points in curves:
        path = " ".join(
            f"{_LEFT + wide * math.log(rank) / max(math.log(most_rank), 1e-9):.1f},"
            f"{HEIGHT - _BOTTOM - high * math.log(max(count, 1)) / max(math.log(most), 1e-9):.1f}"
            for rank, count in points
        )
        parts.append(Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>').format(path, colour))
    return _svg(parts, "token counts by rank")


def short(number: int, thousand: int = 1000) -> str:
    """``12345`` -> ``12k``; with ``thousand`` 1024 for powers of two: ``2048`` -> ``2k``."""
    for power, name in ((3, "G"), (2, "M"), (1, "k")):
        if number >= thousand**power:
            return f"{number / thousand**power:.3g}{name}"
    return str(number)


def _axis(most: int) -> Markup:
    lines = Markup("")
    for part in (0.5, 1):
        y = HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * part
        lines += Markup('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}" stroke="var(--grid)"/>').format(
            _LEFT, WIDTH, y, y
        ) + _label(_LEFT - 6, y + 4, short(round(most * part)), "end")
    base = HEIGHT - _BOTTOM
    return lines + Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" stroke="var(--soft)"/>').format(
        _LEFT, WIDTH, base, base
    )


def _label(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" font-size="12" fill="var(--soft)" text-anchor="{}">{}</text>').format(
        x, y, anchor, text
    )


def _svg(parts: Sequence[Markup], label: str) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    return head + Markup("").join(parts) + Markup("</svg>")
