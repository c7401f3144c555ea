"""The process that scores a suite's tasks: lm_eval on a Hugging Face folder, away from whatever asked for it.

    python -m cpt.eval.harness_process REQUEST.json

Reads a ``Request``; writes each finished entry's results (``cpt.eval.cache``) to ``scratch/outcomes/NUMBER`` and one
JSON line on standard output for it, at once, so that what is done survives what goes wrong later. What the user can
fix goes into ``scratch/fault.json`` with exit code 2, before any weights are loaded. Everything that libraries print
goes to standard error. Ends when the process that started it does, and clears ``scratch`` then, as nobody else would.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from pydantic import TypeAdapter

from cpt.eval.cache import write_outcome
from cpt.eval.copying import probe
from cpt.eval.harness_tasks import NotHereError, find_tasks, fitted, score
from cpt.eval.model_tokenizer import open_tokenizer
from cpt.eval.results import CopyingProbe
from cpt.eval.suite import SuiteTask
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError, write_atomic
from cpt.schedule_fields import Section

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Request(Section):
    """What to score: entries of a suite, and perhaps copying, on the model of a Hugging Face folder."""

    model: Path
    dtype: Literal["fp32", "bf16"]
    device: str
    batch_size: int
    seed: int
    entries: tuple[SuiteTask, ...]
    copying: bool
    scratch: Path


class CountingLM(HFLM):  # type: ignore[misc]
    """lm_eval's model of transformers, which keeps in mind what it had to cut to fit the context.

    ``truncated``: (context, continuation) of every such request; of a generation (context, ""). A continuation longer
    than the whole context, where lm_eval stops with an assertion, is cut from the left, too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.truncated: set[tuple[str, str]] = set()
        super().__init__(*args, **kwargs)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        fitting = [fitted(request, self.max_length, self.truncated) for request in requests]
        return super()._loglikelihood_tokens(fitting, *args, **kwargs)

    def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for request in requests:
            context, settings = request.args
            room = self.max_length - normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            if room < 1:
                rule = f"generates up to {self.max_length - room} tokens, the model has {self.max_length} positions"
                fix = "state fewer (max_new_tokens), or leave the task out"
                raise ConfigError(Problem(str(request.task_name), None, rule, fix))
            if len(self.tok_encode(context)) > room:
                self.truncated.add((context, ""))
        return super().generate_until(requests, *args, **kwargs)


def open_model(request: Request) -> CountingLM:
    """The folder's model, on its device, in its dtype."""
    return CountingLM(
        pretrained=str(request.model),
        tokenizer=open_tokenizer(request.model),
        device=request.device,
        dtype=DTYPES[request.dtype],
        batch_size=request.batch_size,
        local_files_only=True,
        use_safetensors=True,
    )


def run(request: Request, tell: Callable[[dict[str, Any]], None]) -> None:
    """Score every entry; ``tell`` is called with ``{"done": NUMBER}`` when the results of one are written, and with
    ``{"copying": FIELDS}`` of the probe.

    Raises:
        ConfigError, DataError: what ``find_tasks`` refuses.
        NotHereError: a data set or package that is not here.
    """
    found = find_tasks(request.entries, request.scratch)
    language_model = open_model(request)
    with torch.inference_mode():
        for number, one in enumerate(found):
            language_model.truncated.clear()
            outcome = score(one, language_model, seed=request.seed, truncated=language_model.truncated)
            write_outcome(request.scratch / "outcomes" / str(number), outcome)
            tell({"done": number})
        if request.copying:
            size = min(len(language_model.tokenizer), language_model.model.config.get_text_config().vocab_size)
            copied = probe(language_model.model, size, seed=request.seed, device=language_model.device)
            tell({"copying": TypeAdapter(CopyingProbe).dump_python(copied)})


def _leave_with_parent(scratch: Path) -> None:
    """End this process when the one that holds the other end of its standard input is gone, killed perhaps."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock, held by a waiting thread, aborts the interpreter's shutdown
            pass
        shutil.rmtree(scratch, ignore_errors=True)  # it may hold gigabytes of weights
        os._exit(143)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = Request.model_validate_json(Path(sys.argv[1]).read_bytes())
    _leave_with_parent(request.scratch)

    def tell(event: dict[str, Any]) -> None:
        told.write(json.dumps(event) + "\n")
        told.flush()

    try:
        run(request, tell)
    except ConfigError as error:
        problems = [[p.field, None if p.value is None else str(p.value), p.rule, p.fix] for p in error.problems]
        _leave(request, {"problems": problems})
    except DataError as error:
        _leave(request, {"data": str(error)})
    except NotHereError as error:
        _leave(request, {"environment": str(error)})


def _leave(request: Request, fault: dict[str, Any]) -> None:
    write_atomic(request.scratch / "fault.json", json.dumps(fault))
    sys.exit(2)


if __name__ == "__main__":
    main()
