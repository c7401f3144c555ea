"""The figure of ``cpt data preview-mix``: shares, epochs and repeats of every source over the tokens of a run.

Refuses to compute: it draws the facts of :mod:`cpt.planner.preview_mix`. General sources are grey, domains coloured,
each is named where it ends, and what is read again is hatched: colour alone carries nothing.
"""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from cpt.planner.fitting import FloatArray
from cpt.planner.picture_style import FONT, GREY, INK, PAGE, SIDES, SOFT, dress, legend, sheet, styled
from cpt.planner.preview_mix import FREE_EPOCHS, reads_in_words
from cpt.planner.wording import Facts, amount, percent
from cpt.report.palette import RUNS_LIGHT, short, tick

Colour = tuple[float, float, float]

CLOSE = 0.16  # of the run: nearer marks share a text
HEADROOM = 1.22  # over the highest line, for a limit's words
MAX_NAMES = 12  # beside a panel; the totals name every source
MIN_BAND = 0.06  # a thinner band has no room for its name
FADE = 0.45
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)))


@styled
def draw_mix(facts: Facts) -> Figure:
    sources = facts["sources"]
    title = f"What {amount(facts['tokens'])} tokens will be made of"
    general, domain = percent(facts["share_general"]), percent(facts["share_domain"])
    subtitle = f"General {general}, domain {domain}; {facts['steps']:,} steps; plan {facts['fingerprint']}"
    bars = 0.9 + 0.42 * len(sources)
    figure = sheet(title, subtitle, height=6.6 + bars)
    shares, epochs, totals = figure.subplots(3, height_ratios=[3.0, 2.4, bars])
    colours = _colours(sources)
    _draw_shares(shares, facts, colours)
    _draw_epochs(epochs, facts, colours)
    _draw_totals(totals, facts, colours)
    with matplotlib.rc_context({"hatch.color": PAGE, "hatch.linewidth": 1.4}):
        again = Patch(facecolor=GREY, edgecolor=GREY, hatch="////", linewidth=0, label="read again")
    legend(figure, [again] if any(source["tokens_repeated"] for source in sources) else [])
    return figure


