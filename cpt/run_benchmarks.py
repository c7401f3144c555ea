"""When a run measures its benchmarks on the model in training, and what becomes of the results.

Every rank does its part of the forward passes; rank 0 alone knows the tasks (``cpt.eval.live_suite``) and writes. A
run's losses are the same bits with benchmarks and without: the weights are only read, the model's mode and all random
states are put back. What fails after the first measurement is told and the run goes on: it is worth more than one
point of a curve.
"""

import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from cpt.checkpoint.agreed import from_first
from cpt.config import ConfigError
from cpt.data.place import Place
from cpt.eval.geometric_grid import geometric_steps
from cpt.eval.live_suite import LiveSuite, open_live_suite
from cpt.eval.results import SuiteRecord, record_file
from cpt.eval.scoring import AskingError, Scorer, ScoringSpec, StoppedError
from cpt.eval.suite import load_suite
from cpt.eval.suite_files import Evaluated, check_same_suite, keep_outcome
from cpt.live_run import Run
from cpt.prepare import tokenizer_path
from cpt.rundir import DataError
from cpt.suite_rules import FIELD, cannot_generate
from cpt.train.hooks import Hook
from cpt.train.stepinfo import StepInfo


def open_benchmarks(run: Run) -> LiveSuite | None:
    """The suite with its tasks, at rank 0 of a run that has one; None elsewhere.

    Raises:
        whatever rank 0 finds wrong, on every rank: ConfigError, DataError, RuntimeError.
    """
    if run.config.eval.suite is None:
        return None
    opened: LiveSuite | None = None
    refusal: Exception | None = None
    if run.topology.rank == 0:
        try:
            with _random_states_kept():
                opened = _open(run)
        except (ConfigError, DataError, RuntimeError, OSError) as error:
            refusal = error
    refusal = from_first(refusal, run.topology.world_size)
    if refusal is not None:
        raise refusal
    return opened


def _open(run: Run) -> LiveSuite:
    path, tokenizer = run.config.eval.suite, tokenizer_path(run.config)
    assert path is not None and tokenizer is not None, "cpt.suite_rules refuses a run without them"
    suite = load_suite(path)
    check_same_suite(run.rundir.evals / suite.name, suite, field=FIELD)
    opened = open_live_suite(suite, tokenizer, run.loaded.model.config)
    if opened.generating:
        opened.close()
        raise ConfigError(cannot_generate(path, opened.generating))
    return opened


def benchmark_steps(run: Run) -> frozenset[int]:
    """The base (0) and the steps of ``eval.suite_steps``; none of a run without a suite."""
    section = run.config.eval
    if section.suite is None:
        return frozenset()
    stated = section.suite_steps
    return frozenset({0, *(geometric_steps(run.prepared.plan.num_steps) if stated == "geometric" else stated)})


def benchmark_hook(run: Run) -> Hook:
    return Hook(lambda info: measure_now(run, info), at=benchmark_steps(run))


def benchmarks_are_missing(run: Run, step: int) -> bool:
    """Due at ``step`` but not in the run folder; as rank 0 sees it, for all ranks must measure or none."""
    if step not in benchmark_steps(run):
        return False
    missing = run.suite is not None and not record_file(run.rundir.evals / run.suite.suite.name, step).exists()
    return bool(from_first(missing, run.topology.world_size))


def measure_now(run: Run, info: StepInfo) -> None:
    """Measure every task of the suite and write what was found; every rank calls it.

    Raises:
        what a task raised, at step 0, where nothing is lost yet; AskingError on the other ranks.
    """
    if run.stop.is_agreed:  # the evaluation before was cut short
        run.evaluation_cut_short = True
        return
    started = time.perf_counter()
    scorer = Scorer(run.engine.model, _spec(run), should_stop=lambda: _asked_to_stop(run))
    record: SuiteRecord | None = None
    with run.phases("evaluation"), _random_states_kept():
        try:
            record = scorer.lead(lambda: _measure(run, scorer, info))
        except StoppedError:
            run.evaluation_cut_short = True
        except AskingError as error:
            if info.step == 0:
                raise (error.__cause__ or error) from None
            _failed(run, info.step, str(error))
    if record is not None:
        seconds = round(time.perf_counter() - started, 3)
        scores = {name: group.accuracy for name, group in record.groups.items()}
        run.event("suite", info.step, suite=record.suite, seconds=seconds, scores=scores)
        shown = "  ".join(f"{name} {score:.3f}" for name, score in scores.items() if score is not None)
        print(f"benchmarks {record.suite} after step {info.step}: {shown}", flush=True)


def _measure(run: Run, scorer: Scorer, info: StepInfo) -> SuiteRecord | None:
    """At rank 0. None where the record could not be written, as on a full disk."""
    assert run.suite is not None, "rank 0 opened the suite before the first step"
    suite, stores = run.suite.suite, run.prepared.train_stores.values()
    outcome = run.suite.measure(scorer, run.loaded.model.config)
    about = Evaluated(
        step=info.step,
        tokens_seen=info.tokens_seen,
        weights_hash=None,
        tokenizer=next(iter(stores)).manifest.tokenizer.fingerprint,
        dtype=run.config.train.precision,
    )
    try:
        return keep_outcome(run.rundir.evals / suite.name, outcome, suite, about, copying=outcome.copying)
    except OSError as error:
        _failed(run, info.step, f"the results could not be written: {error}")
        return None


def _failed(run: Run, step: int, reason: str) -> None:
    run.event("suite_failed", step, reason=reason)
    if run.topology.rank == 0:
        print(f"WARNING: no benchmarks after step {step}: {reason}", file=sys.stderr, flush=True)


def _spec(run: Run) -> ScoringSpec:
    topology, config = run.topology, run.config
    return ScoringSpec(
        seq_len=run.prepared.plan.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        backend=run.loaded.report.attention,
        device=topology.device,
        place=Place(topology.rank, topology.world_size, config.deepspeed.sequence_parallel),
    )


def _asked_to_stop(run: Run) -> bool:
    """Asked before every forward pass, of all ranks together, and so the place to say that the evaluation goes on."""
    run.phases.beat()
    return run.stop.agreed(run.topology.device)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """lm_eval seeds the generators of Python, numpy and torch as it likes."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
