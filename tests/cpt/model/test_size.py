"""The closed forms of cpt.model.size against built models, the library's defaults and hand-computed values."""

from pathlib import Path

import pytest
import torch
import yaml
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
    assert size.activation_bytes(config, seq_len=4, micro_batch_size=1, precision="fp32") is None


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


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        (0, "fp32", (400, 400, 0, 800)),
        (0, "bf16", (200, 200, 400, 800)),
        (1, "fp32", (400, 400, 100, 200)),
        (1, "bf16", (200, 200, 100, 200)),
        (2, "bf16", (200, 50, 100, 200)),
        (3, "bf16", (50, 50, 100, 200)),
    ],
)
def test_memory_of_a_hundred_parameters_on_four_ranks(
    stage: size.ZeroStage, precision: size.Precision, expected: tuple[int, ...]
) -> None:
    memory = size.training_memory_bytes(100, zero_stage=stage, world_size=4, precision=precision, activations=7)
    assert (memory.weights, memory.gradients, memory.master_weights, memory.adam_moments) == expected
    assert memory.total == sum(expected) + 7


def test_the_activation_estimate_is_near_what_autograd_keeps() -> None:
    config = {"model_type": "llama", **GATED, "hidden_size": 64, "intermediate_size": 160}
    model = build(config)
    owned = {weight.data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(2 * 64).remainder(96).view(2, 64)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    estimate = size.activation_bytes(config, seq_len=64, micro_batch_size=2, precision="fp32")
    assert estimate is not None
    assert 0.6 < estimate / sum(kept.values()) < 1.6


@pytest.mark.parametrize(("number", "shown"), [(0, "0"), (999, "999"), (1_234_567, "1.23 M"), (2e12, "2 T")])
def test_counts_are_shown_with_three_digits(number: float, shown: str) -> None:
    assert size.render_count(number) == shown


def test_the_summary_names_parameters_flops_and_memory_parts() -> None:
    memory = size.training_memory_bytes(10**9, zero_stage=1, world_size=2, precision="bf16", activations=10**9)
    text = size.render_size(10**9, 6 * 10**9, memory)
    assert "1 G (1,000,000,000)" in text
    assert "6 G" in text
    assert "11 GB estimated = weights 2 GB + gradients 2 GB + fp32 masters 2 GB + Adam moments 4 GB" in text
    assert "unknown" in size.render_size(10, None, memory)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "configs/models").glob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_model_configs_are_of_known_families(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    num_params = size.num_parameters(config)
    assert num_params is not None
    if "tiny" in path.name:
        assert 1e6 < num_params < 2e6
