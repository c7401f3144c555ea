"""The YAML of rules: order, thresholds, every problem at once; the table of rules; what a chain of them does."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.config import ConfigError
from data_tools.clean.ngram_training import TrainOptions, train_ngram
from data_tools.clean.rules import RULES, build_step, identity_of, list_rules, load_rules
from data_tools.corpus.document import Document, Step


def write(folder: Path, text: str) -> Path:
    file = folder / "clean.yaml"
    file.write_text(text)
    return file


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_rules(write(folder, text))
    return [str(problem) for problem in caught.value.problems]


def test_rules_keep_their_order_and_take_thresholds(tmp_path: Path) -> None:
    chosen = load_rules(
        write(tmp_path, "rules:\n- pii\n- length: {min_characters: 5}\n- gopher_quality:\n- fix_unicode: {}\n")
    )
    assert [name for name, _ in chosen] == ["pii", "length", "gopher_quality", "fix_unicode"]
    assert chosen[1][1].model_dump() == {"min_characters": 5, "max_characters": None}


def test_every_problem_is_told_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    told = problems(
        tmp_path,
        "rule: x\nrules:\n- gopher_qualty\n- gopher_quality: {min_wrds: 3, max_words: many}\n- {pii: {}, length: {}}\n"
        "- 7\n- ngram_perplexity: {max: 5}\n- language: {model: nowhere.bin}\n- length: {min_characters: -1}\n",
    )
    assert told[0].startswith("rule = 'x': unknown field")
    assert told[1] == "rules[0] = 'gopher_qualty': unknown rule; did you mean gopher_quality?"
    assert "rules[1].gopher_quality.min_wrds = 3: unknown field; did you mean min_words?" in told
    assert any(line.startswith("rules[1].gopher_quality.max_words = 'many': ") for line in told)
    assert any(line.startswith("rules[2] = ") and "must be one rule" in line for line in told)
    assert any(line.startswith("rules[3] = 7: must be one rule") for line in told)
    assert any(line.startswith("rules[4].ngram_perplexity.model: is required; a model of") for line in told)
    assert any(line.startswith("rules[5].language.model = 'nowhere.bin': no such file") for line in told)
    assert any(line.startswith("rules[6].length.min_characters = -1: ") for line in told)


@pytest.mark.parametrize("text", ["rules: []\n", "rules: pii\n", "other: 1\n", "{}\n"])
def test_a_file_without_rules_is_refused(tmp_path: Path, text: str) -> None:
    assert any("must be a list of rules" in line for line in problems(tmp_path, text))


def test_a_file_that_is_no_yaml_is_refused_by_name(tmp_path: Path) -> None:
    assert "clean.yaml" in problems(tmp_path, "rules: [\n")[0]
    with pytest.raises(ConfigError, match="no such file"):
        load_rules(tmp_path / "absent.yaml")


def test_the_first_rule_that_rejects_names_the_reason_and_repairs_before_it_stay(tmp_path: Path) -> None:
    step = build_step(
        load_rules(write(tmp_path, "rules:\n- fix_unicode\n- length: {min_characters: 4, max_characters: 6}\n- pii\n"))
    )
    short, long, kept = Document("a\x00b"), Document("seven__"), Document("a@b.de")
    reject = step(short)
    assert reject is not None and (reject.reason, reject.detail, short.text) == ("length.short", "2 < 4", "ab")
    reject = step(long)
    assert reject is not None and (reject.reason, reject.detail) == ("length.long", "7 > 6")
    assert step(kept) is None and kept.text == "email@example.com"


def test_the_perplexity_rule_drops_what_the_reference_finds_unlikely(tmp_path: Path) -> None:
    train_ngram(["the court shall hear the case\n" * 5], TrainOptions()).save(tmp_path / "m.npz")
    told = f"rules:\n- ngram_perplexity: {{model: {tmp_path}/m.npz, min: 1.5, max: 10}}\n"
    step = build_step(load_rules(write(tmp_path, told)))
    likely, unlikely, empty = Document("the case"), Document("zebras dance"), Document("")
    assert step(likely) is None and 1.5 < likely.fields["perplexity"] < 10
    rejects = [step(unlikely), step(empty), step(Document("the court shall hear the case"))]
    assert [reject and reject.reason for reject in rejects] == ["ngram_perplexity.high"] * 2 + ["ngram_perplexity.low"]


def test_the_identity_changes_with_a_threshold_and_with_the_models_content(tmp_path: Path) -> None:
    train_ngram(["a b c"], TrainOptions(min_count=1)).save(tmp_path / "m.npz")
    file = write(tmp_path, f"rules:\n- ngram_perplexity: {{model: {tmp_path}/m.npz, max: 5}}\n")
    first = identity_of(load_rules(file))
    train_ngram(["a b d"], TrainOptions(min_count=1)).save(tmp_path / "m.npz")
    assert identity_of(load_rules(file)) != first
    assert identity_of(load_rules(write(tmp_path, "rules: [pii]"))) != identity_of(
        load_rules(write(tmp_path, "rules: [length]"))
    )


def test_every_rule_is_listed_with_source_defaults_and_descriptions() -> None:
    listed = {entry["rule"]: entry for entry in list_rules()}
    assert list(listed) == list(RULES)
    assert all(entry["source"] and all(field["description"] for field in entry["fields"]) for entry in listed.values())
    assert {"field": "min_words", "default": 50, "description": "words that are not punctuation alone"} in listed[
        "gopher_quality"
    ]["fields"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0x00, 0x01,\n" * 500, "gopher_repetition.duplicate_lines"),
        ("x" * 50, "length.short"),
        (
            "def area(radius):\n    return 3.14159 * radius ** 2\n\n\ndef side(area):\n    return area ** 0.5  # &amp;\n"
            + "#" * 20,
            None,
        ),
    ],
)
def test_the_code_rules_drop_tables_of_data_and_keep_programs(text: str, reason: str | None) -> None:
    step = build_step(load_rules(Path(__file__).parents[3] / "configs" / "corpora" / "clean_code.yaml"))
    document = Document(text)
    reject = step(document)
    assert (reject and reject.reason) == reason and (reject is not None or document.text == text)


LENIENT = """
rules:
- fix_unicode
- language
- length: {max_characters: 10000}
- gopher_repetition: {max_duplicate_lines: null, max_duplicate_line_characters: null, max_top_ngram: {2: 9}}
- gopher_quality: {min_words: null, min_mean_word_length: null, min_alpha_words: null, min_stop_words: null}
- c4_quality: {min_sentences: null, min_words_per_line: null, require_terminal_punctuation: false}
- fineweb_quality: {min_lines_with_punctuation: null, max_short_lines: null}
- pii: {phones: true}
- ngram_perplexity: {model: MODEL}
"""


@pytest.fixture(scope="module")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Step:
    folder = tmp_path_factory.mktemp("lenient")
    train_ngram(["the court shall hear the case"], TrainOptions(min_count=1)).save(folder / "m.npz")
    return build_step(load_rules(write(folder, LENIENT.replace("MODEL", str(folder / "m.npz")))))


@given(
    st.text(st.characters(categories=["L", "M", "N", "P", "S", "Z", "C"]), max_size=200)
    | st.text("a1.@#-\n\r\x00 {[(&;é東の\ud800", max_size=200)
)
@settings(max_examples=300, deadline=None)
def test_any_text_is_kept_or_rejected_with_a_reason(lenient: Step, text: str) -> None:
    document = Document(text)
    reject = lenient(document)
    if reject is None:
        assert document.text.strip() and document.fields["perplexity"] > 0
        document.text.encode()  # no lone surrogate is left
    else:
        assert reject.reason.partition(".")[0] in RULES and reject.reason.partition(".")[2]
