"""The weights that work on a token, counted in built models: the closed forms where there are any, experts by share."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.model import size
from cpt.model.active import active_share, count_matmul_weights

TINY = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def build(family: str, **fields: object) -> tuple[torch.nn.Module, dict[str, object]]:
    config = AutoConfig.for_model(family, **TINY, **fields)
    return AutoModelForCausalLM.from_config(config), config.to_dict()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_count_equals_the_closed_form(family: str, tied: bool) -> None:
    model, config = build(family, tie_word_embeddings=tied)
    shape = size.model_shape(config)
    assert shape is not None
    assert count_matmul_weights(model, config) == size.matmul_parameters(shape)


def test_a_mixture_of_experts_counts_what_works_on_a_token() -> None:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    model, config = build("mixtral", **experts, sliding_window=None)
    expert = 3 * 16 * 24
    attention, router, head = 4 * 16 * 16, 8 * 16, 96 * 16
    assert count_matmul_weights(model, config) == 2 * (attention + router + 2 * expert) + head
    flops = size.exact_flops(config, matmul_weights=count_matmul_weights(model, config))
    assert flops is not None and flops.per_pair == 12 * 2 * 16


def test_a_family_without_closed_form_agrees_with_torchs_counter() -> None:
    model, config = build("olmo2", num_key_value_heads=4)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    ids = torch.arange(24).view(2, 12)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert size.model_shape(config) is None
    flops = size.exact_flops(config, matmul_weights=count_matmul_weights(model, config))
    assert flops is not None
    assert counter.get_total_flops() == flops.of(tokens=24, pairs=2 * 12 * 12)


def test_experts_that_the_config_does_not_count_all_count() -> None:
    assert active_share({}) == 1.0
    assert active_share({"num_experts": 8}) == 1.0
    assert active_share({"num_experts": 8, "num_experts_per_tok": 2}) == 0.25
