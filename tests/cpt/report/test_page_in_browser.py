"""The page in a real browser: what a reader clicks, at a desk, on a phone, in the dark, without script and on paper.

Every test ends with a look at the console: an error there, or anything the page tried to load, is a failure.
"""

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser, Tab
from run_stories import TWO_GROUPS, Exam, Story, evaluated_steps, write_document_losses, write_exam, write_run

from cpt.report.render import build_report
from cpt.rundir import RunDir

EVIL = "<img src=x onerror=alert(1)></script><script>window.hacked = 1</script>"


def troubled_run(root: Path, story: Story, exam: Exam = TWO_GROUPS) -> Path:
    run = write_run(root, story)
    write_exam(run, exam, evaluated_steps(story))
    write_document_losses(run, story, text=f"Document {{n}} {EVIL}")
    with RunDir(run).events.open("a") as events:
        for step, kind in ((60, "rollback"), (61, "resume")):
            line = {"time": 1.7e9, "step": step, "event": kind, "to": 50, "reasons": ["loss spike", EVIL]}
            events.write(json.dumps(line) + "\n")
    return run


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    evil = Exam(TWO_GROUPS.tasks, items=120, prompt=f"{EVIL} {{item}} {{task}}")
    none = Story(name="no_replay", share_general=0.0, general_end=3.58, domain_end=2.26)
    runs = [
        troubled_run(root, Story(name="replay"), evil),
        troubled_run(root, none),
        write_run(root, Story(name="scratch", init_from=None, share_general=0.0, general_end=4.9)),
    ]
    return {
        "one": build_report(runs[:1], root / "one").html,
        "three": build_report(runs, root / "three").html,
        "many": build_report([write_run(root / "many", Story(name=f"run_{n}", steps=40)) for n in range(12)]).html,
        "evil": build_report([troubled_run(root, Story(name=EVIL), evil)], root / "evil").html,
    }


Open = Callable[..., Any]


@pytest.fixture
def reading(browser: Browser, pages: dict[str, Path]) -> Open:
    @contextmanager
    def open_page(name: str, **how: Any) -> Iterator[Tab]:
        with browser.open(pages[name], **how) as tab:
            yield tab
            assert tab.complaints() == []

    return open_page


def first_words(tab: Tab, selector: str, most: int = 50) -> list[str]:
    """The first cell of every row of a table that can be seen."""
    return list(
        tab.run(
            f"[...document.querySelectorAll('{selector} tbody tr')].filter((row) => !row.hidden && row.offsetParent)"
            f".slice(0, {most}).map((row) => row.cells[0].textContent + '|' + row.cells[1].textContent)"
        )
    )


def test_the_page_is_ready_within_a_second_and_says_nothing_on_the_console(reading: Open) -> None:
    with reading("three") as tab:
        assert tab.run("document.documentElement.dataset.ready") is not None
        assert tab.run("document.querySelectorAll('.legend button').length") == 3
        assert tab.run("performance.getEntriesByType('resource').length") == 0


def test_every_drawing_of_the_script_is_the_one_that_stood_there(reading: Open) -> None:
    """Ticks, names and marks of the redrawn figures, against those that Python drew."""
    texts = "JSON.stringify([...document.querySelectorAll('g.plot')].map((g) => [...g.querySelectorAll('text')]" \
        ".map((t) => [t.textContent, Math.round(t.getBoundingClientRect().x), Math.round(t.getBoundingClientRect().y)])))"  # fmt: skip
    for name in ("one", "three"):
        with reading(name) as tab:
            before = json.loads(tab.run(texts))
            if name == "three":
                tab.run("document.querySelector('.legend button').click()")
                tab.run("document.querySelector('.legend button').click()")
            else:
                tab.run("document.querySelector('.axis-choice').dispatchEvent(new Event('change'))")
            tab.run("new Promise((done) => setTimeout(done, 600))")
            after = json.loads(tab.run(texts))
            assert len(after) == len(before) > 5
            for old, new in zip(before, after, strict=True):
                assert [text for text, _, _ in new] == [text for text, _, _ in old]
                assert all(abs(a[1] - b[1]) <= 1 and abs(a[2] - b[2]) <= 1 for a, b in zip(old, new, strict=True))


def test_a_click_on_a_heading_sorts_and_a_second_one_turns_it_round(reading: Open) -> None:
    with reading("three") as tab:
        place = tab.run(
            "[...document.querySelectorAll('.tasks th')].findIndex((th) => th.textContent.startsWith('Difference')) + 1"
        )
        numbers = (
            f"[...document.querySelectorAll('.tasks tbody tr td:nth-child({place})')].map((td) => Number(td.dataset.v))"
        )
        tab.click(f".tasks th:nth-child({place}) button")
        rising = tab.run(numbers)
        assert rising == sorted(rising) and len(set(rising)) > 2
        tab.click(f".tasks th:nth-child({place}) button")
        assert tab.run(numbers) == sorted(rising, reverse=True)
        assert tab.run(f"document.querySelector('.tasks th:nth-child({place})').ariaSort") == "descending"


