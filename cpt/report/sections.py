"""Which parts a report has below its verdict, in which order, and what each holds. Words and places only."""

from dataclasses import dataclass

from cpt.report import promise, tables
from cpt.report.benchmark_views import stability_table, task_table
from cpt.report.cells import Table, with_content
from cpt.report.figures import Figures
from cpt.report.goodput_views import goodput_table
from cpt.report.lost_views import Block, diff_table, document_table, example_blocks
from cpt.report.outcomes import Outcomes
from cpt.report.plots import Chart
from cpt.report.verdict import Overview

FEWEST_EVENTS = 25  # of one run


@dataclass(frozen=True)
class Section:
    """One part: figures, then tables, then examples of items, then more tables. ``name`` is its anchor."""

    name: str
    heading: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    blocks: tuple[Block, ...] = ()
    after: tuple[Table, ...] = ()


def build_sections(view: Overview, outcomes: Outcomes, figures: Figures) -> list[Section]:
    """Without those that have nothing to show."""
    runs = view.summaries
    suites = outcomes.suites
    points = [{suite: outcomes.points[suite].get(n, ()) for suite in suites} for n in range(len(runs))]
    most_events = max(FEWEST_EVENTS, tables.MAX_EVENTS // len(runs))
    plans = [table for item in runs for table in (tables.stage_table(item), tables.quota_table(item))]
    goodputs = [goodput_table(item) for item in runs]
    found = (
        Section("curves", "Curves", figures.curves, _kept([promise.promise_table(item) for item in runs])),
        Section(
            "benchmarks",
            "Benchmarks",
            figures.accuracies,
            _kept([task_table(runs, outcomes, suite) for suite in suites]),
        ),
        Section(
            "forgotten",
            "What exactly was forgotten",
            tables=_kept([diff_table(runs, outcomes, suite) for suite in suites]),
            blocks=tuple(block for suite in suites for block in example_blocks(runs, outcomes, suite)),
            after=_kept([document_table(item, outcomes.documents.get(n)) for n, item in enumerate(runs)]),
        ),
        Section("sources", "Held-out text", tables=_kept([tables.source_table(item) for item in runs])),
        Section(
            "stability", "Stability", tables=_kept([stability_table(*pair) for pair in zip(runs, points, strict=True)])
        ),
        Section("mixture", "Mixture", figures.mixture, _kept(plans)),
        Section("cost", "Throughput and goodput", figures.cost, _kept([tables.cost_table(view), *goodputs])),
        Section("events", "Events", tables=_kept([tables.events_table(item, most_events) for item in runs])),
    )
    return [part for part in found if part.charts or part.tables or part.blocks or part.after]


def _kept(found: list[Table | None]) -> tuple[Table, ...]:
    return tuple(with_content(found))
