"""Pilot runs: a branch is what its run alone would have been, and a grid survives signals, failures and repetition."""

import fcntl
import json
import shutil
import signal
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cpt.planner import pilot_folders
from cpt.planner.pilot_facts import export_jobs, grid_facts, render_grid
from cpt.planner.pilot_folders import drop_checkpoints, is_finished, make_branch, write_run_files
from cpt.planner.pilot_runs import environment_of, run_only, run_pilots
from cpt.planner.pilots import Grid, Pilot, load_pilots
from cpt.problems import ConfigError
from cpt.rundir import DataError, RunDir

Workshop = Any  # the fixtures of tests/conftest.py
STEP = 256  # tokens


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    """Stores, and ``base``: a run of two steps whose checkpoint the pilots continue."""

    def make(shop: Workshop) -> None:
        shop.stores()
        done = shop.cpt("train", shop.run_file("base", {"train.tokens": 2 * STEP}))
        assert done.code == 0, done.text

    return made_once("pilots", make)


def base_of(shop: Workshop) -> Path:
    return Path(shop.run_dir("base") / "checkpoints" / "step_00000002")


def pilot_file(shop: Workshop, name: str, **fields: Any) -> Path:
    """A pilot file of one share and budgets of 5 and 10 steps, unless ``fields`` say otherwise. None removes a field."""
    template = shop.run_file(f"{name}_template", {"model.fresh": None, "model.init_from": str(base_of(shop))})
    section = {"name": name, "dir": str(shop.root / "runs"), "run": str(template), "shares_general": [0.25]}
    section |= {"budgets": [5 * STEP, 10 * STEP], "evals_per_run": 3, "warmup_steps": 1, **fields}
    file = Path(shop.root / f"{name}.yaml")
    file.write_text(yaml.safe_dump({"pilots": {key: value for key, value in section.items() if value is not None}}))
    return file


def grid_of(shop: Workshop, name: str, **fields: Any) -> Grid:
    return load_pilots(pilot_file(shop, name, **fields))


def train_in_process(shop: Workshop, grid: Grid, pilot: Pilot) -> None:
    """As the grid would, without the seconds of a new process."""
    write_run_files(grid)
    arguments = pilot_folders.trainer_arguments(grid, pilot)
    done = shop.cpt(*(["resume", arguments[1]] if arguments[0] == "--resume" else ["train", *arguments]))
    assert done.code == 0, done.text


