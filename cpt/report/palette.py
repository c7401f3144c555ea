"""Colours of the report, how runs are told apart, and how axis numbers are written. Draws nothing.

Okabe-Ito hues, told apart under all common colour blindness. A run also has a marker and, from the seventh run on, a
pattern of dashes: 24 runs differ in black and white.
"""

import re

from cpt.report.summary import scaled

LABEL_CHARS = 16

LIGHT = {
    "ink": "#1d2330",
    "soft": "#646e80",
    "grid": "#e3e6eb",
    "page": "#ffffff",
    "general": "#5b6b86",
    "domain": "#b07d00",
}
DARK = {
    "ink": "#e8eaee",
    "soft": "#9aa4b5",
    "grid": "#2c3340",
    "page": "#14181f",
    "general": "#93a3bf",
    "domain": "#e3b341",
}
RUNS_LIGHT = ("#0068b0", "#cf4e00", "#00835c", "#a4508b", "#8a6d00", "#3a8fc7")
RUNS_DARK = ("#5aaaf0", "#ff8a4a", "#3fcf9f", "#e594cb", "#d9c04a", "#8fd0ff")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # of the runs 1-6, 7-12, ...
THEMES = {
    "light": LIGHT | {f"run{i}": c for i, c in enumerate(RUNS_LIGHT)},
    "dark": DARK | {f"run{i}": c for i, c in enumerate(RUNS_DARK)},
}


def tick(value: float, _: object = None) -> str:
    """An axis number: ``1.2 M``, ``400 k``, ``0.0002``."""
    return re.sub(r"\.0+(?= )|(\.\d*?[1-9])0+(?= )", r"\1", scaled(value)) if abs(value) >= 1000 else f"{value:.3g}"


def short(text: str) -> str:
    return text if len(text) <= LABEL_CHARS else f"{text[: LABEL_CHARS - 1]}…"
