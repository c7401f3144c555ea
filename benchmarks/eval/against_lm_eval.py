"""A suite against the plain ``lm_eval`` command: the same exported folder, the same items, every number equal.

    python -m benchmarks.eval.against_lm_eval        writes benchmarks/results/eval_against_lm_eval.json

One command per task, as cpt scores one task at a time: which rows share a batch moves the last digits of a
log-likelihood. Compared: every metric as it is printed (4 decimals) and in full, standard errors of means, the
log-likelihood of every continuation and every generated text. Bar: equal to the last digit printed.
Needs ../shared/data; ten minutes on 2 cores. ``--limit N``: the first N items of each task only.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.result import write_result
from benchmarks.eval.plain_command import (
    BATCH_SIZE,
    Asked,
    asked_tasks,
    export_stories,
    read_plain,
    run_plain,
    write_plain_tasks,
)
from cpt.eval.harness_process import CountingLM, Request, open_model
from cpt.eval.harness_tasks import find_tasks, score
from cpt.eval.suite import load_suite


class Recording(CountingLM):
    """Keeps what it answered by (context, continuation); a generation has no continuation."""

    answers: dict[tuple[str, str], Any]

    def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().loglikelihood(requests, *args, **kwargs)
        self.answers |= {tuple(request.args): answer[0] for request, answer in zip(requests, found, strict=True)}
        return found

    def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().generate_until(requests, *args, **kwargs)
        self.answers |= {(request.args[0], ""): answer for request, answer in zip(requests, found, strict=True)}
        return found


def ours(model: Path, tasks: Sequence[Asked], scratch: Path) -> dict[str, dict[str, Any]]:
    """Task -> metrics with standard errors, and answers by request: what the process of a suite computes."""
    raw = {"name": "bench", "batch_size": BATCH_SIZE, "groups": {"all": [task.for_suite() for task in tasks]}}
    (scratch / "suite.yaml").write_text(json.dumps(raw))
    suite = load_suite(scratch / "suite.yaml")
    entries = tuple(entry for _, entry in suite.tasks())
    request = Request(
        model=model, dtype="fp32", device="cpu", batch_size=suite.batch_size, seed=suite.seed, entries=entries,
        copying=False, scratch=scratch,
    )  # fmt: skip
    language_model: Any = open_model(request)
    language_model.__class__ = Recording
    results = {}
    with torch.inference_mode():
        for found in find_tasks(entries, scratch):
            language_model.answers = {}
            outcome = score(found, language_model, seed=suite.seed, truncated=language_model.truncated)
            results[found.label] = {"metrics": outcome.tasks[0].metrics, "answers": language_model.answers}
    return results


def requests_of(sample: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Any]]:
    """((context, continuation), answer) of everything that the plain command logged of an item."""
    for number, answers in enumerate(sample["resps"]):
        arguments = sample["arguments"][f"gen_args_{number}"]
        is_text = isinstance(arguments["arg_1"], dict)
        key = (arguments["arg_0"], "" if is_text else arguments["arg_1"])
        yield key, answers[0] if is_text else float(answers[0][0])


def compare(own: Mapping[str, Any], plain: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    logged = dict(pair for sample in samples for pair in requests_of(sample))
    pairs = [(own["answers"].get(key), answer) for key, answer in logged.items()]
    lost = sum(found is None for found, _ in pairs)
    apart = [abs(a - b) for a, b in pairs if isinstance(a, float)]
    metrics = {}
    for name, found in own["metrics"].items():
        key = name if "," in name else f"{name},none"
        value, error = plain[key], plain.get(key.replace(",", "_stderr,", 1))
        metrics[name] = {
            "ours": found.value,
            "lm_eval": value,
            "printed_equal": f"{found.value:.4f}" == f"{value:.4f}",
            "equal": found.value == value,
            "stderr_ours": found.stderr,
            "stderr_lm_eval": error if isinstance(error, float) else None,
        }
    return {
        "items": len({sample["doc_id"] for sample in samples}),
        "requests": len(pairs),
        "answers_equal": lost == 0 and all(a == b for a, b in pairs),
        "largest_loglikelihood_difference": max(apart, default=0.0),
        "metrics": metrics,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = export_stories(scratch / "model")
        tasks = asked_tasks(scratch, limit=options.limit)
        mine = ours(model, tasks, scratch)
        found = {}
        for task in tasks:
            folder = scratch / "plain" / task.task
            write_plain_tasks([task], folder)
            run_plain(model, [task], folder, limit=task.limit)
            found[task.task] = compare(mine[task.task], *read_plain(folder, task.task))
            print(task.task, json.dumps(found[task.task]), flush=True)
    met = all(
        one["answers_equal"] and all(metric["printed_equal"] for metric in one["metrics"].values())
        for one in found.values()
    )
    errors = [
        (metric["stderr_ours"], metric["stderr_lm_eval"])
        for one in found.values()
        for key, metric in one["metrics"].items()
        if metric["stderr_lm_eval"] is not None and not key.startswith("perplexity")
    ]
    figures = {
        "bar": "every metric equal as printed, every log-likelihood and text equal",
        "met": met,
        "limit": options.limit,
        "standard_errors_of_means_equal": all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in errors),
        "tasks": found,
    }
    write_result("eval_against_lm_eval.json", figures)


if __name__ == "__main__":
    main()
