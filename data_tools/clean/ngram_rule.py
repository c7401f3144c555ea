"""The rule that keeps documents which a reference corpus finds likely: perplexity under an n-gram model."""

from data_tools.clean.ngram import NgramModel
from data_tools.clean.settings import NgramPerplexity
from data_tools.corpus.document import Document, Reject, Step


def ngram_perplexity(settings: NgramPerplexity) -> Step:
    model = NgramModel.load(settings.model)

    def step(document: Document) -> Reject | None:
        found = model.perplexity(document.text)
        if settings.annotate:
            document.fields["perplexity"] = round(found, 2)
        if settings.max is not None and found > settings.max:
            return Reject("ngram_perplexity.high", f"{found:.1f} > {settings.max:g}")
        if settings.min is not None and found < settings.min:
            return Reject("ngram_perplexity.low", f"{found:.1f} < {settings.min:g}")
        return None

    return step
