"""Array jobs on a real Slurm: a grid of pilots and the job that collects it, and a tokenisation with its merge."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.planner.observations import read_observations
from data_tools.train_tokenizer import train_bpe
from launch.record import read_record
from launch.slurm import verbs

Slurm = Any  # the fixture of tests/slurm/conftest.py
Workshop = Any  # the fixtures of tests/conftest.py
STEP = 256  # tokens
CLUSTER = {"kind": "slurm", "nodes": 2, "partition": "main", "time_limit": "10:00", "stop_seconds": 60}


@pytest.fixture(autouse=True)
def ask_this_cluster(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop], slurm: Slurm) -> Workshop:
    """Stores, a base to continue, a grid of two shares and two budgets, and the same grid done without a cluster."""

    def make(shop: Workshop) -> None:
        shop.stores()
        assert shop.cpt("train", shop.run_file("base", {"train.tokens": 2 * STEP})).code == 0
        base = str(shop.run_dir("base") / "checkpoints" / "step_00000002")
        template = shop.run_file("template", {"model.fresh": None, "model.init_from": base})
        for name in ("grid", "alone"):
            fields = {"name": name, "dir": str(shop.root / "runs"), "run": str(template), "evals_per_run": 3}
            grid = {"shares_general": [0.25, 0.5], "budgets": [5 * STEP, 10 * STEP], "warmup_steps": 1, "slots": 2}
            (shop.root / f"{name}.yaml").write_text(yaml.safe_dump({"pilots": {**fields, **grid}}))
        (shop.root / "cluster.yaml").write_text(json.dumps({**CLUSTER, "env": {"OMP_NUM_THREADS": "1"}}))
        done = cpt(shop, "plan", "pilots", shop.root / "alone.yaml")
        assert done.returncode == 0, done.stderr

    return made_once("slurm_arrays", make)


def cpt(shop: Workshop, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpt.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=shop.root, capture_output=True, text=True, timeout=180, check=False)


def test_a_grid_of_pilots_is_an_array_and_its_observations_are_collected_after_it(slurm: Slurm, shop: Workshop) -> None:
    files = ("launch", shop.root / "grid.yaml", "--cluster", shop.root / "cluster.yaml")
    shown = json.loads(cpt(shop, *files, "--dry-run", "--json").stdout)
    assert shown["world"]["tasks"] == 4 and len(shown["files"]) == 3
    grid = shop.root / "runs/grid"
    assert not grid.exists()
    done = cpt(shop, *files)
    assert done.returncode == 0, done.stderr
    launched = read_record(grid)
    trunks, branches, collect = launched.id.split(",")
    waiting = cpt(shop, "launch", "status", grid)
    assert waiting.returncode == 0, waiting.stderr
    slurm.wait("the observations", lambda: slurm.state(collect) in verbs.ENDED)
    said = "\n".join(verbs.logs(launched, follow=False))
    assert [slurm.state(each) for each in (trunks, branches)] == ["COMPLETED,COMPLETED"] * 2, said
    assert slurm.state(collect) == "COMPLETED", said
    assert said.count("job: finished") == 4 and said.count("==> ") >= 5
    with_cluster, without = (
        read_observations(shop.root / f"runs/{name}/observations.csv") for name in ("grid", "alone")
    )
    assert with_cluster.losses.keys() == without.losses.keys()
    assert {k: v.tolist() for k, v in with_cluster.losses.items()} == {k: v.tolist() for k, v in without.losses.items()}


def test_what_waits_of_an_array_leaves_the_queue(slurm: Slurm, shop: Workshop) -> None:
    text = (shop.root / "grid.yaml").read_text().replace("name: grid", "name: never")
    (shop.root / "never.yaml").write_text(text)
    later = {**CLUSTER, "options": {"begin": "now+1hour"}}
    (shop.root / "later.yaml").write_text(json.dumps(later))
    done = cpt(shop, "launch", shop.root / "never.yaml", "--cluster", shop.root / "later.yaml")
    assert done.returncode == 0, done.stderr
    stopped = cpt(shop, "launch", "stop", shop.root / "runs/never")
    assert stopped.returncode == 0 and "cancelled" in stopped.stdout, stopped.stderr
    launched = read_record(shop.root / "runs/never")
    slurm.wait("an empty queue", lambda: set(slurm.state(launched.id).split(",")) == {"CANCELLED"})


def test_a_wrong_partition_is_told_by_the_command_and_nothing_is_left_in_the_queue(
    slurm: Slurm, shop: Workshop
) -> None:
    (shop.root / "wrong.yaml").write_text(json.dumps({**CLUSTER, "partition": "nowhere"}))
    for file in ("grid.yaml", "template.yaml"):
        refused = cpt(shop, "launch", shop.root / file, "--cluster", shop.root / "wrong.yaml")
        assert refused.returncode == 2 and "invalid partition specified: nowhere" in refused.stderr, refused.stderr
    assert "nowhere" not in slurm.ask("squeue", "--noheader", "--format=%P").stdout


def test_a_tokenisation_in_many_tasks_makes_the_store_of_one(slurm: Slurm, tmp_path: Path) -> None:
    for number in range(3):
        texts = [f"text {number} {line} " + "some words " * 5 for line in range(20)]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe(["text some words 0123456789"], out=tmp_path / "tokenizer", vocab_size=300)

    def data(*options: str, out: str) -> None:
        paths = {"input": "*.jsonl", "tokenizer": "tokenizer", "out": out}
        verb = ["tokenize", *(f"--{name}={tmp_path / value}" for name, value in paths.items())]
        labels = ["--source=s", "--domain=d", "--heldout-fraction=0.2"]
        command = [sys.executable, "-m", "cpt.cli", "data", *options, *verb, *labels]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr

    data(out="whole")
    cluster = ("--option=partition=main", "--option=time=00:05:00", "--option=mem-per-cpu=1G")
    data("submit", "--executor=slurm", "--tasks=3", *cluster, out="split")

    def hashes(name: str) -> list[str]:
        manifests = [tmp_path / name / split / "manifest.json" for split in ("train", "heldout")]
        return [json.loads(path.read_text())["content_hash"] for path in manifests if path.exists()]

    slurm.wait("the merged store", lambda: len(hashes("split")) == 2)
    assert hashes("split") == hashes("whole")
