"""Observation rows from run folders: which evaluations count, in which phase, and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.plan import Plan, PlanSource, Stage, write_plan
from cpt.planner.base_model import base_name, params_of_base
from cpt.planner.observe import append_observations, observe_runs, write_observations
from cpt.rundir import DataError, RunDir

WSD = {"name": "wsd", "warmup_steps": 2, "decay_steps": 4}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}  # 744 parameters, the example of cpt.model.size
Run = dict[str, Any]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "small_hf"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run_folder(
    base: Path,
    name: str,
    *,
    schedule: dict[str, Any] | None = None,
    at_steps: tuple[int, ...] = (0, 1, 2, 8, 16, 18, 20),
    general: float = 3.0,
    sources: dict[str, str] | None = None,
    shares: tuple[tuple[int, ...], ...] = ((1, 3),),
) -> Path:
    """A run of 20 steps of 80 tokens: what is read of it, and no more. The domain loss at step n is 2 - n / 100."""
    folder = base.parents[1] / "runs" / name
    rundir = RunDir(folder)
    rundir.evals.mkdir(parents=True)
    groups = sources or {"web": "general", "med": "domain"}
    config = {
        "run": {"name": name, "seed": 7},
        "model": {"init_from": str(base)},
        "train": {"peak_lr": 0.01, "schedule": schedule or WSD},
    }
    rundir.config.write_text(yaml.safe_dump(config))
    ends = [80 * (index + 1) // len(shares) for index in range(len(shares))]
    stages = tuple(Stage(end - 80 // len(shares), end, counts) for end, counts in zip(ends, shares, strict=True))
    plan_sources = tuple(PlanSource(one, group, 1000, 20_000, "x") for one, group in groups.items())  # type: ignore[arg-type]
    write_plan(rundir.plan, Plan(7, 20, 4, 4, plan_sources, stages))
    rundir.events.write_text('{"time": 1.0, "step": 20, "event": "finish"}\n')
    rundir.metrics.write_text('{"step": 20, "loss": 1.0}\n')
    for step in at_steps:
        losses = {"general": general + step / 100, "domain": 2 - step / 100}
        record = {
            "tokens_seen": 80 * step,
            "sources": {one: {"group": group, "loss": losses[group]} for one, group in groups.items()},
            "groups": {group: {"loss": loss} for group, loss in losses.items() if group in groups.values()},
        }
        rundir.eval_file(step).write_text(json.dumps(record))
    return folder


def test_a_wsd_run_gives_its_base_its_constant_phase_and_its_end(base: Path) -> None:
    first, *rows = observe_runs([run_folder(base, "a")])
    assert first == {
        **{"run": "base:models/small_hf", "base": "models/small_hf", "params": 744, "tokens": 0},
        **{"loss_general": 3.0, "loss_domain": 2.0},
    }
    assert [(row["tokens"] // 80, row["phase"]) for row in rows] == [
        *((2, "stable"), (8, "stable"), (16, "stable"), (20, "annealed"))
    ]  # step 1 is in the warm-up, 18 in the decay
    assert rows[0] == {
        **{"run": "a", "base": "models/small_hf", "params": 744, "tokens": 160, "phase": "stable"},
        **{
            "share_general": 0.25,
            "share_domain": 0.75,
            "loss_general": 3.02,
            "loss_domain": 1.98,
            "lr": 0.01,
            "seed": 7,
        },
    }


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "rewarm_cosine", "warmup_steps": None}, [(20, "annealed")]),
        ({"name": "linear_to_zero"}, [(20, "annealed")]),
        ({"name": "constant", "warmup_steps": 8}, [(8, "stable"), (16, "stable"), (18, "stable"), (20, "stable")]),
        ({"name": "wsd", "decay_steps": 20}, [(20, "annealed")]),
    ],
)
def test_the_schedule_decides_which_evaluations_count(
    base: Path, schedule: dict[str, Any], expected: list[tuple[int, str]]
) -> None:
    rows = observe_runs([run_folder(base, "a", schedule=schedule)])
    assert [(row["tokens"] // 80, row["phase"]) for row in rows if row["tokens"]] == expected


def test_an_unfinished_cosine_run_gives_its_base_alone(base: Path) -> None:
    rows = observe_runs([run_folder(base, "a", schedule={"name": "rewarm_cosine"}, at_steps=(0, 5, 10))])
    assert [row["tokens"] for row in rows] == [0]


def test_a_loss_that_is_not_finite_is_left_out(base: Path) -> None:
    folder = run_folder(base, "a")
    file = RunDir(folder).eval_file(8)
    record = json.loads(file.read_text())
    record["groups"]["domain"]["loss"] = None
    file.write_text(json.dumps(record))
    assert [row["tokens"] // 80 for row in observe_runs([folder])] == [0, 2, 16, 20]


def test_more_than_one_source_of_a_group_get_columns_of_their_own(base: Path) -> None:
    sources = {"web": "general", "med": "domain", "law": "domain"}
    row = observe_runs([run_folder(base, "a", sources=sources, shares=((1, 1, 2),))])[-1]
    assert (row["share_general"], row["share_domain"], row["share_law"]) == (0.25, 0.75, 0.5)
    assert row["loss_law"] == row["loss_med"] == row["loss_domain"] == 1.8


def test_a_source_that_is_called_like_a_group_does_not_take_its_column(base: Path) -> None:
    sources = {"general": "domain", "web": "general", "law": "domain"}
    row = observe_runs([run_folder(base, "a", sources=sources, shares=((3, 1, 0),))])[-1]
    assert (row["share_general"], row["loss_general"]) == (0.25, 3.2)


def test_runs_of_one_base_share_its_row(base: Path) -> None:
    rows = observe_runs([run_folder(base, "a"), run_folder(base, "b")])
    assert [row["run"] for row in rows].count("base:models/small_hf") == 1
    assert {row["run"] for row in rows} == {"a", "b", "base:models/small_hf"}


def test_runs_whose_base_was_measured_on_other_text_are_refused(base: Path) -> None:
    with pytest.raises(DataError, match=r"runs/b: loss_general of the base .* is 3\.1000, .* 3\.0000; .*same stores"):
        observe_runs([run_folder(base, "a"), run_folder(base, "b", general=3.1)])


def test_a_mixture_that_changes_on_the_way_is_refused(base: Path) -> None:
    with pytest.raises(DataError, match=r"share_general changes on the way \(0\.25 -> 0\.75\)"):
        observe_runs([run_folder(base, "a", shares=((1, 3), (3, 1)))])


def test_a_model_of_unknown_size_is_refused_unless_a_checkpoint_states_it(base: Path) -> None:
    folder = run_folder(base, "a")
    (base / "config.json").unlink()
    with pytest.raises(DataError, match="the number of parameters is not known"):
        observe_runs([folder])
    checkpoint = RunDir(folder).checkpoint(20)
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text(json.dumps({"parameter_shapes": {"a": [3, 4], "b": [5]}}))
    assert observe_runs([folder])[0]["params"] == 17


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        observe_runs([tmp_path / "nothing"])


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_appending_replaces_the_rows_of_the_same_runs_and_keeps_columns_and_bases(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "observations.csv"
    mine = {"run": "b0", "base": "models/small_hf", "params": 744, "tokens": 0, "loss_general": 3.0, "loss_domain": 2.0}
    old = {"run": "a", "base": "models/small_hf", "params": 744, "tokens": 99, "loss_general": 9.0, "note": "kept"}
    other = {**old, "run": "c"}
    write_observations(path, [mine, old, other])
    count = append_observations(path, observe_runs([run_folder(base, "a")]))
    rows = read(path)
    assert [row["run"] for row in rows] == ["b0", "c", "a", "a", "a", "a"] and count == 6
    assert rows[1]["note"] == "kept" and rows[2]["note"] == "" and rows[0]["share_general"] == ""
    assert append_observations(path, observe_runs([run_folder(base, "d")])) == 10


def test_appending_runs_that_were_measured_on_other_text_is_refused_and_changes_nothing(
    base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "observations.csv"
    append_observations(path, observe_runs([run_folder(base, "a")]))
    before = path.read_text()
    with pytest.raises(DataError, match=r"observations\.csv: loss_general of the base"):
        append_observations(path, observe_runs([run_folder(base, "b", general=3.5)]))
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [("run,base\na,b\n", "no column 'params'"), ("run,base,params,tokens\na,b,1,2,3\n", "line 2 has more cells")],
)
def test_a_file_of_another_kind_is_not_appended_to(base: Path, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "observations.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        append_observations(path, observe_runs([run_folder(base, "a")]))


@pytest.mark.parametrize(
    ("init_from", "name"),
    [
        ("/data/quickstart/base_hf", "quickstart/base_hf"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("/data/runs/A/checkpoints/step_00000500", "A/step_00000500"),
        (None, "fresh"),
    ],
)
def test_a_base_is_called_by_the_end_of_its_path(init_from: str | None, name: str) -> None:
    assert base_name(init_from) == name


def test_the_size_of_a_hub_name_is_not_known_here() -> None:
    assert params_of_base("someone/some-model") is None
