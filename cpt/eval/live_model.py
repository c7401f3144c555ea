"""A model in training as lm_eval's language model: what ``HFLM`` does with an exported folder, without the export.

Owns how lm_eval's requests become questions (``cpt.eval.scored_rows``): tokenized as ``HFLM`` tokenizes, cut from the
left where they are longer than the model's context, texts of any length in windows that each predict their tokens
once. Forward passes are the scorer's (``cpt.eval.scoring``). Refuses to generate: token by token without a cache is no
work for a training job, and ``cpt eval watch`` does it beside one.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import configure_pad_token, has_bos_prefix, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cpt.eval.harness_tasks import Encoded, fitted
from cpt.eval.scored_rows import question
from cpt.eval.scoring import Scorer


class LiveModel(TemplateLM):  # type: ignore[misc]
    """lm_eval's view of a model under training, on rank 0 inside ``Scorer.lead``."""

    def __init__(self, scorer: Scorer, tokenizer: Any, model_config: Any) -> None:
        """``tokenizer``: of transformers, with a BOS or an EOS token; ``model_config`` of transformers tells how many
        positions there are.
        """
        super().__init__()
        self.tokenizer = configure_pad_token(tokenizer, model_config)
        self.max_length = resolve_max_length(model_config, tokenizer)
        self.truncated: set[tuple[str, str]] = set()  # requests of which the model did not read the beginning
        self._scorer = scorer

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, where there is one."""
        found = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if found is None else found)

    @cached_property
    def _prefix(self) -> str:
        return str(self.tokenizer.decode(self.prefix_token_id))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self._prefix):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether greedy decoding gives it) of each request."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **kwargs: Any) -> list[tuple[float, bool]]:
        fitting = [fitted(request, self.max_length, self.truncated) for request in requests]
        asked = [question(context, continuation, self.max_length) for _, context, continuation in fitting]
        return [(answer.log_p, answer.is_greedy) for answer in self._scorer.answer(asked)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each text in nats, every token predicted once."""
        windows = [self._windows(request.args[0]) for request in requests]
        found = iter(self._loglikelihood_tokens([window for each in windows for window in each]))
        return [sum(next(found)[0] for _ in each) for each in windows]

    def _windows(self, text: str) -> list[Encoded]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        raise NotImplementedError("a model in training does not generate; cpt eval watch does it beside the run")