def losses(run_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in RunDir(run_dir).metrics.read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def run_quietly(grid: Grid, *, terminal: bool = False) -> tuple[int, str]:
    out = StringIO()
    code = run_pilots(grid, console=Console(file=out, width=200, force_terminal=terminal))
    return code, out.getvalue()


# A branch against the run that trained alone


def test_a_branch_ends_bit_identical_to_the_run_that_trained_alone(shop: Workshop) -> None:
    grid = grid_of(shop, "honest")
    trunk, branch = grid.pilots
    assert (trunk.trunk, branch.trunk, branch.first_step, branch.num_steps) == (None, trunk.name, 4, 5)
    train_in_process(shop, grid, trunk)
    train_in_process(shop, grid, branch)
    alone = shop.cpt("train", grid.run_file(branch), "run.name=alone", f"run.dir={shop.root / 'runs'}")
    assert alone.code == 0, alone.text
    assert list(losses(branch.run_dir)) == [5]  # it computes its decay alone
    assert losses(branch.run_dir)[5] == losses(trunk.run_dir)[5] == losses(shop.run_dir("alone"))[5]
    ends = [RunDir(folder).eval_file(5) for folder in (branch.run_dir, shop.run_dir("alone"))]
    assert ends[0].read_text() == ends[1].read_text()


def test_a_branch_at_a_floor_of_1_repeats_its_trunk_so_rows_weights_and_moments_are_the_trunks(shop: Workshop) -> None:
    grid = grid_of(shop, "flat", min_lr_ratio=1.0, decay_share=0.6, budgets=[8 * STEP, 16 * STEP])
    trunk, branch = grid.pilots
    train_in_process(shop, grid, trunk)
    train_in_process(shop, grid, branch)
    whole, part = losses(trunk.run_dir), losses(branch.run_dir)
    assert list(part) == [4, 5, 6, 7, 8]
    assert part == {step: whole[step] for step in part}


def test_a_branch_of_a_capped_trunk_goes_on_with_the_shares_that_the_trunk_was_given(shop: Workshop) -> None:
    """Code is capped for 40 steps, not for 10: planned for itself the branch would see other rows."""
    # 512 rows of code in the store; 0.42 epochs of it are 215 of the trunk's 320 rows, where 240 are wished for.
    grid = grid_of(shop, "capped", overrides={"data.max_epochs": 0.42}, budgets=[10 * STEP, 40 * STEP])
    trunk, branch = grid.pilots
    train_in_process(shop, grid, trunk)
    train_in_process(shop, grid, branch)
    plans = [json.loads(RunDir(pilot.run_dir).plan.read_text()) for pilot in (trunk, branch)]
    assert plans[0]["stages"][0]["block_counts"] == plans[1]["stages"][0]["block_counts"] != [250, 750]
    assert losses(branch.run_dir)[9] == losses(trunk.run_dir)[9]


def test_a_branch_without_its_trunk_is_refused_and_leaves_nothing(shop: Workshop) -> None:
    grid = grid_of(shop, "early")
    with pytest.raises(DataError, match=r"branches off early_general0\.25_10steps.*train the trunk first"):
        make_branch(grid, grid.pilots[1])
    assert not grid.pilots[1].run_dir.exists()
    with pytest.raises(DataError, match="train the trunk first"):
        run_only(grid, grid.pilots[1].name)


def test_checkpoints_stay_while_a_branch_waits_and_go_when_it_has_its_own(shop: Workshop) -> None:
    grid = grid_of(shop, "lean", budgets=[5 * STEP, 10 * STEP, 20 * STEP])
    trunk = grid.pilots[0]
    train_in_process(shop, grid, trunk)
    folder = RunDir(trunk.run_dir).checkpoints
    assert sorted(path.name[-2:] for path in folder.iterdir()) == ["04", "08", "12", "16", "20"]
    drop_checkpoints(grid)
    assert [path.parent.name[-2:] for path in sorted(folder.glob("*/COMPLETE"))] == ["04", "08"]
    for branch in grid.branches(trunk):
        make_branch(grid, branch)
    drop_checkpoints(grid)
    assert not list(folder.glob("*/COMPLETE")) and not list(folder.glob("*/*.safetensors"))
    assert list(folder.glob("*/*")) == [folder / "step_00000020" / "meta.json"]  # states the model's size
    train_in_process(shop, grid, grid.branches(trunk)[0])  # the branch's files are its own


# A grid in processes


def test_told_to_stop_it_saves_and_ends_with_143_and_the_same_call_finishes(shop: Workshop) -> None:
    grid = grid_of(shop, "stopped", budgets=[200 * STEP])
    program = "import sys; from pathlib import Path; from cpt.planner.pilots import load_pilots; "
    program += "from cpt.planner.pilot_runs import run_pilots; sys.exit(run_pilots(load_pilots(Path(sys.argv[1]))))"
    process = shop.start_command([sys.executable, "-c", program, str(grid.file)])
    (trunk,) = grid.pilots
    shop.wait_for_step(trunk.run_dir.relative_to(shop.root / "runs"), 5, process)
    with pytest.raises(DataError, match="is writing here"):
        run_pilots(grid)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert "0 of 1 pilots are finished; the same command goes on" in out
    events = [json.loads(line)["event"] for line in RunDir(trunk.run_dir).events.read_text().splitlines()]
    assert events[-1] == "sigterm"
    code, out = run_quietly(grid, terminal=True)
    assert code == 0, out
    assert "1 of 1 finished" in out and "200/200" in out  # the last state of the live table
    assert json.loads(grid.facts.read_text())["peak_lr"] == 1e-2
    assert list(losses(trunk.run_dir)) == list(range(1, 201))  # no step was trained twice
    lines = grid.observations.read_text().splitlines()
    assert lines[1].startswith("base:base/step_00000002,") and lines[-1].endswith(f",annealed,{trunk.name}")
    code, out = run_quietly(grid)
    assert code == 0 and "running" not in out  # all of it is finished
    assert run_only(grid, trunk.name) == 0


def test_a_failing_pilot_is_told_with_its_log_and_the_others_finish(shop: Workshop) -> None:
    broken = shop.root / "broken" / "step_00000002"
    shutil.copytree(base_of(shop), broken)
    shard = next(broken.glob("shard_*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    grid = grid_of(shop, "failing", bases=[str(broken), str(base_of(shop))])
    bad, orphan, *good = grid.pilots
    train_in_process(shop, grid, good[0])
    code, out = run_quietly(grid)
    assert code == 2 and f"{bad.name} failed with exit code 2: {grid.log(bad)}" in out and "promises" in out
    assert "2 of 4 pilots are finished" in out and f"{orphan.name}: no trunk" in out
    assert all(is_finished(pilot) for pilot in good) and not orphan.run_dir.exists()
    assert {line.split(",")[0] for line in grid.observations.read_text().splitlines()[2:]} == {p.name for p in good}


def test_a_run_that_outlived_its_call_is_seen_by_its_lock(shop: Workshop) -> None:
    pilot = grid_of(shop, "held").pilots[0]
    assert not pilot_folders.is_held(pilot)
    pilot.run_dir.mkdir(parents=True)
    with (pilot.run_dir / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert pilot_folders.is_held(pilot)
    assert not pilot_folders.is_held(pilot)


def test_a_slot_gets_its_part_of_the_cores_and_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert environment_of(0, slots=10**6)["OMP_NUM_THREADS"] == "1"
    assert environment_of(1, slots=2, gpus=(4, 6))["CUDA_VISIBLE_DEVICES"] == "6"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment_of(0, slots=2)["OMP_NUM_THREADS"] == "3"


# The file and the grid


def test_the_grid_states_its_cost_and_the_learning_rate_it_holds_for(shop: Workshop) -> None:
    fields = {"budgets": None, "full": {"tokens": 1_000_000}, "budget_fraction": 0.1, "shares_general": [0.0, 0.5]}
    facts = grid_facts(grid_of(shop, "told", **fields))
    assert facts["num_runs"] == 6 and facts["num_trunks"] == 2
    assert facts["flops"] == sum(run["flops"] for run in facts["runs"]) <= 0.1 * facts["full_flops"]
    assert facts["flops"] == 6 * facts["runs"][0]["params"] * facts["trained_tokens"]
    assert facts["share_of_full"] == pytest.approx(0.1, rel=0.1)
    assert facts["peak_lr"] == 1e-2 and "run the pilots again" in facts["lr_rule"]
    out = StringIO()
    Console(file=out, width=250).print(render_grid(facts))
    assert "of the full run" in out.getvalue() and "peak learning rate 0.01" in out.getvalue()


def test_a_pilot_differs_from_the_template_only_in_what_it_must(shop: Workshop) -> None:
    grid = grid_of(shop, "alike", overrides={"train.peak_lr": 1e-5}, seeds=[1, 2])
    template, pilot = (config.model_dump(mode="json") for config in (grid.template, grid.pilots[0].config))
    changed = {f"{s}.{f}" for s in template for f in template[s] or {} if template[s][f] != pilot[s][f]}
    assert changed == {
        *("run.name", "run.dir", "run.seed", "replay.share_general", "train.tokens", "train.schedule"),
        *("eval.at_steps", "checkpoint.every_steps", "checkpoint.keep_last"),
    }
    assert pilot["train"]["peak_lr"] == 1e-5
    assert [pilot.config.run.seed for pilot in grid.pilots] == [1, 1, 2, 2]


def test_exported_jobs_name_their_trunk_and_end_with_the_one_that_collects(shop: Workshop) -> None:
    grid = grid_of(shop, "jobs")
    trunk, branch, collect = export_jobs(grid)
    assert trunk["after"] == [] and branch["after"] == [trunk["name"]]
    assert collect["after"] == [trunk["name"], branch["name"]]
    assert trunk["command"][1:] == ["-m", "cpt.cli", "plan", "pilots", str(grid.file), "--only", trunk["name"]]
    assert grid.run_file(grid.pilots[1]).is_file() and json.dumps([trunk, branch, collect])


def test_every_fault_of_the_file_and_of_the_template_is_told_at_once(shop: Workshop) -> None:
    with pytest.raises(ConfigError) as caught:
        grid_of(shop, "bad", share_general=[0.1], decay_share=2, overrides={"train.peak_lr": 7, "data.seq_len": "x"})
    text = str(caught.value)
    assert "pilots.share_general" in text and "did you mean pilots.shares_general?" in text
    assert "pilots.decay_share" in text and "bad_template.yaml: train.peak_lr" in text and "data.seq_len" in text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"budgets": None}, "give either the token budgets or the full run"),
        ({"full": {"tokens": 10**6}}, "give either the token budgets or the full run"),
        ({"shares_general": [0.1, 0.1]}, "names one value twice"),
        ({"bases": ["hub/model"]}, "its number of parameters cannot be known here"),
        ({"warmup_steps": 4}, "the smallest budget has only 4 steps before its decay"),
        ({"budgets": None, "full": {"tokens": 1000}}, "is less than the smallest grid costs"),
        ({"nproc": 2}, "runs of several processes take all GPUs"),
        ({"gpus": [0]}, "names fewer GPUs than there are slots"),
        ({"overrides": {"model.init_from": None, "model.fresh": {}}}, "pilots continue a model"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(shop: Workshop, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grid_of(shop, "refused", **fields)
    assert said in str(caught.value)


def test_a_folder_of_other_pilots_is_not_taken_for_these(shop: Workshop) -> None:
    grid = grid_of(shop, "twice")
    train_in_process(shop, grid, grid.pilots[0])
    other = grid_of(shop, "twice", overrides={"train.peak_lr": 5e-3})
    with pytest.raises(ConfigError) as caught:
        run_pilots(other)
    assert "holds a run with another train.peak_lr" in str(caught.value)
    assert "choose another name" in str(caught.value)


def test_an_unknown_run_of_the_grid_is_refused_with_the_known_ones(shop: Workshop) -> None:
    grid = grid_of(shop, "named")
    with pytest.raises(ConfigError, match=r"--only.*named_general0\.25_10steps"):
        run_only(grid, "nobody")


def test_runs_do_not_inherit_the_rendezvous_of_the_process_that_starts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not {"MASTER_PORT", "WORLD_SIZE"} & environment_of(0, slots=2).keys()
