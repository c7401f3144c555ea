"""What a plan will feed, told before it does: the numbers are the sampler's, the picture names everything."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cpt.data.sampler import locate, rows_seen
from cpt.plan import Plan, PlanSource, StageWish, build_plan
from cpt.planner.picture_mix import draw_mix
from cpt.planner.picture_style import save_figure
from cpt.planner.preview_mix import mix_facts, reads_in_words, render_mix

Workshop = Any  # the fixtures of tests/conftest.py
SEQ_LEN = 10


def source(name: str, group: Any, num_rows: int) -> PlanSource:
    return PlanSource(name, group, num_rows, num_rows * SEQ_LEN + 1, f"hash-of-{name}")


def plan_of(*wishes: StageWish, med_rows: int = 1000) -> Plan:
    sources = [source("web", "general", 10**5), source("med", "domain", med_rows), source("law", "domain", 10**4)]
    plan, _ = build_plan(sources, wishes, seed=3, seq_len=SEQ_LEN, global_batch_rows=100, max_epochs=20)
    return plan


def caps(plan: Plan) -> dict[str, float]:
    return {each.name: 20.0 for each in plan.sources}


def printed(facts: Any, width: int = 160) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(render_mix(facts))
    return console.file.getvalue()  # type: ignore[attr-defined]


TWO_STAGES = (
    StageWish(60_000, 0.5, {"med": 1, "law": 1}),
    StageWish(40_000, 0.1, {"med": 2, "law": 1}),
)


def test_shares_epochs_and_repeats_are_those_of_the_rows_that_will_be_read() -> None:
    plan = plan_of(*TWO_STAGES)
    facts = mix_facts(plan, caps(plan))
    at = locate(plan, np.arange(plan.num_rows))
    for index, told in enumerate(facts["sources"]):
        rows = int((at.source_index == index).sum())
        assert told["tokens_planned"] == rows * SEQ_LEN and told["share"] == rows / plan.num_rows
        times = np.bincount(at.row_in_source[at.source_index == index], minlength=told["rows"])
        assert (times == told["passes"] + 1).sum() == told["rows_once_more"]
        assert (times == told["passes"]).sum() == told["rows"] - told["rows_once_more"]
        assert told["epochs_seen"][-1] == pytest.approx(told["epochs"], abs=1e-6)
    med = facts["sources"][1]
    assert reads_in_words(med) == f"all 3 times, {med['rows_once_more'] / 10:.1f}% once more"
    assert med["shares"][0] == pytest.approx(0.25, abs=0.02) and med["shares"][-1] == pytest.approx(0.6, abs=0.02)
    seen = rows_seen(plan, med["repeats_after_tokens"] // 1000)["med"]
    assert seen <= 1000 < rows_seen(plan, med["repeats_after_tokens"] // 1000 + 2)["med"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=150))
def test_whatever_the_stages_the_windows_fill_the_run_and_shares_add_up(stages: list[tuple[int, float]]) -> None:
    plan = plan_of(*(StageWish(steps * 1000, share) for steps, share in stages), med_rows=10**5)
    facts = mix_facts(plan, caps(plan))
    assert facts["at_tokens"][0] == 0 and facts["at_tokens"][-1] == facts["tokens"]
    assert len(facts["at_tokens"]) <= 2 * 97 and facts["at_tokens"] == sorted(set(facts["at_tokens"]))
    shares = np.array([told["shares"] for told in facts["sources"]])
    assert shares.sum(axis=0) == pytest.approx(1, abs=1e-5)
    given = (shares * np.diff(facts["at_tokens"])).sum(axis=1)
    assert given == pytest.approx([told["tokens_planned"] for told in facts["sources"]], abs=facts["tokens"] * 1e-5)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (0, "nothing"),
        (30, "3.0% once"),
        (1000, "all once"),
        (2500, "all twice, 50.0% once more"),
        (3000, "all 3 times"),
    ],
)
def test_how_often_rows_are_read_is_said_in_words(rows: int, words: str) -> None:
    passes, more = divmod(rows, 1000)
    assert reads_in_words({"rows": 1000, "passes": passes, "rows_once_more": more}) == words


def test_the_table_shows_the_way_of_each_share_and_warns_of_worn_out_text() -> None:
    plan = plan_of(StageWish(100_000, 0.2, {"med": 3, "law": 1}))
    text = printed(mix_facts(plan, caps(plan), done_step=50, changes=[20], warnings=["mind the gap"]))
    assert "█" * 32 in text and "20.0%" in text and "6.00" in text and "all 6 times" in text
    assert "source 'med' is read 6.0 times: 60 k tokens worth about 52" in text
    assert "mixture changed after step 20" in text and "done and saved: 50,000 tokens (50.0%)" in text
    assert "warning: mind the gap" in text


def test_a_source_whose_name_looks_like_markup_keeps_it() -> None:
    odd = source("web[red]", "general", 10**5)
    plan, _ = build_plan([odd], [StageWish(1000, 1.0)], seed=3, seq_len=10, global_batch_rows=100, max_epochs=1)
    assert "web[red]" in printed(mix_facts(plan, caps(plan)))


def test_the_picture_is_the_same_bytes_every_time_and_names_every_source(tmp_path: Path) -> None:
    plan = plan_of(*TWO_STAGES)
    facts = mix_facts(plan, caps(plan), done_step=30, changes=[20, 30])
    first, again = (save_figure(draw_mix(facts), tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    svg = first[1].read_text()
    assert all(text in svg for text in ("law", "med", "web", "done, mixture changed", "read again", "nearly free"))


def test_one_step_and_a_source_that_is_never_read_can_be_drawn(tmp_path: Path) -> None:
    plan = plan_of(StageWish(1000, 1.0))
    facts = mix_facts(plan, caps(plan))
    assert "nothing" in printed(facts)
    save_figure(draw_mix(facts), tmp_path / "one")


@pytest.fixture(scope="module")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    return made_once("preview", lambda shop: shop.stores() and None)


def test_a_run_file_is_previewed_and_drawn_without_training(shop: Workshop, tmp_path: Path) -> None:
    file = shop.run_file("preview", {"train.tokens": 100 * 256})
    mix = "data.mix={name: linear, points: [{tokens: 0, share_general: 0.8}, {tokens: 25600, share_general: 0.2}]}"
    done = shop.cpt("data", "preview-mix", file, mix, "--out", tmp_path / "mix.png", "--json")
    facts = json.loads(done.out)
    assert done.code == 0 and facts["num_stages"] == 8 and facts["share_general"] == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "mix.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "mix.svg").is_file()
    assert not shop.run_dir("preview").exists()
    assert "prose" in shop.cpt("data", "preview-mix", file).out
    refused = shop.cpt("data", "preview-mix", file, "data.mix={name: linnear}")
    assert refused.code == 2 and "data.mix" in refused.err


def test_a_run_folder_shows_what_is_done_and_may_be_given_another_mixture(shop: Workshop, tmp_path: Path) -> None:
    done = shop.cpt("train", shop.run_file("begun", {"train.tokens": 8 * 256, "checkpoint.every_steps": 4}))
    assert done.code == 0, done.text
    run = shop.run_dir("begun")
    (run / "checkpoints" / "step_00000008" / "COMPLETE").unlink()
    kept = (run / "plan.json").read_bytes()
    change = ("replay.share_general=0.75", "data.max_epochs_of.code=3")
    facts = json.loads(shop.cpt("data", "preview-mix", run, *change, "--json").out)
    assert facts["done_tokens"] == 4 * 256 and facts["changes"] == [{"step": 4, "tokens": 4 * 256}]
    assert [told["max_epochs"] for told in facts["sources"]] == [4.0, 3.0]
    assert (run / "plan.json").read_bytes() == kept
    apply = ("data", "preview-mix", run, *change, "--apply")
    for more in (("train.peak_lr=1",), ("checkpoint.keep_last=3",), ("--out", tmp_path / "none" / "mix.png")):
        assert shop.cpt(*apply, *more).code == 2 and (run / "plan.json").read_bytes() == kept
    done = shop.cpt(*apply)
    last = "".join(done.out.split("\n")[-3:]) if done.code == 0 else done.text
    assert f"applied from step 4 on; go on with: cpt resume {run}" in last
    assert (run / "plan.json").read_bytes() != kept
    applied = json.loads(shop.cpt("data", "preview-mix", run, "--json").out)
    assert applied["fingerprint"] == facts["fingerprint"] and applied["changes"] == facts["changes"]
    refused = shop.cpt("data", "preview-mix", run, "train.peak_lr=1")
    assert refused.code == 2 and "train.peak_lr" in refused.err
