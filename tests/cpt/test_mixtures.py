"""Mixture statements of a run file: what excludes what, caps by source, and the plan that the past and the present make."""

from typing import Any

import pytest

from cpt.config import ConfigError, RunConfig, load_config, to_yaml, validate
from cpt.data.sampler import rows_seen
from cpt.mixtures import plan_mixtures
from cpt.plan import Plan, PlanSource, read_plan, write_plan
from cpt.rundir import DataError

SEQ_LEN = 10


def source(name: str, group: Any, num_rows: int) -> PlanSource:
    return PlanSource(name, group, num_rows, num_rows * SEQ_LEN + 1, f"hash-of-{name}")


SOURCES = {each.name: each for each in (source("web", "general", 5000), source("med", "domain", 300))}
LAW = source("law", "domain", 900)


def config(stores: tuple[str, ...] = ("web", "med"), share: float | None = None, **data: Any) -> RunConfig:
    """100 steps of 20 rows of 10 tokens."""
    return validate(
        {
            "run": {"name": "x"},
            "model": {"fresh": {}},
            "data": {"stores": {name: f"stores/{name}" for name in stores}, "seq_len": SEQ_LEN, **data},
            "replay": {"share_general": share},
            "train": {"tokens": 20_000, "global_batch_tokens": 200, "micro_batch_size": 1, "peak_lr": 0.1},
        }
    )


def refused(**stated: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**stated)
    return str(caught.value)


LINE = {"name": "linear", "points": [{"tokens": 0, "share_general": 0.5}, {"tokens": 20_000, "share_general": 0.1}]}
HOT = {"name": "temperature", "tau": 5}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"mix": LINE, "share": 0.5}, "replay.share_general = 0.5: data.mix (linear) states the share"),
        ({"mix": {**HOT, "scope": "all"}, "share": 0.5}, "data.mix (temperature) states the share of general tokens"),
        ({"mix": HOT, "weights": {"web": 1}}, "data.weights = {'web': 1.0}: data.mix (temperature) derives them"),
        (
            {"mix": HOT, "stages": [{"tokens": 20_000, "share_general": 0.5}]},
            "data.mix = 'temperature': data.stages states the mixture of every stage",
        ),
        ({"mix": {"name": "line"}}, "data.mix"),
        ({"mix": {"tau": 5}}, "data.mix.tau = 5: unknown field"),
        ({"mix": {"name": "temperature"}}, "data.mix.tau: is required"),
        ({"mix": {"name": "temperature", "tau": 0}}, "data.mix.tau = 0"),
        ({"mix": {**HOT, "final_fraction": 1}}, "data.mix.final_fraction = 1"),
        ({"mix": {"name": "linear", "points": [{"tokens": 0, "share_general": 1}]}}, "data.mix.points"),
        ({"mix": {"name": "linear", "points": LINE["points"][::-1]}}, "data.mix.points = [20000, 0]: their tokens"),
        (
            {
                "mix": {
                    "name": "linear",
                    "points": [{"tokens": 0, "share_general": 1}, {"tokens": 20_001, "weights": {}}],
                }
            },
            "data.mix.points.1.share_general: is required",
        ),
        (
            {"mix": {"name": "linear", "points": [*LINE["points"], {"tokens": 20_001, "share_general": 1}]}},
            "lies behind the end, train.tokens (20000)",
        ),
        ({"mix": {"name": "upsample_end", "factors": {"mad": 2}}}, "data.mix.factors = ['mad']: names no source"),
        ({"mix": {"name": "upsample_end", "factors": {}}}, "data.mix.factors"),
        ({"max_epochs_of": {"mad": 2}}, "data.max_epochs_of = ['mad']: names no source"),
        ({"max_epochs_of": {"med": 0}}, "data.max_epochs_of.med = 0"),
        ({"past": [{"until_step": 100, "sources": ["web"]}]}, "stay below the run's 100 steps"),
        ({"past": [{"until_step": n, "sources": ["web"]} for n in (5, 5)]}, "data.past = [5, 5]: until_step must rise"),
        (
            {"past": [{"until_step": 5, "sources": ["web", "law"]}]},
            "data.stores = ['law']: a source that the run has read",
        ),
    ],
)
def test_a_mixture_that_says_two_things_or_none_is_refused_with_field_and_value(
    stated: dict[str, Any], message: str
) -> None:
    assert message in refused(**stated)


