"""One document token by token: losses, the text of single tokens, the terminal and the page."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.eval.token_view import (
    TokenView,
    html_page,
    largest,
    render_tokens,
    strength,
    token_losses,
    token_texts,
    view_facts,
)
from cpt.model.kernels import prepare_model


def view(texts: list[str], before: list[float | None], after: list[float | None], **change: Any) -> TokenView:
    return replace(TokenView("law", 7, 500, len(texts), tuple(texts), tuple(before), tuple(after)), **change)


EXAMPLE = view(
    ["<s>", "The", " lessee", " <b>shall</b>", "\n", ""],
    [None, 2.0, 1.0, 3.0, 0.5, None],
    [None, 2.05, 4.0, 1.0, 0.5, 1.0],
)


def terminal(shown: TokenView, *, colour: bool = False) -> str:
    out = StringIO()
    Console(
        file=out, width=120, markup=False, force_terminal=colour, color_system="truecolor" if colour else None
    ).print(render_tokens(shown))
    return out.getvalue()


def build() -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=97, max_position_embeddings=64, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    prepare_model(model, "sdpa")
    return model


def test_token_losses_are_those_of_each_row_of_the_document_alone() -> None:
    model, ids = build().train(), [(i * 31) % 97 for i in range(21)]
    found = token_losses(model, ids, seq_len=8, backend="sdpa", device="cpu")
    assert len(found) == 21 and found[0] is None and model.training
    expected = []
    with torch.no_grad():
        for start, stop in ((0, 9), (8, 17), (16, 21)):
            row = torch.tensor([ids[start:stop]])
            log_probs = model.eval()(input_ids=row[:, :-1]).logits[0].log_softmax(-1)
            expected += (-log_probs.gather(1, row[0, 1:, None])[:, 0]).tolist()
    assert found[1:] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [0, 1])
def test_a_document_without_a_predicted_token_has_no_loss(length: int) -> None:
    assert token_losses(build(), [5] * length, seq_len=8, backend="sdpa", device="cpu") == (None,) * length


def test_a_loss_that_is_not_finite_is_unknown() -> None:
    model = build()
    with torch.no_grad():
        model.get_input_embeddings().weight[42] = float("nan")
    found = token_losses(model, [1, 2, 42, 3], seq_len=8, backend="sdpa", device="cpu")
    assert found[-1] is None
    shown = view(["a", "b", "c", "d"], [None, 1.0, 1.0, 1.0], list(found))
    assert view_facts(shown)["tokens"][-1] == {"text": "d", "before": 1.0, "after": None, "change": None}
    assert "no token with a finite loss" in terminal(view(["a"], [None], [None]))


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: place for place, token in enumerate([*alphabet, "Ġt", "Ġth", "he"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "t"), ("Ġt", "h"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_texts_of_tokens_are_the_document_and_characters_stay_whole() -> None:
    tokenizer, text = byte_level(), "x the 日 ü"
    ids = tokenizer.encode(text).ids
    texts = token_texts(ids, lambda some: tokenizer.decode(list(some)))
    assert len(texts) == len(ids) and "".join(texts) == text
    assert texts[:3] == ("x", " th", "e")
    assert texts.count("") == 3  # two bytes of one character, one of the other


def test_bytes_that_are_no_text_are_shown_and_do_not_hold_up_the_rest() -> None:
    tokenizer = byte_level()
    lonely = tokenizer.encode("日").ids[0]
    ids = [*[lonely] * 20, *tokenizer.encode("end").ids]
    texts = token_texts(ids, lambda some: tokenizer.decode(list(some)))
    assert "".join(texts) == "\ufffd" * 20 + "end"


def test_pieces_keep_their_space_behind_another_piece() -> None:
    vocab = {"<unk>": 0, "▁Once": 1, "▁upon": 2, "s": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace()])
    assert token_texts([1, 2, 3], lambda some: tokenizer.decode(list(some))) == ("Once", " upon", "s")


def test_without_a_tokenizer_numbers_stand_for_tokens() -> None:
    assert token_texts([5, 77], None) == ("⟨5⟩", "⟨77⟩")


def test_facts_compare_the_tokens_that_both_models_have_a_loss_of() -> None:
    facts = view_facts(EXAMPLE)
    assert facts["compared_tokens"] == 4
    assert facts["before"] == pytest.approx(6.5 / 4) and facts["after"] == pytest.approx(7.55 / 4)
    assert facts["change"] == pytest.approx(1.05 / 4)
    assert facts["tokens"][2] == {"text": " lessee", "before": 1.0, "after": 4.0, "change": 3.0}
    assert facts["tokens"][5]["change"] is None


@pytest.mark.parametrize(("change", "expected"), [(None, 0), (0.05, 0), (-0.1, 1), (0.7, 2), (-1.0, 3), (9.0, 4)])
def test_a_larger_change_has_a_stronger_colour(change: float | None, expected: int) -> None:
    assert strength(change) == expected


def test_the_largest_changes_come_first_and_by_their_sign() -> None:
    assert largest(EXAMPLE, lost=True) == [2, 1]
    assert largest(EXAMPLE, lost=False) == [3]


def test_the_terminal_shows_text_as_text_and_colours_only_what_changed() -> None:
    plain, colours = terminal(EXAMPLE), terminal(EXAMPLE, colour=True)
    assert "law document 7, base to step 500: +0.2625 nats per token" in plain
    assert "<s>The lessee <b>shall</b>↵" in plain
    assert "+3.000" in plain and "-2.000" in plain
    body = colours.splitlines()[3]
    assert re.search(r"48;2;217;95;2m lessee", body) and re.search(r"48;2;31;104;200m <b>shall</b>", body)
    assert body.startswith("<s>The\x1b[")
    assert "\x1b" not in terminal(view(["\x1b[2J"], [None], [None]))


class Outline(HTMLParser):
    """Tags and visible text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_escapes_the_document_and_needs_nothing_from_outside() -> None:
    hostile = "</div><script>alert(1)</script><img src=x onerror='alert(2)'>&amp;\"{body}"
    page = html_page(view(["a", hostile], [None, 1.0], [None, 3.0], source='<script>"law"'))
    outline = Outline()
    outline.feed(page)
    assert hostile in outline.text
    assert "script" not in outline.tags and "img" not in outline.tags and outline.links == []
    assert page.count('class="l4"') == 3  # the key, the text, the list
    assert 'title="1.000 to 3.000 (+2.000)"' in page
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page


def test_a_document_that_was_cut_says_how_much_is_missing() -> None:
    cut = replace(EXAMPLE, document_tokens=20_000)
    assert "19,994 more tokens" in terminal(cut) and "19,994 more tokens are not shown" in html_page(cut)


def test_a_page_of_a_document_without_losses_is_a_page() -> None:
    page = html_page(view(["a"], [None], [None]))
    assert "no token with a finite loss" in page and "<h2>" not in page
