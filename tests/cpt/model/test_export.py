"""Export: what a stranger loads is the model that was trained, or nothing is left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt.config import ConfigError, ModelSection
from cpt.model import export
from cpt.model.build import Needs, build_model, named_tensors
from cpt.model.export import ExportSpec, export_checkpoint

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
NEEDS = Needs(seq_len=32, vocab_size=97, seed=5)
PROBE = torch.arange(1, 33)[None]


def build(**change: Any) -> Any:
    model: Any = build_model(ModelSection(fresh=TINY | change), NEEDS).model
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=PROBE).logits[0].float()
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_loads_with_the_logits_of_the_live_one(tmp_path: Path, tied: bool) -> None:
    live = build(tie_word_embeddings=tied)
    spec = ExportSpec(tmp_path / "hf")
    report = export_checkpoint(named_tensors(live), live.config, spec, live_logits_TV=logits(live))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (logits(loaded) - logits(live)).abs().max() < 1e-5
    assert report.logit_difference < 1e-5
    assert report.rounding_difference == 0.0
    assert report.parameters == sum(weight.numel() for weight in live.parameters())
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(report.files)
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "hf").iterdir())
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "gpt2"])
def test_other_families_are_exported_too(tmp_path: Path, family: str) -> None:
    own = {
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 97},
        "qwen3": TINY | {"num_key_value_heads": 2, "head_dim": 8},
        "gpt_neox": TINY,
    }
    fresh = own[family] | {"model_type": family}
    live: Any = build_model(ModelSection(fresh=fresh), NEEDS).model
    report = export_checkpoint(named_tensors(live), live.config, ExportSpec(tmp_path / "hf"))
    assert report.logit_difference < 1e-5


def test_a_bf16_export_holds_exactly_the_rounded_weights_and_reports_the_rounding(tmp_path: Path) -> None:
    live = build()
    report = export_checkpoint(named_tensors(live), live.config, ExportSpec(tmp_path / "hf", dtype="bf16"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    for name, weight in live.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight.to(torch.bfloat16))
    assert report.logit_difference < 1e-5
    assert 1e-4 < report.rounding_difference < 0.05 * logits(live).abs().max().item()
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_are_split_into_shards(tmp_path: Path) -> None:
    live = build()
    report = export_checkpoint(named_tensors(live), live.config, ExportSpec(tmp_path / "hf", max_shard_size="10KB"))
    assert "model.safetensors.index.json" in report.files
    assert sum(name.endswith(".safetensors") for name in report.files) > 1


def test_the_configuration_of_the_run_is_not_changed(tmp_path: Path) -> None:
    live = build()
    before = live.config.to_dict(), live.config._attn_implementation
    export_checkpoint(named_tensors(live), live.config, ExportSpec(tmp_path / "hf", dtype="bf16"))
    assert (live.config.to_dict(), live.config._attn_implementation) == before


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>")).save(str(path))
    return path


def test_a_single_tokenizer_file_becomes_a_loadable_tokenizer(tmp_path: Path, tokenizer_json: Path) -> None:
    live = build()
    export_checkpoint(named_tensors(live), live.config, ExportSpec(tmp_path / "hf", tokenizer=tokenizer_json))
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("a") == [1]


def test_tokenizer_files_of_a_folder_are_copied_and_nothing_else(tmp_path: Path, tokenizer_json: Path) -> None:
    (tmp_path / "secret.txt").write_text("stay")
    live = build()
    report = export_checkpoint(named_tensors(live), live.config, ExportSpec(tmp_path / "hf", tokenizer=tmp_path))
    assert "tokenizer.json" in report.files
    assert "secret.txt" not in report.files


def test_a_sentencepiece_model_is_copied_under_the_usual_name(tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_bytes(b"pieces")
    live = build()
    report = export_checkpoint(
        named_tensors(live), live.config, ExportSpec(tmp_path / "hf", tokenizer=tmp_path / "spm.model")
    )
    assert "tokenizer.model" in report.files


def test_a_generation_config_is_taken_along(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 42}')
    live = build()
    spec = ExportSpec(tmp_path / "hf", generation_config=tmp_path / "generation_config.json")
    export_checkpoint(named_tensors(live), live.config, spec)
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == 42


def test_an_empty_target_folder_is_used(tmp_path: Path) -> None:
    live = build()
    (tmp_path / "hf").mkdir()
    export_checkpoint(named_tensors(live), live.config, ExportSpec(tmp_path / "hf"))
    assert (tmp_path / "hf/config.json").exists()


def test_a_target_that_holds_something_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    live = build()
    for target in (tmp_path, tmp_path / "keep"):
        with pytest.raises(ConfigError, match="already holds something"):
            export_checkpoint(named_tensors(live), live.config, ExportSpec(target))
    assert (tmp_path / "keep").read_text() == "mine"


def test_a_missing_tokenizer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    live = build()
    with pytest.raises(ConfigError, match="tokenizer"):
        export_checkpoint(named_tensors(live), live.config, ExportSpec(tmp_path / "hf", tokenizer=tmp_path / "none"))
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    live = build()
    tensors = [pair for pair in named_tensors(live) if pair[0] != "model.norm.weight"]
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        export_checkpoint(tensors, live.config, ExportSpec(tmp_path / "hf"))


def test_weights_of_another_step_than_the_live_model_are_refused(tmp_path: Path) -> None:
    live = build()
    with pytest.raises(RuntimeError, match=r"differ by .* from the live model"):
        export_checkpoint(named_tensors(build()), live.config, ExportSpec(tmp_path / "hf"), live_logits_TV=logits(live))


def test_a_written_folder_that_does_not_reproduce_the_logits_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = build()
    monkeypatch.setattr(export, "LOGIT_TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="nothing was kept"):
        export_checkpoint(named_tensors(live), live.config, ExportSpec(tmp_path / "hf"))
    assert list(tmp_path.iterdir()) == []