def test_filters_leave_the_rows_that_fit_and_say_how_many(reading: Open) -> None:
    with reading("three") as tab:
        everything = len(first_words(tab, ".tasks"))
        tab.run("document.querySelector('.table.tasks .filters input, .filters input').scrollIntoView()")
        tab.click(".tasks .filters input")
        for letter in "blimp":
            tab.press(letter)
        left = first_words(tab, ".tasks")
        assert 0 < len(left) < everything and all("blimp" in words for words in left)
        assert tab.run("document.querySelector('.tasks .told').textContent") == f"{len(left)} of {everything} tasks"
        tab.run(
            "(() => { const s = [...document.querySelectorAll('.tasks select')].find((s) => s.ariaLabel === 'Verdict');"
            " s.value = 'gain'; s.dispatchEvent(new Event('input')); })()"
        )
        assert first_words(tab, ".tasks") == []


def test_a_hidden_run_leaves_the_figures_the_tables_and_comes_back(reading: Open) -> None:
    lines = "document.querySelectorAll('#retention .path').length"
    with reading("three") as tab:
        assert tab.run(lines) == 2
        tab.click('[data-legend="1"] button')
        assert tab.run(lines) == 1
        assert not [words for words in first_words(tab, ".tasks") if words.startswith("no_replay")]
        assert tab.run("document.querySelector('[data-legend=\"1\"] button').ariaPressed") == "false"
        heads = "[...document.querySelectorAll('.runs th')].filter((th) => th.offsetParent).map((th) => th.textContent)"
        assert "no_replay (reference)" not in tab.run(heads)
        tab.click(".toolbar .all")
        assert tab.run(lines) == 2 and "no_replay (reference)" in tab.run(heads)


def test_the_pointer_reads_out_a_checkpoint_and_a_curve(reading: Open) -> None:
    with reading("three") as tab:
        tab.run("document.querySelector('#retention').scrollIntoView({block: 'center'})")
        end = tab.run("(() => { const b = document.querySelector('#retention .end').getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()")  # fmt: skip
        tab.mouse("mouseMoved", *end)
        said = tab.run("document.querySelector('#retention .readout').innerText")
        assert "replay, step 200" in said and "general forgetting" in said and "0.040" in said
        x, y = tab.middle("#loss_1_python svg")
        tab.mouse("mouseMoved", x - 8, y)
        said = tab.run("document.querySelector('#loss_1_python .readout').innerText")
        assert "tokens" in said and "replay, held out" in said and "scratch" in said
        tab.mouse("mouseMoved", 2, 2)
        assert tab.run("document.querySelector('#loss_1_python .readout').hidden")


def test_dragging_zooms_and_the_button_and_escape_go_back(reading: Open) -> None:
    ticks = "[...document.querySelectorAll('#loss_1_python .tick')].map((t) => t.textContent).join()"
    with reading("three") as tab:
        before = tab.run(ticks)
        x, y = tab.middle("#loss_1_python svg")
        tab.drag((x - 60, y), (x + 40, y + 5))
        assert tab.run(ticks) != before
        tab.click("#loss_1_python .reset")
        assert tab.run(ticks) == before
        tab.run("document.querySelector('#loss_1_python svg').focus()")
        tab.press("+")
        assert tab.run(ticks) != before
        tab.press("Escape")
        assert tab.run(ticks) == before


def test_ticks_of_a_far_zoom_are_told_apart(reading: Open) -> None:
    across = "[...document.querySelectorAll('#loss_1_python .tick[text-anchor=middle]')].map((t) => t.textContent)"
    with reading("three") as tab:
        tab.run("document.querySelector('#loss_1_python svg').focus()")
        for _ in range(16):
            tab.press("+")
        shown = tab.run(across)
        assert len(set(shown)) == len(shown) > 2


def test_what_was_opened_for_the_printer_is_closed_again(reading: Open) -> None:
    closed = "document.querySelectorAll('details.printed:not([open])').length"
    with reading("many") as tab:
        before = tab.run(closed)
        assert before > 0
        tab.run("window.dispatchEvent(new Event('beforeprint'))")
        assert tab.run(closed) == 0
        tab.run("window.dispatchEvent(new Event('afterprint'))")
        assert tab.run(closed) == before


def test_paper_is_wide_enough_for_many_runs(reading: Open, browser: Browser) -> None:
    with reading("many", width=720) as tab:
        browser.ask("Emulation.setEmulatedMedia", media="print")
        tab.run("window.dispatchEvent(new Event('beforeprint'))")
        assert tab.run("document.documentElement.scrollWidth") <= 720


