"""From run file to plan: what fits is planned, what does not is refused with the field, the value and the fix."""

import json
from io import StringIO
from typing import Any

import pytest

from cpt.config import ConfigError, load_config
from cpt.prepare import Prepared, plan_facts, prepare, render_plan
from cpt.recommendation import write_recommendation
from cpt.rundir import RunDir

Workshop = Any  # the fixtures of tests/conftest.py
ONE_DOCUMENT = [list(range(1, 41))]


@pytest.fixture
def shop(workshop: Workshop) -> Workshop:
    workshop.stores()
    return workshop


def prepared(shop: Workshop, *overrides: str, **changes: Any) -> Prepared:
    return prepare(load_config(shop.run_file("run", changes.pop("fields", None)), overrides))


def refusal(shop: Workshop, *overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        prepared(shop, *overrides, **changes)
    return str(caught.value)


def test_a_quarter_is_replayed_by_default_and_the_plan_is_whole_steps(shop: Workshop) -> None:
    facts = plan_facts(prepared(shop))
    assert (facts["steps"], facts["tokens"], facts["share_general"]) == (8, 2048, 0.25)
    by_name = {source["name"]: source for source in facts["sources"]}
    assert by_name["prose"]["group"] == "general" and by_name["code"]["group"] == "domain"
    assert by_name["prose"]["tokens_planned"] == 512
    assert by_name["code"]["epochs"] == pytest.approx(1536 / (512 * 32), rel=0.01)
    assert facts["warnings"] == []


def test_without_a_general_store_nothing_is_replayed_and_without_a_domain_everything_is(shop: Workshop) -> None:
    only_code, only_prose = ({name: str(shop.root / name)} for name in ("code", "prose"))
    assert prepared(shop, fields={"data.stores": only_code}).plan.share_general() == 0.0
    assert prepared(shop, fields={"data.stores": only_prose}).plan.share_general() == 1.0


def test_continuing_a_model_without_replay_is_warned_of(shop: Workshop) -> None:
    fields = {"model.fresh": None, "model.init_from": "somewhere", "replay.share_general": 0.0}
    forgets, unknown = prepared(shop, fields=fields).warnings
    assert "replay.share_general" in forgets and "forget" in forgets
    assert "model.tokenizer" in unknown and "not compared" in unknown


def test_missing_stores_are_all_named_with_the_field_and_the_path(shop: Workshop) -> None:
    text = refusal(shop, fields={"data.stores": {"a": "nowhere/a", "b": "nowhere/b"}})
    assert "data.stores.a" in text and "data.stores.b" in text and "nowhere" in text and "cpt data tokenize" in text


def test_a_split_folder_in_place_of_a_store_is_refused_with_the_path(shop: Workshop) -> None:
    text = refusal(shop, fields={"data.stores": {"code": str(shop.root / "code" / "train")}})
    assert str(shop.root / "code" / "train") in text


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_store_with_an_empty_split_is_refused_with_its_name_and_what_to_do(shop: Workshop, split: str) -> None:
    documents = {"train": ONE_DOCUMENT, "heldout": ONE_DOCUMENT, split: []}
    shop.store("hollow", domain="law", **documents)
    text = refusal(shop, fields={"data.stores": {"hollow": str(shop.root / "hollow")}})
    assert "data.stores.hollow" in text and f"its {split} split holds 0 tokens" in text and "tokenize" in text


def test_a_store_shorter_than_one_row_is_refused_with_its_name(shop: Workshop) -> None:
    shop.store("brief", domain="law", train=[[1, 2, 3]], heldout=ONE_DOCUMENT)
    text = refusal(shop, fields={"data.stores": {"brief": str(shop.root / "brief")}})
    assert "brief" in text and "seq_len" in text


def test_stores_of_different_tokenizers_are_refused_with_both_names(shop: Workshop) -> None:
    shop.store("law", domain="law", train=ONE_DOCUMENT * 50, heldout=ONE_DOCUMENT, tokenizer="other")
    stores = {name: str(shop.root / name) for name in ("prose", "law")}
    text = refusal(shop, fields={"data.stores": stores})
    assert "data.stores" in text and "prose with tiny" in text and "law with other" in text and "tokenize" in text


def test_a_tokenizer_that_did_not_make_the_stores_is_refused(shop: Workshop) -> None:
    folder = shop.root / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    text = refusal(shop, f"model.tokenizer={folder}")
    assert f"model.tokenizer = '{folder}'" in text and "tiny" in text and "tokenize with it" in text


def test_the_tokenizer_beside_the_model_to_continue_is_checked_too(shop: Workshop) -> None:
    folder = shop.root / "hf"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    text = refusal(shop, fields={"model.fresh": None, "model.init_from": str(folder)})
    assert str(folder) in text and "differs from the tokenizer that made the stores" in text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"replay.share_general": 1.2}, ["replay.share_general", "1.2"]),
        ({"replay.share_general": -0.1}, ["replay.share_general", "-0.1"]),
        ({"data.stages": [{"tokens": 2048, "share_general": 1.5}]}, ["data.stages", "share_general", "1.5"]),
        ({"data.stages": [{"tokens": 1024, "share_general": 0.5}]}, ["data.stages", "1024", "2048"]),
        ({"data.weights": {"prose": 0, "code": 0}}, ["share_general", "weight above 0"]),
        ({"data.weights": {"proze": 1}}, ["data.weights", "proze"]),
    ],
)
def test_shares_that_do_not_add_up_are_refused_with_field_and_value(
    shop: Workshop, fields: dict[str, Any], named: list[str]
) -> None:
    text = refusal(shop, fields=fields)
    assert all(part in text for part in named), text


