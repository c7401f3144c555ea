"""Which models must grow for an extended tokenizer: decided by fingerprints, and refused where nobody can know."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpt.config import ConfigError, RunConfig, load_config
from cpt.new_tokens import extend_folder, find_extension
from cpt.rundir import DataError
from data_tools.train_tokenizer import train_bpe
from data_tools.vocabulary.extend import ExtendRequest, extend_tokenizer

Workshop = Any  # the fixtures of tests/conftest.py
TEXT = "the heart and the lung and the liver"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and other/ (models of 264 rows with their tokenizers), tok_ext/ (base extended), bare/ (no tokenizer)."""
    from cpt.config import ModelSection
    from cpt.model.build import Needs, build_model, named_tensors
    from cpt.model.export import ExportSpec, export_checkpoint

    root = tmp_path_factory.mktemp("folders")
    corpus = root / "domain.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"myocarditis cardiomyopathy {TEXT} {i}"}) + "\n" for i in range(99)))
    tiny = {"model_type": "llama", "vocab_size": 264, "hidden_size": 16, "intermediate_size": 24}
    tiny |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    model: Any = build_model(ModelSection(fresh=tiny), Needs(32, 264, seed=5)).model
    for name, text in (("base", TEXT), ("other", TEXT[::-1]), ("bare", "")):
        tokenizer = train_bpe([text], out=root / "tok" / name, vocab_size=264) if text else None
        export_checkpoint(named_tensors(model), model.config, ExportSpec(root / name, tokenizer=tokenizer))
    sources = (f"medical={corpus}",)
    extend_tokenizer(ExtendRequest(root / "base", sources, root / "tok_ext", num_tokens=9, min_count=5))
    return root


def run_config(shop: Workshop, **model: object) -> RunConfig:
    stated = {f"model.{name}": str(value) for name, value in model.items()}
    return load_config(shop.run_file("run", {"model.fresh": None, **stated}))


def test_the_model_of_the_base_must_grow(workshop: Workshop, folders: Path) -> None:
    found = find_extension(run_config(workshop, init_from=folders / "base", tokenizer=folders / "tok_ext"))
    assert found is not None and found.base_vocab_size == 264 and len(found.subtokens) == 9


def test_without_an_extended_tokenizer_nothing_grows(workshop: Workshop, folders: Path) -> None:
    assert find_extension(run_config(workshop, init_from=folders / "base")) is None
    assert find_extension(run_config(workshop, init_from=folders / "base", tokenizer=folders / "base")) is None


def test_another_model_is_refused(workshop: Workshop, folders: Path) -> None:
    with pytest.raises(ConfigError, match=r"was extended from base, which is not the tokenizer of the model"):
        find_extension(run_config(workshop, init_from=folders / "other", tokenizer=folders / "tok_ext"))


def test_a_model_whose_tokenizer_is_not_known_is_refused_with_the_command(workshop: Workshop, folders: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer lies with .*bare.*cpt extend-model .*bare --tokenizer"):
        find_extension(run_config(workshop, init_from=folders / "bare", tokenizer=folders / "tok_ext"))


@pytest.mark.parametrize("base", ["base", "bare"])
def test_a_folder_is_extended_and_then_needs_nothing_more(
    workshop: Workshop, folders: Path, tmp_path: Path, base: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = extend_folder(folders / base, folders / "tok_ext", tmp_path / "out")
    assert facts["new_tokens"] == 9 and facts["old_logits_change"] < 1e-6 and facts["dtype"] == "fp32"
    assert (facts["compared_with"] is None) is (base == "bare")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 273 == len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    extended = run_config(workshop, init_from=tmp_path / "out", tokenizer=folders / "tok_ext")
    assert find_extension(extended) is None
    with pytest.raises(ConfigError, match="has its rows already"):
        extend_folder(tmp_path / "out", folders / "tok_ext", tmp_path / "again")


def test_a_model_that_states_no_number_of_positions_is_extended(folders: Path, tmp_path: Path) -> None:
    from cpt.config import ModelSection
    from cpt.model.build import Needs, build_model, named_tensors
    from cpt.model.export import ExportSpec, export_checkpoint

    tiny = {"model_type": "recurrent_gemma", "vocab_size": 264, "hidden_size": 16, "intermediate_size": 24}
    tiny |= {"num_hidden_layers": 1, "num_attention_heads": 2, "block_types": ["attention"]}
    model: Any = build_model(ModelSection(fresh=tiny), Needs(32, 264, seed=5)).model
    assert not hasattr(model.config, "max_position_embeddings")
    spec = ExportSpec(tmp_path / "base", tokenizer=folders / "tok" / "base")
    export_checkpoint(named_tensors(model), model.config, spec)
    facts = extend_folder(tmp_path / "base", folders / "tok_ext", tmp_path / "out")
    assert facts["new_tokens"] == 9 and facts["old_logits_change"] < 1e-6


def test_wrong_folders_are_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which is not the tokenizer of the model"):
        extend_folder(folders / "other", folders / "tok_ext", tmp_path / "out")
    with pytest.raises(ConfigError, match="adds nothing to this model"):
        extend_folder(folders / "base", folders / "base", tmp_path / "out")
    with pytest.raises(ConfigError, match="already holds something"):
        extend_folder(folders / "base", folders / "tok_ext", folders / "other")


def test_a_tokenizer_that_is_not_there_is_called_so(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such tokenizer"):
        extend_folder(folders / "base", folders / "nowhere", tmp_path / "out", initializer="mean_of_subtokens")


def test_a_tokenizer_that_changed_since_is_refused(workshop: Workshop, folders: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in (folders / "tok_ext").iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    content = json.loads((changed / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (changed / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"changed since its extension\.json was written"):
        extend_folder(folders / "base", changed, tmp_path / "out")
    with pytest.raises(ConfigError, match="changed since"):
        find_extension(run_config(workshop, init_from=folders / "base", tokenizer=changed))
