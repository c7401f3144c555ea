"""Every YAML under configs/ is complete: a run file loads, a pilot file gives a grid, a model file builds a config of
the size it states, a cluster file names hosts, a suite of benchmarks finds its items.
"""

import json
import re
from pathlib import Path

import pytest
import yaml

from cpt.config import ModelSection, load_config
from cpt.model.build import read_model_config
from cpt.model.size import num_parameters
from cpt.planner.pilot_facts import grid_facts
from cpt.planner.pilots import load_pilots
from launch.cluster import hosts_of, load_cluster

ROOT = Path(__file__).resolve().parents[1]
PILOTS = sorted((ROOT / "configs" / "runs").glob("pilots_*.yaml"))
RUNS = sorted({*(ROOT / "configs" / "runs").glob("*.yaml")} - {*PILOTS})
CLEANING = sorted((ROOT / "configs" / "corpora").glob("clean_*.yaml"))
CLUSTERS = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))
SUITES = sorted((ROOT / "configs" / "evals").glob("*.yaml"))
MODELS = sorted((ROOT / "configs" / "models").glob("*.yaml"))
UNITS = {"M": 1e6, "G": 1e9}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths in run files count from where the command runs


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_run_file_loads_without_the_data_it_names(path: Path) -> None:
    config = load_config(path)
    assert config.train.tokens >= config.train.global_batch_tokens
    assert config.run.dir == ROOT / "runs"


@pytest.mark.parametrize("path", PILOTS, ids=lambda path: path.name)
def test_a_pilot_file_gives_a_grid_within_its_budget(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the base that the template names can be put; of its files the size alone counts
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    base = Path(yaml.safe_load((ROOT / "configs/runs/cpt_cpu.yaml").read_text())["model"]["init_from"])
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(yaml.safe_load((ROOT / "configs/models/llama_tiny.yaml").read_text())))
    grid = load_pilots(path)
    facts = grid_facts(grid)
    assert facts["num_runs"] > facts["num_trunks"] >= 3 and grid.root == tmp_path / "runs" / path.stem
    assert facts["share_of_full"] <= grid.settings.budget_fraction


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_a_model_file_gives_a_config_of_the_size_its_first_line_states(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    config = read_model_config(ModelSection(fresh=yaml.safe_load(text)))
    found = re.search(r"([\d.]+) ([MG]) parameters", text.splitlines()[0])
    assert found, "the first line says how many parameters the model has"
    stated, unit = found.groups()
    parameters = num_parameters(config.to_dict())
    assert parameters is not None and round(parameters / UNITS[unit], 1) == float(stated)


@pytest.mark.parametrize("path", CLEANING, ids=lambda path: path.name)
def test_a_cleaning_file_gives_rules_that_judge_a_document(path: Path) -> None:
    from data_tools.clean.rules import build_step, load_rules
    from data_tools.corpus.document import Document

    chosen = load_rules(path)
    assert chosen[0][0] == "fix_unicode" and chosen[-1][0] == "pii"
    assert build_step(chosen)(Document("")) is not None


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_a_cluster_file_is_whole_and_gives_a_world(path: Path) -> None:
    cluster = load_cluster(path)
    if cluster.kind == "hosts":
        hosts = hosts_of(cluster)
        assert len(hosts) > 1 and len({len(host.slots) for host in hosts}) == 1
    else:
        assert cluster.nodes > 1 and cluster.gpus_per_node > 0


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.name)
def test_a_suite_has_both_groups_and_its_local_items_fit_their_templates(path: Path, tmp_path: Path) -> None:
    from cpt.eval.suite import LocalTask, load_suite
    from cpt.eval.task_files import write_local_task

    suite = load_suite(path)
    assert suite.name == path.stem and {"general", "domain"} <= suite.groups.keys()
    for _, task in suite.tasks():
        assert not isinstance(task, LocalTask) or write_local_task(task, tmp_path).is_file()


def test_there_are_files_of_every_kind() -> None:
    assert SUITES and RUNS and PILOTS and MODELS and CLEANING and len(CLUSTERS) >= 3