def test_arrows_walk_along_a_path_and_a_curve(reading: Open) -> None:
    with reading("three") as tab:
        tab.run("document.querySelector('#retention svg').focus()")
        tab.press("ArrowRight")
        assert "replay, step 8" in tab.run("document.querySelector('#retention .readout').innerText")
        tab.press("ArrowDown")
        assert "no_replay, step 200" in tab.run("document.querySelector('#retention .readout').innerText")
        tab.run("document.querySelector('#lr svg').focus()")
        tab.press("ArrowLeft")
        assert "replay" in tab.run("document.querySelector('#lr .readout').innerText")


def test_another_horizontal_axis_is_drawn_everywhere(reading: Open) -> None:
    with reading("three") as tab:
        for axis, words in (("step", "step"), ("hours", "hours since the start")):
            tab.run(
                f"(() => {{ const s = document.querySelector('.axis-choice'); s.value = '{axis}';"
                " s.dispatchEvent(new Event('change')); })()"
            )
            tab.run("new Promise((done) => setTimeout(done, 600))")
            labels = tab.run(
                "[...document.querySelectorAll('g.plot')].map((g) => g.querySelector('.axis').textContent)"
            )
            assert words in labels and "tokens seen" not in labels
        shown = tab.run("[...document.querySelectorAll('#lr .tick')].map((t) => t.textContent)")
        assert "0.05" in shown or "0.03" in shown or "0.02" in shown  # 200 seconds


def test_the_theme_follows_the_system_until_the_button_is_pressed(reading: Open) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    for dark, own, other in ((False, "rgb(255, 255, 255)", "rgb(20, 24, 31)"), (True, "rgb(20, 24, 31)", "rgb(255, 255, 255)")):  # fmt: skip
        with reading("three", dark=dark) as tab:
            assert tab.run(ground) == own
            tab.click(".theme")
            assert tab.run(ground) == other


@pytest.mark.parametrize("name", ["one", "three"])
def test_on_a_phone_nothing_but_tables_reaches_beyond_the_screen(reading: Open, name: str) -> None:
    with reading(name, width=390, height=844) as tab:
        assert tab.run("document.documentElement.scrollWidth") <= 390
        sizes = tab.run(
            "[...document.querySelectorAll('.chart svg.drawing')].map((s) => s.getBoundingClientRect().width)"
        )
        assert sizes and min(sizes) > 300


def test_without_script_the_page_is_whole(reading: Open) -> None:
    with reading("three", script=False) as tab:
        # Scripts of the page are off; the protocol's own still run.
        assert tab.run("document.documentElement.dataset.ready") is None
        assert tab.run("document.querySelectorAll('.chart svg .curve').length") > 20
        assert tab.run("document.querySelectorAll('.tasks tbody tr').length") == 2 * (2 + 3 + 2)
        assert tab.run("document.querySelectorAll('button, select, input').length") == 0
        assert tab.run("document.querySelectorAll('.legend li').length") == 3


def test_text_of_documents_items_events_and_names_is_never_markup(reading: Open) -> None:
    with reading("evil") as tab:
        assert tab.run("window.hacked") is None
        assert tab.run("document.images.length") == 0
        assert tab.run("document.body.innerText").count("<img src=x") >= 5
        tab.run("document.querySelector('#lr svg').focus()")
        tab.press("ArrowRight")
        assert "<img" in tab.run("document.querySelector('#lr .readout').innerText")
        assert tab.run("document.images.length") == 0


def test_events_of_the_guard_are_marked_and_told(reading: Open) -> None:
    with reading("one") as tab:
        marks = "[...document.querySelectorAll('#loss_1_python .mark text')].map((t) => t.textContent)"
        assert tab.run(marks)[0] == "R"
        assert "R rollback by the guard, S started again" in tab.run("document.querySelector('#loss_1_python figcaption').innerText")  # fmt: skip
        assert "back to step 50" in tab.run("document.querySelector('#loss_1_python .mark title').textContent")


def test_names_do_not_cover_each_other_in_any_figure(reading: Open) -> None:
    overlapping = """[...document.querySelectorAll('g.plot')].flatMap((g) => {
      const boxes = [...g.querySelectorAll('text.name, text.tick')].map((t) => [t.textContent, t.getBoundingClientRect()]);
      return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) => p.left < q.right - 1 && q.left < p.right - 1
        && p.top < q.bottom - 3 && q.top < p.bottom - 3).map(([b]) => a + ' / ' + b));
    })"""
    for name in ("one", "three"):
        with reading(name) as tab:
            assert tab.run(overlapping) == []


def test_screenshots_and_print_are_pictures_of_something(reading: Open, tmp_path: Path) -> None:
    for how in ({}, {"width": 390, "height": 844}, {"dark": True}):
        with reading("three", **how) as tab:
            picture = tab.screenshot()
            width, height = struct.unpack(">II", picture[16:24])
            assert (width, height) == (how.get("width", 1280), how.get("height", 900))
            assert len(zlib.compress(picture)) > 15_000  # an empty page has a fifth of it
    with reading("three") as tab:
        paper = tab.pdf()
        assert paper.startswith(b"%PDF") and 4 <= paper.count(b"/Type /Page\n") <= 30
