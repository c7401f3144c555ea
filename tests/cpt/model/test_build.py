"""Models from folders and from config mappings, and every way in which they are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.config import ConfigError, ModelSection
from cpt.model.build import Needs, build_model, load_tensors, named_tensors
from cpt.model.model_config import read_model_config

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "rope_theta": 500.0,
}
NEEDS = Needs(seq_len=32, vocab_size=97, seed=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    built = build_model(ModelSection(fresh=TINY), NEEDS)
    built.model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    return tmp_path / "base"


def refused(section: ModelSection, needs: Needs = NEEDS) -> str:
    with pytest.raises(ConfigError) as caught:
        build_model(section, needs)
    return str(caught.value)


def test_a_fresh_model_has_the_sizes_of_its_mapping_and_reports_all_weights_as_new() -> None:
    loaded = build_model(ModelSection(fresh=TINY), NEEDS)
    config: Any = loaded.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 2, 97)
    assert loaded.report.parameters == sum(weight.numel() for weight in loaded.model.parameters())
    assert loaded.report.newly_initialised == tuple(name for name, _ in loaded.model.named_parameters())
    assert loaded.report.loaded_fraction == 0.0
    assert "newly initialised, attention sdpa" in loaded.report.render()


def test_the_rotary_base_of_a_fresh_mapping_is_used() -> None:
    slow, fast = (build_model(ModelSection(fresh=TINY | {"rope_theta": theta}), NEEDS).model for theta in (500.0, 50.0))
    buffers = [dict(model.named_buffers())["model.rotary_emb.inv_freq"] for model in (slow, fast)]
    assert buffers[0][-1] < buffers[1][-1]


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second = (build_model(ModelSection(fresh=TINY), NEEDS).model for _ in range(2))
    other = build_model(ModelSection(fresh=TINY), Needs(32, 97, seed=6)).model
    assert torch.equal(torch.get_rng_state(), state)
    weights = [next(model.parameters()) for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_fresh_mapping_may_come_from_a_file_and_take_its_vocabulary_from_the_stores(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in TINY.items() if key != "vocab_size"}))
    loaded = build_model(ModelSection(fresh=str(path)), NEEDS)
    assert loaded.model.config.vocab_size == 97  # type: ignore[union-attr]


def test_bf16_weights_are_the_rounded_fp32_weights_and_rotary_frequencies_stay_exact() -> None:
    exact = build_model(ModelSection(fresh=TINY), NEEDS).model
    half = build_model(ModelSection(fresh=TINY), NEEDS, dtype=torch.bfloat16).model
    for weight, rounded in zip(exact.parameters(), half.parameters(), strict=True):
        assert torch.equal(weight.to(torch.bfloat16), rounded)
    for buffer, other in zip(exact.buffers(), half.buffers(), strict=True):
        assert torch.equal(buffer, other)


def test_the_attention_back_end_is_chosen_for_the_dtype_of_the_computation() -> None:
    needs = Needs(32, 97, seed=5, compute_dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="CUDA only"):
        build_model(ModelSection(fresh=TINY, attention="varlen"), needs)
    assert build_model(ModelSection(fresh=TINY), needs).report.attention == "sdpa"


def test_a_folder_is_loaded_in_full(folder: Path) -> None:
    loaded = build_model(ModelSection(init_from=str(folder)), NEEDS)
    original = build_model(ModelSection(fresh=TINY), NEEDS).model
    for (name, weight), (other_name, other) in zip(named_tensors(loaded.model), named_tensors(original), strict=True):
        assert name == other_name
        assert torch.equal(weight, other)
    assert loaded.report.loaded_fraction == 1.0
    assert loaded.report.newly_initialised == ()
    assert "100% loaded" in loaded.report.render()


def test_tied_weights_that_a_file_holds_once_are_not_missing(tmp_path: Path) -> None:
    build_model(ModelSection(fresh=TINY | {"tie_word_embeddings": True}), NEEDS).model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = build_model(ModelSection(init_from=str(tmp_path)), NEEDS)
    weights = dict(loaded.model.named_parameters(remove_duplicate=False))
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]


def test_dropout_of_a_pretrained_config_is_switched_off_and_reported(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = build_model(ModelSection(init_from=str(tmp_path)), NEEDS)
    assert set(loaded.report.dropout_switched_off) == {"attn_pdrop", "embd_pdrop", "resid_pdrop"}
    assert {module.p for module in loaded.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert "dropout switched off: " in loaded.report.render()


def test_dropout_that_a_fresh_mapping_asks_for_stays_on() -> None:
    model = build_model(ModelSection(fresh=TINY | {"attention_dropout": 0.25}), NEEDS).model
    assert model.config.attention_dropout == 0.25  # type: ignore[union-attr]


def test_weights_that_the_model_does_not_use_are_reported(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.extra.weight": torch.zeros(3)}))
    report = build_model(ModelSection(init_from=str(folder)), NEEDS).report
    assert report.unexpected == ("model.extra.weight",)
    assert "not used from the files: model.extra.weight" in report.render()


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight_is_refused_by_name(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    said = refused(ModelSection(init_from=str(folder)))
    assert "lack 1 weights of the model: model.layers.1.mlp.up_proj.weight" in said


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}))
    assert "check that config.json belongs to the weights" in refused(ModelSection(init_from=str(folder)))


def test_weights_with_nan_are_refused_by_name(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    assert "NaN or infinity: model.norm.weight" in refused(ModelSection(init_from=str(folder)))


def test_weights_cut_short_are_refused_with_the_file_name(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is damaged or cut short" in refused(ModelSection(init_from=str(folder)))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    said = refused(ModelSection(init_from=str(tmp_path / "nowhere")))
    assert "nowhere" in said
    assert "give a Hugging Face folder or hub name" in said


def test_a_name_that_is_neither_folder_nor_hub_model_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("we could not connect")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    said = refused(ModelSection(init_from="models/base"))
    assert "neither a folder here nor a hub model within reach (OSError: we could not connect)" in said


def test_a_folder_without_config_json_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(ModelSection(init_from=str(folder)))


@pytest.mark.parametrize("content", ["{", '{"model_type": "no_such_family"}', "{}"])
def test_a_config_json_that_says_nothing_usable_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert "its config.json cannot be used" in refused(ModelSection(init_from=str(folder)))


def test_code_that_comes_with_a_model_is_not_run_unless_asked(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('ran')")
    assert "set model.trust_remote_code=true" in refused(ModelSection(init_from=str(folder)))


def test_pickled_weights_are_refused_and_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "pickled weights only (pytorch_model.bin)" in refused(ModelSection(init_from=str(folder)))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors weights" in refused(ModelSection(init_from=str(folder)))


def test_rows_longer_than_the_positions_and_a_larger_vocabulary_are_refused_together(folder: Path) -> None:
    said = refused(ModelSection(init_from=str(folder)), Needs(seq_len=33, vocab_size=98, seed=0))
    assert "data.seq_len = 33: the model has 32 positions" in said
    assert "set data.seq_len=32 or less" in said
    assert "data.stores = 98" in said
    assert "table of 97" in said


def test_checks_come_before_weights_are_read(folder: Path) -> None:
    shutil.copyfile(folder / "config.json", folder / "model.safetensors")  # damaged, but that is found later
    assert "positions" in refused(ModelSection(init_from=str(folder)), Needs(seq_len=33, vocab_size=97, seed=0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": None}, "no causal language model"),
        ({"hiden_size": 8}, "model.fresh.hiden_size = 8: is no field of a llama config; did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "model.fresh"),
        ({"num_key_value_heads": 3}, "model.fresh.num_key_value_heads = 3: must divide num_attention_heads=2"),
        (
            {"model_type": "qwen3"},
            "num_key_value_heads = 32: must divide num_attention_heads=2; it is the family's default",
        ),
    ],
)
def test_a_fresh_mapping_with_a_mistake_names_the_field(change: dict[str, object], said: str) -> None:
    assert said in refused(ModelSection(fresh=TINY | change))


@pytest.mark.parametrize(
    ("content", "said"), [("- a\n", "holds no mapping"), ("a: [", "cannot be read"), (None, "cannot be read")]
)
def test_a_fresh_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "model.yaml"
    if content is not None:
        path.write_text(content)
    assert said in refused(ModelSection(fresh=str(path)))


def test_neither_and_both_origins_are_refused() -> None:
    for section in (ModelSection(), ModelSection(init_from="a", fresh=TINY)):
        assert "exactly one of model.init_from and model.fresh" in refused(section)


def test_the_config_can_be_read_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    assert read_model_config(ModelSection(init_from=str(folder))).hidden_size == 16


def test_tensors_of_a_checkpoint_fill_a_model() -> None:
    source = build_model(ModelSection(fresh=TINY), NEEDS).model
    target = build_model(ModelSection(fresh=TINY), Needs(32, 97, seed=9)).model
    load_tensors(target, named_tensors(source), origin="step_00000001")
    for weight, other in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    model = build_model(ModelSection(fresh=TINY), NEEDS).model
    tensors = dict(named_tensors(model)) | {"stranger": torch.zeros(1), "model.norm.weight": torch.zeros(3)}
    del tensors["lm_head.weight"]
    with pytest.raises(ConfigError) as caught:
        load_tensors(model, tensors.items(), origin="step_00000001")
    said = str(caught.value)
    assert "stranger" in said
    assert "the model has no such weight" in said
    assert "the model has shape (16,)" in said
    assert "lm_head.weight, model.norm.weight" in said or "model.norm.weight, lm_head.weight" in said
