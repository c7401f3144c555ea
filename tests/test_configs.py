"""Every YAML under configs/ is complete: a run file loads, a model file builds a config of the size it states."""

import re
from pathlib import Path

import pytest
import yaml

from cpt.config import ModelSection, load_config
from cpt.model.build import read_model_config
from cpt.model.size import num_parameters

ROOT = Path(__file__).resolve().parents[1]
RUNS = sorted((ROOT / "configs" / "runs").glob("*.yaml"))
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


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_a_model_file_gives_a_config_of_the_size_its_first_line_states(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    config = read_model_config(ModelSection(fresh=yaml.safe_load(text)))
    found = re.search(r"([\d.]+) ([MG]) parameters", text.splitlines()[0])
    assert found, "the first line says how many parameters the model has"
    stated, unit = found.groups()
    parameters = num_parameters(config.to_dict())
    assert parameters is not None and round(parameters / UNITS[unit], 1) == float(stated)


def test_there_are_run_files_and_model_files() -> None:
    assert RUNS and MODELS