def test_a_share_of_a_group_without_a_store_is_refused(shop: Workshop) -> None:
    text = refusal(shop, fields={"data.stores": {"code": str(shop.root / "code")}, "replay.share_general": 0.5})
    assert "share_general" in text and "0.5" in text and "add a general source" in text


def small_source(shop: Workshop, *, share: float, max_epochs: float) -> dict[str, Any]:
    """``prose`` shrunk to 12 rows of 32 tokens; the run has 64 rows."""
    shop.store("little", domain="general", train=[list(range(1, 41))] * 10, heldout=ONE_DOCUMENT)
    stores = {"little": str(shop.root / "little"), "code": str(shop.root / "code")}
    return {"data.stores": stores, "replay.share_general": share, "data.max_epochs": max_epochs}


def test_a_source_too_small_for_its_share_is_capped_at_max_epochs_and_the_plan_says_so(shop: Workshop) -> None:
    found = prepared(shop, fields=small_source(shop, share=0.5, max_epochs=2.0))
    facts = plan_facts(found)
    little = next(source for source in facts["sources"] if source["name"] == "little")
    assert 1.8 < little["epochs"] <= 2.0
    capped = next(text for text in facts["warnings"] if "little" in text)
    assert "wished share 0.5" in capped and "capped at max_epochs 2" in capped and "2.67 epochs" in capped
    assert any("'code'" in text and "takes what capped sources cannot give" in text for text in facts["warnings"])
    assert facts["tokens"] == 2048  # the budget stays


def test_the_epochs_of_a_repeated_source_are_shown_where_the_cap_allows_them(shop: Workshop) -> None:
    facts = plan_facts(prepared(shop, fields=small_source(shop, share=0.5, max_epochs=4.0)))
    little = next(source for source in facts["sources"] if source["name"] == "little")
    assert little["epochs"] == pytest.approx(32 / 12, abs=0.1)
    assert facts["warnings"] == []


def test_a_budget_that_all_sources_together_cannot_fill_is_refused_with_what_there_is(shop: Workshop) -> None:
    fields = small_source(shop, share=1.0, max_epochs=1.0)
    del fields["data.stores"]["code"]
    text = refusal(shop, fields=fields)
    assert "2048 tokens" in text and "only 384 left" in text and "max_epochs" in text


def test_the_banner_has_a_row_for_every_source_and_the_warnings_below(shop: Workshop) -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=StringIO())
    console.print(render_plan(plan_facts(prepared(shop, fields=small_source(shop, share=0.5, max_epochs=2.0)))))
    text = console.export_text()
    assert "little" in text and "code" in text and "8 steps, 2,048 tokens" in text and "max_epochs" in text