def _colours(sources: list[Facts]) -> list[Colour]:
    """Hues that all eyes tell apart for the domains, shades of grey for general sources; paler from the seventh on."""
    count = {"general": 0, "domain": 0}
    found = []
    for source in sources:
        index = count[source["group"]]
        count[source["group"]] += 1
        if source["group"] == "general":
            hue, pale = SIDES["general"], FADE * (index % 3) / 1.5
        else:
            hue, pale = RUNS_LIGHT[(index + 1) % len(RUNS_LIGHT)], FADE * (index // len(RUNS_LIGHT) % 2)
        red, green, blue = (float(part + (1 - part) * pale) for part in to_rgb(hue))
        found.append((red, green, blue))
    return found


def _draw_shares(axes: Axes, facts: Facts, colours: list[Colour]) -> None:
    """Bands on top of each other, as steps: within a window of the run the share is one number."""
    dress(axes, "", "share of tokens", title="Shares, as the sampler will realise them")
    at = np.array(facts["at_tokens"], dtype=float)
    shares = np.array([source["shares"] for source in facts["sources"]])
    tops = np.cumsum(shares, axis=0)
    for index, colour in enumerate(colours):
        low = tops[index] - shares[index]
        ends = (np.append(low, low[-1]), np.append(tops[index], tops[index][-1]))
        axes.fill_between(at, *ends, step="post", color=colour, linewidth=0)
        axes.stairs(tops[index], at, color=PAGE, linewidth=0.4, baseline=None)
        if shares[index][-1] == 0:
            _name_band(axes, facts["sources"][index], (at, low, shares[index]))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    names = [
        (float(top[-1] - share[-1] / 2), f"{short(source['name'])} {percent(share[-1])}", colour)
        for source, share, top, colour in zip(facts["sources"], shares, tops, colours, strict=True)
        if share[-1] > 0
    ]
    _name_ends(axes, names, gap=0.085)
    _time_axis(axes, facts, label=False)
    _mark_progress(axes, facts)
    _name_progress(axes, facts)


def _name_band(axes: Axes, source: Facts, band: tuple[FloatArray, ...]) -> None:
    """In the middle of the band, for a source that is gone at the end."""
    at, low, share = band
    where = int(np.argmax(share * np.diff(at)))
    if share[where] >= MIN_BAND:
        place = ((at[where] + at[where + 1]) / 2, low[where] + share[where] / 2)
        axes.text(*place, short(source["name"]), ha="center", va="center", color=PAGE, fontweight="bold", zorder=5)


def _draw_epochs(axes: Axes, facts: Facts, colours: list[Colour]) -> None:
    dress(axes, "tokens", "epochs", title="Epochs: how often each source has been read")
    at = np.array(facts["at_tokens"], dtype=float)
    highest = max(1.0, *(source["epochs"] for source in facts["sources"]))
    for index, (source, colour) in enumerate(zip(facts["sources"], colours, strict=True)):
        axes.plot(at, source["epochs_seen"], color=colour, linewidth=2.2, linestyle=STYLES[index % 4], zorder=4)
    axes.set_ylim(0, highest * HEADROOM)
    names = [
        (source["epochs"], f"{short(source['name'])} {source['epochs']:.2f}", colour)
        for source, colour in zip(facts["sources"], colours, strict=True)
    ]
    _name_ends(axes, names, gap=0.105 * highest * HEADROOM)
    for limit, text in _limits(facts):
        if limit <= highest * HEADROOM:
            axes.axhline(limit, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
            behind = {"facecolor": PAGE, "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
            axes.text(at[-1] * 0.005, limit, text, color=SOFT, va="bottom", fontsize=FONT * 0.9, zorder=7, bbox=behind)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=highest > FREE_EPOCHS / 2))
    _time_axis(axes, facts, label=True)
    _mark_progress(axes, facts)


def _limits(facts: Facts) -> list[tuple[float, str]]:
    """One line for each height: the caps of sources, what is nearly free, and where repeats begin."""
    caps: dict[float, list[str]] = {}
    for source in facts["sources"]:
        caps.setdefault(source["max_epochs"], []).append(short(source["name"]))
    found = {1.0: "read once"} | {float(FREE_EPOCHS): f"{FREE_EPOCHS}: nearly free up to here"}
    for cap, names in caps.items():
        of = "" if len(caps) == 1 else f" of {', '.join(names[:2])}" + (" …" if len(names) > 2 else "")
        free = ", nearly free up to here" if cap == FREE_EPOCHS else ""
        found[cap] = f"{cap:g}: cap{of}{free}"
    return sorted(found.items())


def _name_ends(axes: Axes, names: list[tuple[float, str, Colour]], *, gap: float) -> None:
    """(height, text, colour) right of the panel, pushed apart so that none covers another; the first few, if many."""
    _, high = axes.get_ylim()
    places: list[float] = []
    ordered = sorted(names[:MAX_NAMES], key=lambda name: name[0])
    for wanted, _, _ in ordered:
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    surplus = max(0.0, places[-1] - high) if places else 0.0
    for (_, text, colour), place in zip(ordered, places, strict=True):
        axes.annotate(
            text, (1.0, place - surplus), xycoords=("axes fraction", "data"), xytext=(7, 0), va="center",
            textcoords="offset points", color=tuple(part * 0.8 for part in colour), fontweight="bold",
            annotation_clip=False,
        )  # fmt: skip


def _draw_totals(axes: Axes, facts: Facts, colours: list[Colour]) -> None:
    """One bar for each source: what is read for the first time, then, hatched, what is read again."""
    dress(axes, "tokens read over the run", "", title="Tokens of each source", grid="x")
    sources = facts["sources"]
    for index, (source, colour) in enumerate(zip(sources, colours, strict=True)):
        fresh = source["tokens_planned"] - source["tokens_repeated"]
        axes.barh(index, fresh, color=colour, height=0.62)
        if source["tokens_repeated"]:
            with matplotlib.rc_context({"hatch.color": PAGE, "hatch.linewidth": 1.4}):
                axes.barh(index, source["tokens_repeated"], left=fresh, height=0.62, linewidth=0, hatch="////",
                          color=tuple(part + (1 - part) * FADE for part in colour))  # fmt: skip
        worth = f", worth {amount(source['tokens_worth'])} fresh" if source["tokens_repeated"] else ""
        text = f"{amount(source['tokens_planned'])} ({percent(source['share'])}): {reads_in_words(source)}{worth}"
        axes.annotate(text, (source["tokens_planned"], index), xytext=(6, 0), textcoords="offset points",
                      va="center", color=INK, fontsize=FONT * 0.95,
                      bbox={"facecolor": PAGE, "edgecolor": "none", "pad": 1})  # fmt: skip
    axes.set_yticks(range(len(sources)), [short(source["name"]) for source in sources])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(sources) - 0.5, -0.5)
    axes.set_xlim(0, max(source["tokens_planned"] for source in sources) * 1.9)
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _time_axis(axes: Axes, facts: Facts, *, label: bool) -> None:
    axes.set_xlim(0, facts["tokens"])
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    if not label:
        axes.set_xticklabels([])


def _mark_progress(axes: Axes, facts: Facts) -> None:
    """What is done lies under a veil; a line where the mixture of the running job was changed."""
    if facts["done_tokens"]:
        axes.axvspan(0, facts["done_tokens"], facecolor=PAGE, alpha=0.4, linewidth=0, zorder=3)
        axes.axvline(facts["done_tokens"], color=INK, linewidth=1.6, zorder=6)
    for change in facts["changes"]:
        axes.axvline(change["tokens"], color=INK, linewidth=1.2, linestyle=(0, (2, 2)), zorder=6)


def _name_progress(axes: Axes, facts: Facts) -> None:
    """Above the lines, in one text where they stand too close for two."""
    marks = [(change["tokens"], "mixture changed") for change in facts["changes"][-1:]]
    marks += [(facts["done_tokens"], "done")] if facts["done_tokens"] else []
    if len(marks) == 2 and marks[1][0] - marks[0][0] < CLOSE * facts["tokens"]:
        together = "done, mixture changed" if marks[1][0] == marks[0][0] else "mixture changed, done"
        marks = [(marks[0][0], together)]
    for tokens, text in marks:
        side = "right" if tokens > 0.7 * facts["tokens"] else "left"
        axes.annotate(text, (tokens, 1.0), xytext=(-2 if side == "right" else 2, 4), textcoords="offset points",
                      xycoords=("data", "axes fraction"), ha=side, color=INK, fontsize=FONT * 0.9,
                      annotation_clip=False)  # fmt: skip
    if marks:
        axes.set_title(axes.get_title(loc="left"), loc="left", color=INK, fontsize=FONT * 1.05, pad=22)
