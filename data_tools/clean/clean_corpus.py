"""``cpt data clean``: the rules of a YAML over raw files as a stage, or over a sample of them to see what they do.

A dry run lets every rule judge every document of the sample, also one that an earlier rule rejects, so that the
effect of each can be seen by itself, with its speed.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from data_tools.clean.rules import RULES, identity_of, load_rules, step_maker
from data_tools.corpus.document import BadRecord, Document, Reject, Step
from data_tools.corpus.stage import EXAMPLES, StageRequest
from data_tools.corpus.stage_view import render_summary, run_stage_with_progress
from data_tools.sources import ReadOptions, read_documents, resolve_inputs

_EXCERPT = 240  # characters


@dataclass(frozen=True)
class CleanRequest:
    config: Path
    inputs: tuple[str, ...]
    out: Path
    read: ReadOptions = field(default_factory=ReadOptions)
    workers: int = 1
    task: tuple[int, int] = (0, 1)


def clean(request: CleanRequest) -> dict[str, Any]:
    """Run the stage with a progress bar; its summary.

    Raises:
        ConfigError: everything that is wrong with the rules.
        DataError: bad input, a folder that holds something else.
    """
    chosen = load_rules(request.config)
    step_maker(chosen)()  # a missing package or a damaged model is told before any worker starts
    stage = StageRequest(
        "clean",
        request.inputs,
        request.out,
        identity_of(chosen),
        make_step=step_maker(chosen),
        read=request.read,
        workers=request.workers,
        task=request.task,
    )
    return run_stage_with_progress(stage)


@dataclass
class _RuleEffect:
    rejects: int = 0
    changed: int = 0
    seconds: float = 0.0


def try_rules(request: CleanRequest, num_documents: int) -> dict[str, Any]:
    """What the rules do to the first documents of the inputs, an equal number of each; writes nothing."""
    chosen = load_rules(request.config)
    steps = [(name, RULES[name].build(settings)) for name, settings in chosen]
    effects = [_RuleEffect() for _ in steps]
    reasons: dict[str, dict[str, Any]] = {}
    records = kept = bytes_read = bytes_kept = 0
    for record in _sample(request, num_documents):
        document = Document(record.raw.decode("utf-8", "replace")) if isinstance(record, BadRecord) else record
        text, size = document.text, len(document.text.encode())
        first = Reject(record.reason, record.detail) if isinstance(record, BadRecord) else None
        for (_, apply), effect in zip(steps if first is None else (), effects, strict=False):
            reject = _judge(document, apply, effect)
            first = first or reject
        records, bytes_read = records + 1, bytes_read + size
        if first is None:
            kept, bytes_kept = kept + 1, bytes_kept + len(document.text.encode())
        else:
            _count(reasons, first, replace(document, text=text), size)
    rules = [
        {"rule": name, "rejects_alone": effect.rejects, "changed": effect.changed,
         "megabytes_per_second": round(bytes_read / 1e6 / effect.seconds, 2) if effect.seconds else None}
        for (name, _), effect in zip(steps, effects, strict=True)
    ]  # fmt: skip
    ordered = dict(sorted(reasons.items(), key=lambda item: (-item[1]["documents"], item[0])))
    return {
        "verb": "clean, dry run",
        "inputs": len(resolve_inputs(request.inputs)),
        "records": records,
        "documents": kept,
        "bytes_read": bytes_read,
        "bytes_kept": bytes_kept,
        "reasons": ordered,
        "rules": rules,
        "content_hash": "none: nothing is written",
    }


def _sample(request: CleanRequest, num_documents: int) -> Iterator[Document | BadRecord]:
    inputs = resolve_inputs(request.inputs)
    for number, entry in enumerate(inputs):
        share = num_documents * (number + 1) // len(inputs) - num_documents * number // len(inputs)
        yield from itertools.islice(read_documents(entry, request.read), share)


def _judge(document: Document, apply: Step, effect: _RuleEffect) -> Reject | None:
    before = document.text
    start = time.process_time()
    reject = apply(document)
    effect.seconds += time.process_time() - start
    if reject is not None:
        document.text = before  # the rules after it see what they would see without it
        effect.rejects += 1
    elif document.text != before:
        effect.changed += 1
    return reject


def _count(reasons: dict[str, dict[str, Any]], reject: Reject, document: Document, size: int) -> None:
    entry = reasons.setdefault(reject.reason, {"documents": 0, "bytes": 0, "examples": []})
    entry["documents"] += 1
    entry["bytes"] += size
    if len(entry["examples"]) < EXAMPLES:
        excerpt = document.text[:_EXCERPT]
        entry["examples"].append({"origin": document.origin, "detail": reject.detail, "excerpt": excerpt})


def render_trial(facts: Mapping[str, Any]) -> RenderableType:
    """The table of a stage, then one line per rule."""
    table = Table(title="each rule by itself", title_justify="left")
    table.add_column("rule")
    for name in ("rejects alone", "changes", "MB/s per core"):
        table.add_column(name, justify="right")
    for rule in facts["rules"]:
        speed = rule["megabytes_per_second"]
        shown = "" if speed is None else f"{speed:,.1f}"
        table.add_row(rule["rule"], f"{rule['rejects_alone']:,}", f"{rule['changed']:,}", shown)
    return Group(render_summary(facts), table)


def render_rules(rules: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What ``list_rules`` says, as a table."""
    table = Table(title="rules of cpt data clean; null switches a threshold off", title_justify="left")
    for name in ("rule", "field", "default", "what it is"):
        table.add_column(name)
    for rule in rules:
        table.add_row(rule["rule"], "", "", rule["source"], style="bold")
        for entry in rule["fields"]:
            table.add_row("", entry["field"], str(entry["default"]), entry["description"])
    return table
