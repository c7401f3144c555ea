import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from cpt.report.render import build_report, report_data
from cpt.rundir import DataError, RunDir

RunWriter = Callable[..., Path]


@pytest.fixture
def three_runs(make_run: RunWriter) -> list[Path]:
    return [
        make_run(name="no_replay", share_general=0.0, general_end=3.58, domain_end=2.26),
        make_run(name="replay"),
        make_run(name="scratch", share_general=0.0, init_from=None, general_end=4.9, domain_end=2.6, bump=0.0),
    ]


class Tags(HTMLParser):
    """Collects open tags and checks that what is opened is closed."""

    VOID = ("meta", "br", "rect", "use", "path", "link")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def tags_of(html: str) -> list[str]:
    parser = Tags()
    parser.feed(html)
    assert parser.open == []
    return parser.seen


def test_three_runs_make_one_small_page_that_needs_no_network(three_runs: list[Path], tmp_path: Path) -> None:
    paths = build_report(three_runs, tmp_path / "out")
    html = paths.html.read_text()
    assert len(html) < 2_000_000
    assert not re.search(r"https?:|[\"'(]//[a-z]|@import|src=", html)
    tags = tags_of(html)
    assert tags.count("figure") > 12 and tags.count("script") == 2
    order = [
        "kept general forgetting",
        'id="retention"',
        "Runs side by side",
        ">Curves<",
        ">Mixture<",
        "Resolved config",
    ]
    assert [html.index(part) for part in order] == sorted(html.index(part) for part in order)


def test_the_markdown_twin_has_the_same_numbers_and_its_figures_exist(three_runs: list[Path], tmp_path: Path) -> None:
    paths = build_report(three_runs, tmp_path / "out")
    html, markdown = paths.html.read_text(), paths.markdown.read_text()
    linked = re.findall(r"\]\((figures/[^)]+)\)", markdown)
    assert linked and all((paths.markdown.parent / name).exists() for name in linked)
    cells = set(re.findall(r"<td[^>]*>([^<]*)</td>", html))
    numbers = {cell for cell in cells if re.search(r"\d", cell)}
    missing = [cell for cell in numbers if cell not in markdown]
    assert numbers and not missing


def test_the_table_of_runs_keeps_its_columns_in_markdown(three_runs: list[Path], tmp_path: Path) -> None:
    markdown = build_report(three_runs, tmp_path / "out").markdown.read_text()
    block = markdown.split("### Runs side by side")[1].split("\n\n")[1].splitlines()
    assert {line.count("|") for line in block} == {5}
    assert "no_replay (reference)" in block[0]


def test_text_from_files_is_escaped_everywhere(make_run: RunWriter) -> None:
    root = make_run(name="<script>alert(1)</script>|x")
    paths = RunDir(root)
    paths.environment.write_text(json.dumps({"<img src=x>": "</td><script>"}))
    with paths.events.open("a") as events:
        events.write(json.dumps({"event": "<script>", "step": 1, "time": 1.7e9, "why": "<b>|`"}) + "\n")
    made = build_report([root])
    html, markdown = made.html.read_text(), made.markdown.read_text()
    assert "&lt;script&gt;alert(1)" in html
    assert tags_of(html).count("script") == 2 and "img" not in tags_of(html)
    assert "<b>|" not in html and "alert(1)</script>" not in html
    figures = "".join(file.read_text() for file in (made.html.parent / "figures").iterdir())
    outside_code = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert "<script" not in outside_code + figures and "<img" not in outside_code


def test_a_crashed_run_without_evaluations_still_gets_a_report_with_its_warnings(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=20))
    for file in paths.evals.iterdir():
        file.unlink()
    paths.metrics.write_bytes(paths.metrics.read_bytes()[:-30])
    paths.events.unlink()
    made = build_report([paths.root])
    for text in (made.html.read_text(), made.markdown.read_text()):
        assert "No evaluation yet. The training loss is" in text
        assert "is cut off and was left out" in text
        assert "The run is not finished" in text


def test_a_run_folder_with_nothing_logged_yet_gets_a_report(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=20))
    for file in (paths.metrics, paths.events, paths.plan, paths.environment, *paths.evals.iterdir()):
        file.unlink()
    made = build_report([paths.root])
    assert "an unknown number of tokens" in made.html.read_text()


def test_losses_that_are_all_nan_leave_a_page_without_those_figures(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=20))
    lines = [
        json.loads(line) | {"loss": None, "loss_by_source": {"prose": None}}
        for line in paths.metrics.read_text().splitlines()
    ]
    paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "not a finite number at 20 logged steps" in build_report([paths.root]).html.read_text()


def test_one_run_reports_into_its_own_folder_and_several_beside_the_first(three_runs: list[Path]) -> None:
    assert build_report(three_runs[:1]).html == RunDir(three_runs[0]).report / "index.html"
    assert build_report(three_runs).html == three_runs[0].parent / "report" / "index.html"


