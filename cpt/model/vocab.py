"""The rows of a model's vocabulary: made for new tokens before anything is sharded, and looked over at every start.

A token's row is its input embedding and, where the head is not tied to it, its row (and bias) in the output head.
New tokens may land on padded rows that the model has already; those are made new like any other. Old rows are not
touched, so the old tokens' logits stay what they were for a text without new tokens. Refuses a model with fewer rows
than the base tokenizer has tokens, and rows that come out zero or not finite.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cpt.config import ConfigError, Problem
from cpt.data.vocabulary import VocabularyExtension
from cpt.model.build import LoadedModel

PADDED_TO = 64  # a model whose rows are a multiple of this keeps to it
ODD_NORM = 10.0  # a row this many times shorter or longer than the median one was hardly trained, or went astray
_SHOWN = 8


Subtokens = Sequence[tuple[int, ...]]  # of each new token


def mean_of_subtokens(rows_VD: Tensor, subtokens: Subtokens) -> Tensor:
    """The mean of what stood in the new token's place: the model starts from what it knows (arXiv 2407.05841)."""
    return torch.stack([rows_VD[list(parts)].mean(0) for parts in subtokens])


def mean_of_all(rows_VD: Tensor, subtokens: Subtokens) -> Tensor:
    """The mean of all old rows: bounds what a new token takes from the others' probability, knows nothing of it."""
    return rows_VD.mean(0).expand(len(subtokens), *rows_VD.shape[1:])


RowInitializer = Callable[[Tensor, Subtokens], Tensor]  # all new rows of a table at once
INITIALIZERS: dict[str, RowInitializer] = {"mean_of_subtokens": mean_of_subtokens, "mean_of_all": mean_of_all}


@dataclass(frozen=True)
class VocabularyReport:
    """Rows of the model against tokens of the tokenizer; ``odd``: ids of tokens whose row is far off in length."""

    tokens: int
    rows: int
    tied: bool
    new_tokens: int = 0
    odd: tuple[int, ...] = ()

    def render(self) -> str:
        line = f"vocabulary: {self.tokens:,} tokens, {self.rows:,} rows, head {'tied' if self.tied else 'of its own'}"
        if self.new_tokens:
            line += f", {self.new_tokens:,} rows made for new tokens"
        if self.rows > self.tokens:
            line += f", rows {self.tokens:,} to {self.rows - 1:,} are padding"
        if self.odd:
            shown = ", ".join(map(str, self.odd[:_SHOWN])) + (" ..." if len(self.odd) > _SHOWN else "")
            line += f"; {len(self.odd):,} tokens have a row {ODD_NORM:g} times off the median length (ids {shown})"
        return line


def extend_vocabulary(
    loaded: LoadedModel, extension: VocabularyExtension, *, initializer: RowInitializer = mean_of_subtokens
) -> LoadedModel:
    """``loaded`` with rows for the tokens of ``extension``: in place, on its device, before an engine takes it.

    Raises:
        ConfigError: the model has fewer rows than the base tokenizer has tokens.
        RuntimeError: a new row is zero or not finite.
    """
    model: Any = loaded.model
    num_old = len(model.get_input_embeddings().weight)
    if num_old < extension.base_vocab_size:
        rule = f"its {num_old} rows do not cover the {extension.base_vocab_size} tokens of {extension.base_name}"
        raise ConfigError(Problem("model.init_from", loaded.report.origin, rule, "give the model of that tokenizer"))
    num_rows = _padded(extension.vocab_size, num_old)
    if num_rows > num_old:
        with torch.random.fork_rng(devices=[]):  # transformers draws rows that are overwritten below
            model.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        for name, rows in _row_tensors(model):
            base = rows[: extension.base_vocab_size].float()
            rows[num_old:] = base.mean(0).to(rows.dtype)
            made = initializer(base, extension.subtokens)
            rows[extension.base_vocab_size : extension.vocab_size] = made.to(rows.dtype)
            _check_new(rows, extension, name)
    total = sum(parameter.numel() for parameter in model.parameters())
    report = replace(loaded.report, parameters=total)
    return with_vocabulary(LoadedModel(model, report), tokens=extension.vocab_size, new_tokens=len(extension.subtokens))


def with_vocabulary(loaded: LoadedModel, *, tokens: int, new_tokens: int = 0) -> LoadedModel:
    """``loaded`` with a line on its rows in the report; to be called while the weights are whole."""
    found = replace(look_over(loaded.model, tokens=tokens), new_tokens=new_tokens)
    return LoadedModel(loaded.model, replace(loaded.report, vocabulary=found.render()))


def look_over(model: Any, *, tokens: int) -> VocabularyReport:
    """Count the rows and find tokens whose input row is zero, not finite or of another size than the rest."""
    rows_VD = model.get_input_embeddings().weight.detach()
    norms_V = rows_VD[:tokens].float().norm(dim=1)
    middle = norms_V.median()
    odd_V = ~((norms_V >= middle / ODD_NORM) & (norms_V <= middle * ODD_NORM))
    return VocabularyReport(tokens, len(rows_VD), is_tied(model), odd=tuple(odd_V.nonzero().flatten().tolist()))


def is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def _row_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What has one entry per token; tied weights once."""
    yield "input", model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if not is_tied(model):
        yield "output", head.weight
    if getattr(head, "bias", None) is not None:
        yield "output bias", head.bias


def _padded(needed: int, old: int) -> int:
    if needed <= old:
        return old
    return needed if old % PADDED_TO else -(-needed // PADDED_TO) * PADDED_TO


def _check_new(rows: Tensor, extension: VocabularyExtension, name: str) -> None:
    new = rows[extension.base_vocab_size : extension.vocab_size].float().reshape(len(extension.subtokens), -1)
    bad = ~(new.isfinite().all(1) & ((new != 0).any(1) | torch.tensor(name == "output bias", device=new.device)))
    if bad.any():
        ids = [extension.base_vocab_size + i for i in bad.nonzero().flatten().tolist()[:_SHOWN]]
        raise RuntimeError(
            f"the new {name} rows of tokens {ids} are zero or not finite: the base model's rows are damaged"
        )
