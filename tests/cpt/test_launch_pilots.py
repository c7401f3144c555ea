"""A grid of pilots as tasks of a scheduler: trunks first, branches after them, then the job that collects."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.launch_pilots import is_pilot_file, slurm_array
from cpt.planner.pilots import load_pilots

Workshop = Any  # the fixtures of tests/conftest.py
STEP = 256  # tokens
SLURM = {"kind": "slurm", "nodes": 2, "time_limit": "1:00:00", "gpus_per_node": 4}


@pytest.fixture
def pilots(workshop: Workshop) -> Path:
    """A grid of two shares and two budgets, on a base of which there is no more than its config."""
    fresh = json.loads(workshop.run_file("fresh").read_text())["model"]["fresh"]
    base = workshop.root / "base_hf"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(fresh))
    template = workshop.run_file("template", {"model.fresh": None, "model.init_from": str(base)})
    section = {"name": "grid", "dir": str(workshop.root / "runs"), "run": str(template), "warmup_steps": 1, "slots": 1}
    grid = {**section, "shares_general": [0.25, 0.5], "budgets": [5 * STEP, 10 * STEP], "nproc": 2}
    file = Path(workshop.root / "pilots.yaml")
    file.write_text(yaml.safe_dump({"pilots": grid}))
    return file


def cluster_file(folder: Path, **fields: Any) -> Path:
    (folder / "cluster.yaml").write_text(json.dumps(fields))
    return folder / "cluster.yaml"


def test_every_pilot_is_a_task_and_branches_wait_for_trunks(pilots: Path) -> None:
    grid = load_pilots(pilots)
    array = slurm_array(grid, pilots, python="python3")
    trunks, branches = ([task.command[-1] for task in wave] for wave in array.waves)
    assert trunks == [pilot.name for pilot in grid.pilots if pilot.trunk is None]
    assert sorted(trunks + branches) == sorted(pilot.name for pilot in grid.pilots)
    for task in (*array.waves[0], *array.waves[1]):
        assert task.command == ("python3", "-m", "cpt.cli", "plan", "pilots", str(pilots), "--only", task.command[-1])
        assert task.run_dir == grid.pilot(task.command[-1]).run_dir
        assert task.run_dir not in task.notes.parents  # a branch is made where no folder is yet
    assert array.last == ("python3", "-m", "cpt.cli", "plan", "pilots", str(pilots)) and array.processes == 2


def test_a_dry_run_shows_the_scripts_and_writes_nothing(workshop: Workshop, pilots: Path) -> None:
    cluster = cluster_file(workshop.root, **SLURM)
    shown = workshop.cpt("launch", pilots, "--cluster", cluster, "--dry-run", "--json")
    assert shown.code == 0, shown.text
    facts = json.loads(shown.out)
    assert facts["world"]["tasks"] == 4 and len(facts["files"]) == 3
    assert sys.executable in next(iter(facts["files"].values())) and "--gpus-per-node=2" in shown.out
    assert not (workshop.root / "runs").exists()


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"kind": "hosts", "hosts": ["a slots=1", "b slots=1"]}, "cpt plan pilots"),
        ({**SLURM, "gpus_per_node": 1}, "a pilot runs on one node"),
    ],
)
def test_what_cannot_hold_a_pilot_is_refused(
    workshop: Workshop, pilots: Path, cluster: dict[str, Any], words: str
) -> None:
    done = workshop.cpt("launch", pilots, "--cluster", cluster_file(workshop.root, **cluster))
    assert done.code == 2 and words in done.err, done.text


def test_a_run_file_is_no_pilot_file(workshop: Workshop, pilots: Path) -> None:
    assert is_pilot_file(pilots)
    assert not is_pilot_file(workshop.run_file("run"))
    assert not is_pilot_file(workshop.root)  # the folder of a run, to go on with it
