"""`cpt quickstart --fast` as a user meets it: interrupted once, started again, then called on what is finished."""

import csv
import json
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.recommendation import read_recommendation

Workshop = Any  # the fixtures of tests/conftest.py
CONTINUED = ("no_replay", "replay_05", "planned", "replay_50")
RUNS = (*CONTINUED, "from_scratch")
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
        second, _ = process.communicate(timeout=600)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        facts = {"codes": [*codes, process.returncode], "printed": [first, second], "seconds": seconds}
        (shop.root / "facts.json").write_text(json.dumps(facts))

    return made_once("quickstart", make)


@pytest.fixture
def facts(shop: Workshop) -> dict[str, Any]:
    return dict(json.loads((shop.root / "facts.json").read_text()))


@pytest.fixture
def report(shop: Workshop) -> dict[str, Any]:
    return dict(json.loads(shop.cpt("report", *(shop.run_dir(name) for name in RUNS), "--json").out))


@pytest.fixture
def runs(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in report["runs"]}


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
    stages = [line for line in facts["printed"][1].splitlines() if re.match(r"\d/9 ", line)]
    assert len(stages) == 9 and stages[-1].startswith("9/9  report")


def test_the_recommended_share_lies_between_none_and_all_and_is_said_in_one_sentence(
    shop: Workshop, facts: dict[str, Any]
) -> None:
    plan = read_recommendation(shop.root / "plan.json")
    assert plan.share_general is not None and plan.interval is not None
    assert 0 < plan.share_general < 1
    low, high = plan.interval
    assert low <= plan.share_general <= high
    assert f"Train with {plan.share_general:.1%} general data (90%: {low:.1%} to {high:.1%})" in facts["printed"][1]
    assert (shop.root / "plan.png").stat().st_size > 0 and "<svg" in (shop.root / "plan.svg").read_text()
    with (shop.root / "pilots/observations.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "annealed"]
    assert len({row["share_general"] for row in rows}) >= 3
    assert all(float(row["tokens"]) < plan.tokens for row in rows), "pilots are shorter than what they are for"


def test_the_planned_run_follows_the_recommendation_and_keeps_it(shop: Workshop) -> None:
    plan = read_recommendation(shop.root / "plan.json")
    kept = read_recommendation(shop.run_dir("planned") / "recommendation.json")
    assert kept.fingerprint == plan.fingerprint
    config = yaml.safe_load((shop.run_dir("planned") / "config.yaml").read_text())
    assert config["plan"]["fingerprint"] == plan.fingerprint
    assert config["train"]["tokens"] == plan.tokens
    assert [stage["share_general"] for stage in config["data"]["stages"]] == [plan.share_general]


def test_pilots_and_continuations_have_batch_rate_warm_up_and_part_of_decay_in_common(shop: Workshop) -> None:
    files = [*(shop.root / "pilots/runs").glob("*/config.yaml"), *(shop.run_dir(name) / "config.yaml" for name in RUNS)]
    found = set()
    for file in files:
        train = yaml.safe_load(file.read_text())["train"]
        schedule, batch = train["schedule"], train["global_batch_tokens"]
        part = schedule.pop("decay_steps") * batch / train["tokens"]
        found.add((batch, train["peak_lr"], part, *sorted(map(str, schedule.items()))))
    assert len(files) > 10 and len(found) == 1


def test_the_report_shows_that_the_recommended_replay_keeps_forgetting_under_a_third_for_a_tenth_of_the_gain(
    shop: Workshop, report: dict[str, Any], runs: dict[str, dict[str, Any]]
) -> None:
    assert report["reference"] == "no_replay" and report["warnings"] == []
    assert runs["no_replay"]["forgetting"] > 0.1
    assert runs["planned"]["forgetting_ratio"] <= 1 / 3
    assert runs["planned"]["gain_given_up"] <= 0.10
    assert runs["planned"]["gain"] > runs["replay_50"]["gain"]
    for name, share in (("replay_05", 0.05), ("replay_50", 0.5)):
        assert runs[name]["share_general_realised"] == pytest.approx(share, abs=0.005)
    assert len({run["tokens"] for run in report["runs"]}) == 1  # an equal budget
    (said,) = (line for line in report["verdict"] if line.startswith(("planned kept", "planned forgot")))
    assert "of the domain gain" in said and said in (shop.root / "report/report.md").read_text()


def test_the_report_holds_the_promise_against_the_end_of_the_planned_run(
    shop: Workshop, report: dict[str, Any], runs: dict[str, dict[str, Any]]
) -> None:
    promised = read_recommendation(shop.root / "plan.json").promise[-1]
    promise = runs["planned"]["promise"]
    assert [name for name, run in runs.items() if run.get("promise")] == ["planned"]
    (said,) = (line for line in report["verdict"] if line.startswith("planned: The final"))
    for group in ("general", "domain"):
        (final,) = (each for each in promise[group]["evaluations"] if each["final"])
        assert final["interval"] == pytest.approx(getattr(promised, f"{group}_interval"), rel=1e-6)
        where = "inside" if final["inside"] else "outside"
        assert f"final {group} loss lies {where} the promised interval" in said
        base = promise[group]["base"]
        assert base["promised"] == pytest.approx(base["measured"], rel=1e-6), "one base, one held-out text"


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
