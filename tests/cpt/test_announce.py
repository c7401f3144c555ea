"""What a run says of itself: a recommendation for another size of model is doubted, one for this size is not."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from cpt.announce import size_warnings, trained_parameters
from cpt.config import load_config
from cpt.model.build import LoadedModel, build_model
from cpt.prepare import Prepared, prepare
from cpt.run_model import needs_of

Workshop = Any  # the fixtures of tests/conftest.py


@pytest.fixture
def prepared(workshop: Workshop) -> Prepared:
    workshop.stores()
    return prepare(load_config(workshop.run_file("run")))


@pytest.fixture
def loaded(prepared: Prepared) -> LoadedModel:
    return build_model(prepared.config.model, needs_of(prepared), device=torch.device("cpu"))


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (1.4, False), (0.7, False), (1.6, True), (0.6, True)])
def test_a_recommendation_for_another_size_of_model_is_doubted(
    prepared: Prepared, loaded: LoadedModel, recommend: Any, factor: float, warned: bool
) -> None:
    parameters = loaded.report.parameters
    found = size_warnings(replace(prepared, recommendation=recommend(params=parameters * factor)), loaded)
    assert bool(found) is warned
    assert all(f"--params {parameters}" in text for text in found)


def test_without_a_recommendation_no_size_is_doubted(prepared: Prepared, loaded: LoadedModel) -> None:
    assert size_warnings(prepared, loaded) == []


def test_what_is_trained_and_what_is_frozen_is_told_by_group(loaded: LoadedModel) -> None:
    assert trained_parameters(loaded.model).startswith("trained: embeddings")
    assert "FROZEN" not in trained_parameters(loaded.model)
    model: Any = loaded.model
    weight = model.get_output_embeddings().weight
    weight.requires_grad_(False)
    assert f"{weight.numel():,}" in trained_parameters(loaded.model).partition("FROZEN: ")[2]
