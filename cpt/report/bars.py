"""Stacked bars, one row per run, as SVG text: shares of tokens or of time. Pure; knows no runs beyond their labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from cpt.report.palette import short
from cpt.report.plot_svg import LETTER, WIDTH, svg_element

ROW, BAR = 30.0, 16.0
LINE = 19.0  # of the key under the bars
PALE = 0.8  # strength: numbers on a paler colour are dark
NARROW = 0.09  # of the bar: a smaller share has no room for its number


@dataclass(frozen=True)
class Part:
    """What one colour stands for: a role of the palette, how strong it is, and whether it is hatched."""

    word: str
    role: str
    strength: float = 1.0
    hatched: bool = False


@dataclass(frozen=True)
class Bar:
    """Shares by part, and what was wished for where that is known; ``note`` stands at the right end."""

    label: str
    shares: Mapping[str, float]
    planned: Mapping[str, float] | None = None
    note: str = ""


def stacked_bars(name: str, title: str, parts: Mapping[str, Part], bars: Sequence[Bar]) -> str:
    """Bars of shares in [0, 1]; a thin bar below each one is the plan. ``name`` keeps ids apart in a page."""
    label_width = 8.0 + max(len(short(bar.label)) for bar in bars) * LETTER
    note_width = 8.0 + max(len(bar.note) for bar in bars) * LETTER
    span = WIDTH - label_width - note_width
    body = [_hatching(name)] if any(part.hatched for part in parts.values()) else []
    for number, bar in enumerate(bars):
        top = 6.0 + number * ROW
        body.append(f'<text class="tick" x="0" y="{top + 12:.1f}">{escape(short(bar.label))}</text>')
        body += _segments(name, parts, bar.shares, (label_width, top, span, BAR))
        if bar.planned:
            body += _segments(name, parts, bar.planned, (label_width, top + BAR + 2, span, 4.0))
        body.append(
            f'<text class="tick strong" text-anchor="end" x="{WIDTH:g}" y="{top + 12:.1f}">{escape(bar.note)}</text>'
        )
    bottom = 6.0 + len(bars) * ROW + 10.0
    key, height = _key(name, parts, bottom)
    return svg_element(title, height, "".join([*body, *key]))


def _segments(
    name: str, parts: Mapping[str, Part], shares: Mapping[str, float], place: tuple[float, float, float, float]
) -> list[str]:
    left, top, span, height = place
    found = []
    for key, part in parts.items():
        share = shares.get(key, 0.0)
        width = share * span
        if width < 0.05:
            continue
        box = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:g}"'
        title = f"<title>{escape(part.word)}: {share:.1%}</title>"
        found.append(f'<g class="part"><rect {box} style="{_fill(part)}"/>{_hatch(name, part, box)}{title}')
        if share >= NARROW and height > 10 and not part.hatched:
            ink = "page" if part.strength > PALE else "ink"
            found.append(
                f'<text class="in" text-anchor="middle" x="{left + width / 2:.1f}" y="{top + height - 4.4:.1f}" '
                f'style="fill:var(--{ink})">{share:.0%}</text>'
            )
        found.append("</g>")
        left += width
    return found


def _fill(part: Part) -> str:
    return f"fill:var(--{part.role})" + (f";fill-opacity:{part.strength:g}" if part.strength < 1 else "")


def _hatch(name: str, part: Part, box: str) -> str:
    return f'<rect {box} style="fill:url(#{name}-hatch)"/>' if part.hatched else ""


def _hatching(name: str) -> str:
    return (
        f'<pattern id="{name}-hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<path d="M0 0V5" style="stroke:var(--page);stroke-width:3"/></pattern>'
    )


def _key(name: str, parts: Mapping[str, Part], top: float) -> tuple[list[str], float]:
    """Colours and their words, in as many lines as they need; and where the last one ends."""
    found, left = [], 0.0
    for part in parts.values():
        width = 17.0 + LETTER * len(part.word) + 14.0
        if left and left + width > WIDTH + 14:
            left, top = 0.0, top + LINE
        box = f'x="{left:.1f}" y="{top:.1f}" width="11" height="11"'
        found.append(f'<rect {box} style="{_fill(part)}"/>{_hatch(name, part, box)}')
        found.append(f'<text class="tick" x="{left + 16:.1f}" y="{top + 10:.1f}">{escape(part.word)}</text>')
        left += width
    return found, top + LINE