# --- a run that follows a recommendation


def following(shop: Workshop, recommendation: Any, *overrides: str, **changes: Any) -> Prepared:
    write_recommendation(shop.root / "plan.json", recommendation)
    return prepared(shop, f"plan={shop.root / 'plan.json'}", *overrides, **changes)


def banner(found: Prepared) -> str:
    from rich.console import Console

    console = Console(width=120, record=True, file=StringIO())
    console.print(render_plan(plan_facts(found)))
    return " ".join(console.export_text().split())


def test_the_banner_names_the_recommendation_its_share_and_what_it_replaced(shop: Workshop, recommend: Any) -> None:
    found = following(shop, advice := recommend(tokens=1024, share=0.5), fields={"replay.share_general": 0.25})
    assert (found.plan.num_rows * found.plan.seq_len, found.plan.share_general()) == (1024, 0.5)
    assert found.recommendation == advice and found.warnings == ()
    text = banner(found)
    assert f"follows recommendation {advice.fingerprint}: share_general 50.0% (90% interval 40.0% to 60.0%)" in text
    assert "the run file said train.tokens 2048, replay.share_general 0.25" in text
    facts = json.loads(json.dumps(plan_facts(found)))["recommendation"]
    assert facts["fingerprint"] == advice.fingerprint and facts["replaced"]["train.tokens"] == 2048


def test_without_a_recommendation_the_banner_names_none(shop: Workshop) -> None:
    assert plan_facts(prepared(shop))["recommendation"] is None and "recommendation" not in banner(prepared(shop))


def test_weights_over_the_whole_stage_are_summed_by_the_stores_labels(shop: Workshop, recommend: Any) -> None:
    shop.store("law", domain="law", train=ONE_DOCUMENT * 50, heldout=ONE_DOCUMENT)
    stores = {name: str(shop.root / name) for name in ("prose", "code", "law")}
    advice = recommend(share=None, weights={"prose": 0.3, "code": 0.5, "law": 0.2})
    plan = following(shop, advice, fields={"data.stores": stores}).plan
    assert plan.shares(0) == pytest.approx({"prose": 0.3, "code": 0.5, "law": 0.2})


def test_a_share_that_counts_other_stores_as_general_is_warned_of(shop: Workshop, recommend: Any) -> None:
    (warning,) = following(shop, recommend(share=0.6, weights={"prose": 0.4, "code": 0.6})).warnings
    assert "counts 60.0% of the tokens as general, the stores' labels 40.0% (labelled general: prose)" in warning


@pytest.mark.parametrize(("rate", "warned"), [("2e-2", False), ("3e-2", True), ("4e-3", True)])
def test_a_rate_far_from_the_pilots_is_warned_of(shop: Workshop, recommend: Any, rate: str, warned: bool) -> None:
    warnings = following(shop, recommend(), f"train.peak_lr={rate}").warnings
    assert [text.startswith("train.peak_lr is") for text in warnings] == [True] * warned


def test_a_run_goes_on_without_the_file_and_finds_the_run_folders_copy(shop: Workshop, recommend: Any) -> None:
    config = following(shop, advice := recommend()).config
    (shop.root / "plan.json").unlink()
    lost = prepare(config)
    assert lost.recommendation is None and f"recommendation {advice.fingerprint}" in lost.warnings[0]
    config.run_dir.mkdir(parents=True)
    copy = RunDir(config.run_dir).recommendation
    write_recommendation(copy, recommend(base="another"))
    assert prepare(config).recommendation is None
    write_recommendation(copy, advice)
    assert prepare(config).recommendation == advice and prepare(config).warnings == ()


def test_stages_of_the_run_file_that_a_recommendation_replaces_are_counted(shop: Workshop, recommend: Any) -> None:
    stages = [{"tokens": 1024, "share_general": share} for share in (0.1, 0.2)]
    assert "the run file said train.tokens 2048, data.stages (2)" in banner(
        following(shop, recommend(), fields={"data.stages": stages})
    )
