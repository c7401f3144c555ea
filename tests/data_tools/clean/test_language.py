"""Language identification: sentences of several languages, labels, thresholds, odd texts."""

from pathlib import Path

import pytest

from cpt.rundir import DataError
from data_tools.clean.language import language, load_identifier
from data_tools.clean.settings import Language
from data_tools.corpus.document import Document

SENTENCES = {
    "en": "The committee will publish its report on the state of the forests next week.",
    "de": "Der Ausschuss wird seinen Bericht über den Zustand der Wälder nächste Woche veröffentlichen.",
    "ja": "委員会は来週、森林の状態に関する報告書を公表する予定です。",
    "fr": "La commission publiera la semaine prochaine son rapport sur l'état des forêts.",
    "ar": "ستنشر اللجنة تقريرها عن حالة الغابات الأسبوع المقبل.",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_is_known_by_its_language(code: str) -> None:
    found, score = load_identifier()(SENTENCES[code])
    assert found == code and score > 0.65


def test_capitals_and_line_breaks_do_not_mislead() -> None:
    assert load_identifier()(SENTENCES["en"].upper().replace(" ", "\n"))[0] == "en"


def test_a_document_of_another_language_is_dropped_and_a_kept_one_labelled() -> None:
    step = language(Language(keep=("en",)))
    kept, other = Document(SENTENCES["en"]), Document(SENTENCES["de"])
    assert step(kept) is None and kept.fields["language"] == "en" and kept.fields["language_score"] > 0.65
    reject = step(other)
    assert reject is not None and reject.reason == "language.other" and reject.detail.startswith("de ")


def test_an_unsure_document_is_dropped_with_its_score() -> None:
    reject = language(Language(keep=("en",), min_score=1.0))(Document(SENTENCES["en"]))
    assert reject is not None and reject.reason == "language.unsure" and reject.detail.endswith("< 1")


def test_without_languages_to_keep_documents_are_only_labelled() -> None:
    document = Document("12345 !!!")
    assert language(Language())(document) is None
    assert document.fields == {"language": "und", "language_score": 0.0}


@pytest.mark.parametrize("text", ["", " \n", "\x00\x00", "\ud800\udfff", "x" * 1_000_000, "😀" * 50])
def test_odd_texts_get_an_answer(text: str) -> None:
    code, score = load_identifier()(text)
    assert code and 0 <= score <= 1


def test_a_model_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "lid.bin"
    with pytest.raises(DataError, match="no fastText model"):
        load_identifier(file)
    file.write_bytes(b"not a model")
    with pytest.raises(DataError, match="no fastText model"):
        load_identifier(file)
