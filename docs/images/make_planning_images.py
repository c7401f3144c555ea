"""Draws the pictures of docs/planning.md with the planner's own verbs, and copies what they print into that page.

    python -m docs.images.make_planning_images runs/pilots_cpu/observations.csv

planning_recommend.png   from the given observations: what `cpt plan pilots configs/runs/pilots_cpu.yaml` wrote
planning_compare.png, planning_critical.png   from the measurements of arXiv 2403.16952 (Pythia-70M, Pile and Python),
                         which `benchmarks/planner/pythia.py` reads and which are not part of this repository; without
                         them the two are left as they are

A block of text behind the comment ``<!-- printed: NAME -->`` is replaced. The figure of the promise on that page is cut
from a report and not made here.
"""

import io
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from benchmarks.planner.pythia import DATA, observations_csv
from cpt.plan_cli import strict
from cpt.planner.answers import Ask, critical_facts, recommend_facts
from cpt.planner.compare import compare_facts
from cpt.planner.critical_figure import draw_critical
from cpt.planner.observations import read_observations
from cpt.planner.picture_recommend import draw_recommend
from cpt.planner.pictures import draw_compare, save_figure
from cpt.planner.tables import render_compare, render_recommend

HERE = Path(__file__).parent
PAGE = HERE.parent / "planning.md"
NUM_COLOURS = 64  # of the palette; the figures have few, and are a third of the bytes


def write(name: str, figure: Any) -> None:
    """The PNG alone, with a palette in place of 24 bits a pixel."""
    png, svg = save_figure(figure, HERE / name)
    svg.unlink()
    Image.open(png).convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(png, optimize=True)


def print_into_page(name: str, facts: dict[str, Any], render: Callable[..., Any], stop: str) -> None:
    """What a terminal of 100 columns shows, up to the line that begins with ``stop``."""
    terminal = io.StringIO()
    Console(file=terminal, width=100).print(render({**facts, "observations": "runs/pilots_cpu/observations.csv"}))
    lines = [line.rstrip() for line in terminal.getvalue().splitlines()]
    kept = lines[: next((at for at, line in enumerate(lines) if line.startswith(stop)), len(lines))]
    block = f"<!-- printed: {name} -->\n```text\n" + "\n".join(kept).rstrip() + "\n```"
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(rf"<!-- printed: {name} -->\n```text\n.*?```", lambda _: block, text, flags=re.S))


def main(path: Path) -> None:
    observations = read_observations(path)
    print_into_page("compare", compare_facts(observations, ("general", "domain")), render_compare, "Domain")
    facts = strict(recommend_facts(observations, Ask(tokens=500e3, tolerance=0.05)))
    print_into_page("recommend", facts, render_recommend, "Laws")
    write("planning_recommend", draw_recommend(facts))
    if not DATA.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        pythia = read_observations(observations_csv(Path(folder)))
    write("planning_compare", draw_compare(strict(compare_facts(pythia, ("general", "domain")))))
    asked = Ask(tokens=float(pythia.tokens.max()))
    write("planning_critical", draw_critical(strict(critical_facts(pythia, (0.0, 0.01, 0.02, 0.05), asked))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