def test_a_second_report_replaces_the_first_and_is_the_same(three_runs: list[Path], tmp_path: Path) -> None:
    first = build_report(three_runs, tmp_path / "out").html.read_bytes()
    assert build_report(three_runs, tmp_path / "out").html.read_bytes() == first


def test_figures_of_the_report_before_are_removed_and_other_files_are_not(make_run: RunWriter, tmp_path: Path) -> None:
    figures = tmp_path / "out" / "figures"
    figures.mkdir(parents=True)
    (figures / "mine.svg").write_text("drawn by hand")
    odd = make_run(name="![x](figures/mine.svg)")  # a name is no link
    build_report([make_run(name="plain"), odd], tmp_path / "out")
    assert (figures / "retention.svg").exists()
    build_report([make_run(name="scratch", init_from=None)], tmp_path / "out")
    assert not (figures / "retention.svg").exists() and (figures / "lr.svg").exists()
    assert (figures / "mine.svg").read_text() == "drawn by hand"


LONG_SOURCE = json.dumps({"step": 21, "tokens_seen": 86016, "tokens_by_source": {"s" * 400: 9}, "loss_by_source": {"s" * 400: 2}})  # fmt: skip


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("events.jsonl", r'{"event": "x", "step": 1, "time": 1.7e9, "why": "half a pair: \ud800"}'),
        ("events.jsonl", '{"event": "x", "step": 1, "time": 1e300}'),
        ("events.jsonl", f'{{"event": "rollback", "step": {"9" * 400}, "time": -1e18}}'),
        ("metrics.jsonl", f'{{"step": 21, "tokens_seen": {"9" * 400}, "loss": NaN}}'),
        ("metrics.jsonl", '{"step": 21, "tokens_seen": 86016, "loss": 1e308, "grad_norm": -1e308}'),
        ("metrics.jsonl", '{"step": 22, "tokens_seen": 90112, "loss_by_source": {"prose": 1e308, "python": -1e308}}'),
        ("metrics.jsonl", LONG_SOURCE),
        ("metrics.jsonl", '{"a":' * 5000),
    ],
)
def test_a_line_of_nonsense_leaves_the_report_whole(make_run: RunWriter, file: str, line: str) -> None:
    root = make_run(steps=20)
    with (root / file).open("a") as lines:
        lines.write(line + "\n")
    made = build_report([root])
    assert "Domain loss fell by" in made.html.read_text(encoding="utf-8") and made.markdown.read_text(encoding="utf-8")
    json.dumps(report_data([root]), allow_nan=False)


def test_a_source_with_a_long_name_has_its_figure(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=20))
    for file in (*paths.evals.glob("*.json"), paths.plan, paths.metrics):
        file.write_text(file.read_text().replace('"prose"', json.dumps("s" * 300)))
    figures = build_report([paths.root]).html.parent / "figures"
    assert len(list(figures.glob("loss_*_sss*.svg"))) == 1


def test_no_two_elements_of_the_page_have_one_id(three_runs: list[Path]) -> None:
    ids = re.findall(r'\bid="([^"]+)"', build_report(three_runs).html.read_text())
    assert len(ids) == len(set(ids)) > 15


def test_captions_speak_only_of_what_is_drawn(make_run: RunWriter) -> None:
    few, many = (
        build_report([make_run(name=f"of_{number}_{n}", steps=20) for n in range(number)]).html.read_text()
        for number in (2, 5)
    )
    assert "light: every logged step" in few and "with a band of two standard errors" in few
    assert "light: every logged step" not in many and "with a band of two standard errors" not in many
    without = RunDir(make_run(name="without", steps=20))
    for file in without.evals.iterdir():
        file.unlink()
    assert "Markers on thin lines" not in build_report([without.root]).html.read_text()


def test_the_numbers_are_there_as_json(three_runs: list[Path]) -> None:
    data = json.loads(json.dumps(report_data(three_runs), allow_nan=False))
    by_name = {run["name"]: run for run in data["runs"]}
    assert data["reference"] == "no_replay"
    assert by_name["replay"]["forgetting_ratio"] < 0.1 and by_name["replay"]["gain_given_up"] < 0.05
    assert by_name["scratch"]["gain"] is None and by_name["scratch"]["forgetting"] is None


def test_a_source_at_its_cap_is_marked(make_run: RunWriter) -> None:
    paths = RunDir(make_run(share_general=0.0, steps=20))
    config = yaml.safe_load(paths.config.read_text())
    config["data"]["max_epochs"] = 2.0  # the plan gives python 2 epochs
    paths.config.write_text(yaml.safe_dump(config))
    assert "2.00 (at the cap)" in build_report([paths.root]).markdown.read_text()


def test_no_run_folder_is_refused_with_the_usage() -> None:
    with pytest.raises(DataError, match="no run folder given; use `cpt report RUN_DIR"):
        build_report([])
