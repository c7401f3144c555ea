"""The closed forms of cpt.model.size against built models, the library's defaults and hand-computed values."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.model import size

TINY = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = TINY | {"intermediate_size": 40, "num_key_value_heads": 2}
CONFIGS = [
    {"model_type": "llama", **GATED},
    {"model_type": "llama", **GATED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"model_type": "llama", **TINY, "intermediate_size": 40, "head_dim": 6},
    {"model_type": "mistral", **GATED},
    {"model_type": "qwen2", **GATED},
    {"model_type": "qwen3", **GATED, "head_dim": 8, "tie_word_embeddings": True},
    {"model_type": "gpt_neox", **TINY, "intermediate_size": 64},
    {"model_type": "gpt_neox", **TINY, "intermediate_size": 64, "attention_bias": False},
    {"model_type": "gpt2", "vocab_size": 96, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    {"model_type": "gpt2", "vocab_size": 96, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 20},
]


def build(config: dict[str, object]) -> torch.nn.Module:
    given = {key: value for key, value in config.items() if key != "model_type"}
    model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **given))
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def test_the_closed_form_counts_the_parameters_of_the_built_model(config: dict[str, object]) -> None:
    assert size.num_parameters(config) == sum(weight.numel() for weight in build(config).parameters())


@pytest.mark.parametrize("family", size.DEFAULTS)
def test_assumed_defaults_are_those_of_transformers(family: str) -> None:
    library = AutoConfig.for_model(family).to_dict()
    assert {key: library[key] for key in size.DEFAULTS[family]} == size.DEFAULTS[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family))
    assert size.num_parameters({"model_type": family}) == sum(weight.numel() for weight in model.parameters())


def test_an_unknown_family_has_no_closed_form_but_flops_from_a_count() -> None:
    config = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 2}
    assert size.num_parameters(config) is None
    assert size.flops_per_token(config, 4) is None
    assert size.flops_per_token(config, 4, num_params=100) == 600 + 12 * 2 * 8 * 4
    assert size.flops_per_token({"model_type": "other"}, 4, num_params=100) == 600
    assert size.exact_flops(config) is None
    assert size.exact_flops(config, matmul_weights=100) == size.Flops(600, 0)  # no heads are named
    heads = config | {"num_attention_heads": 4}
    assert size.exact_flops(heads, matmul_weights=100) == size.Flops(600, 12 * 2 * 8)


def test_flops_of_the_worked_example_by_hand() -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    assert size.num_parameters(config) == 744
    assert size.flops_per_token(config, 32) == 6 * 744 + 12 * 1 * 8 * 32
    untied = config | {"tie_word_embeddings": False}  # the second table is looked up, not multiplied
    assert size.num_parameters(untied) == 824
    assert size.flops_per_token(untied, 32) == 6 * 744 + 12 * 1 * 8 * 32


def test_a_position_table_costs_no_flops() -> None:
    short = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    assert size.flops_per_token(short, 8) == size.flops_per_token(short | {"n_positions": 80}, 8)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def test_exact_flops_are_those_that_torch_counts_in_the_built_model(config: dict[str, object]) -> None:
    """Eager attention computes the whole square of every row, so there every token attends to all T of its row."""
    rows, length = 2, 12
    model: Any = build(config)
    model.set_attn_implementation("eager")
    ids = torch.arange(rows * length).remainder(96).view(rows, length)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    flops = size.exact_flops(config)
    assert flops is not None
    assert counter.get_total_flops() == flops.of(tokens=rows * length, pairs=rows * length * length)


def test_the_announced_figure_and_the_exact_one_differ_as_they_say() -> None:
    config = {"model_type": "llama", **GATED}
    exact, announced, length = size.exact_flops(config), size.flops_per_token(config, 64), 64
    assert exact is not None and announced is not None
    norms = 6 * (2 * 3 + 1) * 16  # counted by the announced figure alone
    assert announced - norms == exact.per_token + length * exact.per_pair


def test_windows_are_told_layer_by_layer() -> None:
    assert size.layer_windows({"num_hidden_layers": 2}) == (None, None)
    assert size.layer_windows({"num_hidden_layers": 2, "sliding_window": 8}) == (8, 8)
    assert size.layer_windows({"num_hidden_layers": 1, "sliding_window": 8, "use_sliding_window": False}) == (None,)
    kinds = ["full_attention", "sliding_attention"]
    assert size.layer_windows({"num_hidden_layers": 2, "sliding_window": 8, "layer_types": kinds}) == (None, 8)


@pytest.mark.parametrize(("number", "shown"), [(0, "0"), (999, "999"), (1_234_567, "1.23 M"), (2e12, "2 T")])
def test_counts_are_shown_with_three_digits(number: float, shown: str) -> None:
    assert size.render_count(number) == shown


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "configs/models").glob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_model_configs_are_of_known_families(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    num_params = size.num_parameters(config)
    assert num_params is not None
    if "tiny" in path.name:
        assert 1e6 < num_params < 2e6
