"""`cpt quickstart --fast` as a user meets it: interrupted once, started again, then called on what is finished."""

import json
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Workshop = Any  # the fixtures of tests/conftest.py
RUNS = ("no_replay", "replay", "from_scratch")
# 90 s are promised on two free cores. Here other tests run too, so it is the time on processors that counts.
LIMIT_CPU_SECONDS = 2 * 90


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    """A quickstart that was told to stop while it trained the base, and then started again to its end."""

    def make(shop: Workshop) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = shop.start("quickstart", "--fast", "--out", shop.root)
        shop.wait_for_step("base", 6, process)
        process.send_signal(signal.SIGTERM)
        first, _ = process.communicate(timeout=60)
        codes = [process.returncode]
        process = shop.start("quickstart", "--fast", "--out", shop.root)
        second, _ = process.communicate(timeout=400)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        facts = {"codes": [*codes, process.returncode], "printed": [first, second], "seconds": seconds}
        (shop.root / "facts.json").write_text(json.dumps(facts))

    return made_once("quickstart", make)


@pytest.fixture
def facts(shop: Workshop) -> dict[str, Any]:
    return dict(json.loads((shop.root / "facts.json").read_text()))


def test_stopped_in_the_base_run_it_saves_ends_with_143_and_says_how_to_go_on(
    shop: Workshop, facts: dict[str, Any]
) -> None:
    assert facts["codes"][0] == 143, facts["printed"][0]
    assert "the same command goes on from here" in facts["printed"][0]
    assert "Traceback" not in facts["printed"][0]
    names = [event["event"] for event in shop.events("base")]
    assert names.index("sigterm") < names.index("resume") < names.index("finish")
    steps = [record["step"] for record in shop.records("base")]
    assert steps == sorted(set(steps)), "no step was trained twice"


def test_started_again_it_ends_in_time_with_a_report(shop: Workshop, facts: dict[str, Any]) -> None:
    assert facts["codes"][1] == 0, facts["printed"][1]
    assert facts["seconds"] < LIMIT_CPU_SECONDS
    page = Path(re.findall(r"The report: (\S+)", facts["printed"][1])[0])
    assert page == shop.root / "report/index.html"
    assert "<svg" in page.read_text()
    assert [line for line in facts["printed"][1].splitlines() if re.match(r"\d/9 ", line)][-1].startswith("9/9  report")


def test_the_report_shows_that_replay_keeps_forgetting_under_a_third_for_a_tenth_of_the_gain(shop: Workshop) -> None:
    done = shop.cpt("report", *(shop.run_dir(name) for name in RUNS), "--json")
    report = json.loads(done.out)
    assert report["reference"] == "no_replay" and report["warnings"] == []
    runs = {run["name"]: run for run in report["runs"]}
    assert runs["no_replay"]["forgetting"] > 0.1
    assert runs["replay"]["forgetting_ratio"] <= 1 / 3
    assert runs["replay"]["gain_given_up"] <= 0.10
    assert runs["replay"]["share_general_realised"] == pytest.approx(0.25, abs=0.005)
    assert len({run["tokens"] for run in report["runs"]}) == 1  # an equal budget
    said = report["verdict"][0]
    assert (
        said.startswith(("replay kept general forgetting at", "replay forgot nothing")) and "of the domain gain" in said
    )
    assert said in (shop.root / "report/report.md").read_text()


def test_called_again_every_stage_is_skipped(shop: Workshop) -> None:
    before = {name: shop.records(name) for name in ("base", *RUNS)}
    started = time.monotonic()
    done = shop.cpt("quickstart", "--fast", "--out", shop.root)
    assert done.code == 0 and time.monotonic() - started < 20
    assert before == {name: shop.records(name) for name in ("base", *RUNS)}


def test_with_other_settings_a_finished_quickstart_is_not_shown_as_their_result(shop: Workshop) -> None:
    for other in (["--fast", "--seed", "7"], []):
        done = shop.cpt("quickstart", *other, "--out", shop.root)
        assert done.code == 2 and str(shop.root) in done.err and "--seed or --fast" in done.err
