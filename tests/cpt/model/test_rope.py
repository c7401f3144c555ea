"""The base of rotary positions: the published numbers, what it may not be changed for, and that it stays."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from cpt.config import ConfigError, ModelSection
from cpt.model.build import Needs, build_from_config, build_model
from cpt.model.rope import change_base, has_rotary_positions

TINY = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def section(**changes: Any) -> ModelSection:
    return ModelSection(fresh=TINY | changes.pop("fresh", {}), **changes)


@pytest.mark.parametrize(
    ("base", "frequencies"),
    [(1e4, {1: 0.865964, 32: 0.01, 63: 1.154782e-4}), (5e5, {1: 0.814617, 32: 0.00141421, 63: 2.455141e-6})],
)
def test_frequencies_are_the_published_ones(base: float, frequencies: dict[int, float]) -> None:
    """Heads of 128 (methods: arXiv 2309.16039): inv_freq_j = base^(-2j/128)."""
    model: Any = build_model(section(rope_theta=base), Needs(32, 97, seed=0)).model
    found = model.model.rotary_emb.inv_freq
    for pair, frequency in frequencies.items():
        assert float(found[pair]) == pytest.approx(frequency, rel=1e-5)


def test_longer_rows_than_the_model_has_positions_need_a_base_and_then_run() -> None:
    with pytest.raises(ConfigError, match=r"or model\.rope_theta"):
        build_model(section(), Needs(64, 97, seed=0))
    loaded = build_model(section(rope_theta=5e5), Needs(64, 97, seed=0))
    assert loaded.model.config.max_position_embeddings == 64  # type: ignore[union-attr]
    assert "rotary positions: base 10,000 -> 500,000, 32 -> 64 positions" in loaded.report.render()
    loaded.model(torch.zeros(1, 64, dtype=torch.int64))


def test_a_checkpoint_of_such_a_run_needs_the_field_no_more_and_may_repeat_it() -> None:
    saved = build_model(section(rope_theta=5e5), Needs(64, 97, seed=0)).model.config.to_dict()  # type: ignore[operator, union-attr]
    for again in (section(), section(rope_theta=5e5)):
        loaded = build_from_config(saved, again, Needs(64, 97, seed=0))
        config: Any = loaded.model.config
        assert config.rope_parameters["rope_theta"] == 5e5 and config.max_position_embeddings == 64
        assert "rotary positions:" not in loaded.report.render()  # nothing changed


def test_the_old_base_alone_changes_nothing_and_says_nothing() -> None:
    config = AutoConfig.for_model(**TINY)
    assert change_base(config, 1e4, seq_len=32) == ""
    assert change_base(config, 1e4, seq_len=33) == "rotary positions: 32 -> 33 positions"


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ({"model_type": "gpt2"}, "gpt2 has no rotary positions"),
        (
            TINY | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            r"already stretches its positions \(rope_type linear\)",
        ),
        ({"model_type": "gemma3_text"}, "has a base for each type of layer"),
    ],
)
def test_families_without_one_plain_base_are_refused(family: dict[str, Any], said: str) -> None:
    config = AutoConfig.for_model(**family)
    assert not has_rotary_positions(config)
    with pytest.raises(ConfigError, match=said):
        change_base(config, 5e5, seq_len=8)


def test_a_family_with_learned_positions_is_not_told_of_a_base() -> None:
    fresh = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    with pytest.raises(ConfigError, match="32 positions") as refused:
        build_model(ModelSection(fresh=fresh), Needs(64, 97, seed=0))
    assert "rope_theta" not in str(refused.value)
