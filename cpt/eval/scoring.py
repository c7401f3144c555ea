"""Questions about continuations, answered by a model that is held by all ranks of a job together.

Rank 0 asks, whenever it likes; the other ranks follow: they wait for the questions, make the same number of forward
passes, and wait again. So what asks (lm_eval: tasks, prompts, metrics) runs on one rank, and no two ranks can come to
different questions. Rows are dealt out like those of the held-out evaluation (``cpt.eval.perplexity``); ranks without
a row left take blank ones, so that the collectives of ZeRO-3 stay in step. Logits are made for the asked places only.

A stop that any rank was asked for ends the passes on all of them. What fails on rank 0 between passes is told to the
others; what fails inside a pass is not, for they may be in another collective call: such a rank must end.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cpt.checkpoint.agreed import from_first
from cpt.data.batch import collate
from cpt.data.place import Place
from cpt.eval.scored_rows import AskingRow, Question, asking_rows, blank_row, row_length
from cpt.train.loss_head import forward_scores
from cpt.train.token_scores import Asked

T = TypeVar("T")


class StoppedError(Exception):
    """All ranks agreed to stop before every question was answered."""


class AskingError(RuntimeError):
    """What rank 0 does with the answers failed between two passes; raised on all ranks, which may go on together."""


@dataclass(frozen=True)
class Answer:
    """Of each wanted token in order: its log-probability in nats, and whether it is the likeliest at its place."""

    log_ps: tuple[float, ...]
    likeliest: tuple[bool, ...]

    @property
    def log_p(self) -> float:
        """Of the whole answer, nats."""
        return math.fsum(self.log_ps)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding gives the answer."""
        return all(self.likeliest)


@dataclass(frozen=True)
class ScoringSpec:
    """How passes are made: ``micro_batch_size`` rows of ``seq_len`` tokens a pass, for each rank or group of ranks that
    share rows; fewer rows where a question makes them longer.
    """

    seq_len: int
    micro_batch_size: int
    backend: str
    device: torch.device
    place: Place


class Scorer:
    """Answers questions by a model; ``lead`` is called by every rank."""

    def __init__(self, model: torch.nn.Module, spec: ScoringSpec, *, should_stop: Callable[[], bool]) -> None:
        """``should_stop`` is asked before every pass by every rank, and must answer all of them alike."""
        self._model, self._spec, self._should_stop = model, spec, should_stop
        self._in_passes = False

    def lead(self, work: Callable[[], T]) -> T | None:
        """Do ``work`` on rank 0, where it may call ``answer``; the other ranks follow it and get None.

        The model is in eval mode meanwhile. Raises:
            StoppedError: on all ranks.
            AskingError: on all ranks, where ``work`` failed between passes; on rank 0 with its cause.
        """
        was_training = self._model.training
        self._model.eval()
        try:
            if self._spec.place.rank == 0:
                return self._ask(work)
            self._follow()
            return None
        finally:
            self._model.train(was_training)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers in order; rank 0 alone calls it, inside ``lead``. Raises StoppedError."""
        self._tell(questions)
        return self._answer(questions)

    def _ask(self, work: Callable[[], T]) -> T:
        try:
            result = work()
        except StoppedError:
            raise
        except Exception as error:  # whatever it was, the other ranks wait for what comes next
            if self._in_passes:
                raise
            reason = f"{type(error).__name__}: {error}"
            self._tell(reason)
            raise AskingError(reason) from error
        self._tell(None)
        return result

    def _follow(self) -> None:
        while (told := self._tell(None)) is not None:
            if isinstance(told, str):
                raise AskingError(told)
            self._answer(told)

    def _tell(self, message: Sequence[Question] | str | None) -> Sequence[Question] | str | None:
        """Rank 0's questions, why it failed, or None at the end. A collective call."""
        told: Sequence[Question] | str | None = from_first(message, self._spec.place.world_size)
        return told

    def _answer(self, questions: Sequence[Question]) -> list[Answer]:
        self._in_passes = True
        log_ps, likeliest = self._passes(questions).tolist()
        self._in_passes = False
        ends = itertools.accumulate((len(each.wanted) for each in questions), initial=0)
        parts = [slice(*pair) for pair in itertools.pairwise(ends)]
        return [Answer(tuple(log_ps[part]), tuple(map(bool, likeliest[part]))) for part in parts]

    @torch.no_grad()
    def _passes(self, questions: Sequence[Question]) -> Tensor:
        """(2, wanted tokens of all questions), on all ranks: log-probability; 1 where the token is the likeliest."""
        spec, place = self._spec, self._spec.place
        length = row_length(questions, spec.seq_len, shared_by=place.sequence_parallel)
        rows, blank = asking_rows(questions, length), blank_row(length)
        rows_per_pass = max(1, spec.micro_batch_size * spec.seq_len // length)
        scores = torch.zeros(2, sum(len(each.wanted) for each in questions), device=spec.device)
        for first in range(0, len(rows), place.num_readers * rows_per_pass):
            if self._should_stop():
                self._in_passes = False
                raise StoppedError
            start = first + place.reader * rows_per_pass
            own = [rows[number]() if number < len(rows) else blank for number in range(start, start + rows_per_pass)]
            self._pass(own, scores)
        if place.world_size > 1:
            dist.all_reduce(scores)  # each was filled in by one rank, and is 0 on the others
        return scores

    def _pass(self, rows: Sequence[AskingRow], scores: Tensor) -> None:
        spec = self._spec
        whole = collate([each.row for each in rows], [0] * len(rows))
        batch = whole.held_by(spec.place).to(spec.device)
        asked, numbers = _asked(rows, spec.place, spec.device)
        scores[:, numbers] = forward_scores(self._model, batch, asked, spec.backend).T


def _asked(rows: Sequence[AskingRow], place: Place, device: torch.device) -> tuple[Asked, Tensor]:
    """What is asked at the positions that this rank holds, and the numbers of these wanted tokens."""
    held = place.positions(len(rows[0].row.input_ids))
    width = held.stop - held.start
    columns: list[list[int]] = [[], [], []]
    for number, each in enumerate(rows):
        own = (each.places >= held.start) & (each.places < held.stop)
        columns[0] += (each.places[own] - held.start + number * width).tolist()
        columns[1] += each.tokens[own].tolist()
        columns[2] += each.numbers[own].tolist()
    places, tokens, numbers = torch.tensor(columns, dtype=torch.int64).to(device)
    return Asked(places, tokens), numbers