def test_every_schedule_survives_the_resolved_run_file() -> None:
    import yaml

    factors = {"name": "upsample_end", "factors": {"med": 1.2}, "scope": "all"}
    for mix in ({"name": "constant"}, LINE, {**HOT, "final_tau": 1}, factors):
        stated = config(mix=mix, max_epochs_of={"med": 2})
        assert validate(yaml.safe_load(to_yaml(stated))) == stated


def test_a_source_may_have_its_own_cap_on_epochs() -> None:
    plan, warnings = plan_mixtures(config(share=0.2, max_epochs_of={"med": 2}), SOURCES)
    assert plan.epochs_by_source()["med"] == 2 and plan.rows_by_source() == {"web": 1400, "med": 600}
    assert "source 'med': wished share 0.8, planned 0.3: the wish is 5.33 epochs, capped at max_epochs 2" in warnings[1]
    plan, _ = plan_mixtures(config(share=0.2, max_epochs=2, max_epochs_of={"med": 9}), SOURCES)
    assert plan.epochs_by_source()["med"] == pytest.approx(1600 / 300)
    with pytest.raises(DataError, match="raise max_epochs"):
        plan_mixtures(config(share=0.2, max_epochs=0.1), SOURCES)


def test_a_schedule_is_capped_as_a_whole_and_says_so_once_per_source() -> None:
    plan, warnings = plan_mixtures(config(mix=LINE, max_epochs_of={"med": 3}), SOURCES)
    assert len(plan.stages) > 10
    assert rows_seen(plan, 100)["med"] <= 900 + len(plan.stages)
    assert len([text for text in warnings if "'med'" in text]) == 1
    assert all(text.startswith("stages 0 to ") for text in warnings)


def test_what_a_run_had_before_and_has_now_make_one_plan_row_by_row() -> None:
    first, _ = plan_mixtures(config(share=0.5), SOURCES)
    now = config(
        ("web", "med", "law"), share=0.1, past=[{"until_step": 30, "sources": ["web", "med"], "share_general": 0.5}]
    )
    plan, _ = plan_mixtures(now, {**SOURCES, "law": LAW})
    assert plan.num_steps == 100 and [stage.end_row for stage in plan.stages] == [600, 2000]
    assert rows_seen(plan, 30) == {**rows_seen(first, 30), "law": 0}
    assert rows_seen(plan, 100)["web"] == 300 + 140
    twice = now.model_copy(
        update={
            "data": now.data.model_copy(
                update={"past": (*now.data.past, now.data.past[0].model_copy(update={"until_step": 60}))}
            )
        }
    )
    longer, _ = plan_mixtures(twice, {**SOURCES, "law": LAW})
    assert [stage.end_row for stage in longer.stages] == [600, 1200, 2000]


def test_stages_and_schedules_of_a_changed_run_are_counted_from_the_start_of_the_run() -> None:
    stages = [{"tokens": 8000, "share_general": 1.0}, {"tokens": 12_000, "share_general": 0.5}]
    past = [{"until_step": 20, "sources": ["web", "med"], "share_general": 0.25, "max_epochs": 9}]
    plan, _ = plan_mixtures(config(stages=stages, past=past), SOURCES)
    assert [(stage.end_row // 20, stage.block_counts[0]) for stage in plan.stages] == [
        (20, 250),
        (40, 1000),
        (100, 500),
    ]


def test_the_plan_file_of_a_schedule_reads_back(tmp_path: Any) -> None:
    plan, _ = plan_mixtures(config(mix=LINE), SOURCES)
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan and isinstance(plan, Plan)


def test_overrides_state_a_schedule_on_the_command_line(workshop: Any) -> None:
    file = workshop.run_file("run")
    assert load_config(file, ["data.mix.name=temperature", "data.mix.tau=3"]).data.mix.name == "temperature"
    assert load_config(file, ["data.max_epochs_of.code=2"]).data.max_epochs_of == {"code": 2.0}


def test_too_many_tokens_are_to_be_lowered_where_they_are_stated() -> None:
    stages = [{"tokens": 10_000, "share_general": 0.0}] * 2
    for data, fix in (({"stages": stages}, "stage 0 asks .* lower the stage's tokens"), ({}, "lower train.tokens")):
        with pytest.raises(DataError, match=fix):
            plan_mixtures(config(("med",), max_epochs=1, **data), SOURCES)
