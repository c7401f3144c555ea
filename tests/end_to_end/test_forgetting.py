"""What replay is for: a tiny model that knows one Markov chain is continued on another, with 0, 5, 25 and 50% of the first.

The order is that of arXiv 2403.08763: the more replay, the lower the old loss, at a small price in the new one.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

Workshop = Any  # the fixtures of tests/conftest.py
SHARES = (0.0, 0.05, 0.25, 0.5)
BASE_STEPS, STEPS, STEP_TOKENS, SEQ_LEN, STATES = 60, 60, 1024, 32, 24


def chain(seed: int, *, num_documents: int) -> list[list[int]]:
    """Documents of 60 tokens from a Markov chain with few likely successors; the two chains share their states."""
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.full(STATES, 0.15), size=STATES)
    cumulated = transitions.cumsum(axis=1)
    states = rng.integers(STATES, size=num_documents)
    columns = []
    for draw in rng.random((60, num_documents)):
        states = np.minimum((cumulated[states] < draw[:, None]).sum(axis=1), STATES - 1)
        columns.append(states + 1)
    return [list(map(int, document)) for document in np.stack(columns, axis=1)]


@pytest.fixture(scope="session")
def outcomes(made_once: Callable[..., Workshop]) -> dict[float, dict[str, float]]:
    """Final held-out loss of both sources by replay share, and of the base under -1."""

    def make(shop: Workshop) -> None:
        for name, domain, seed in (("old", "general", 1), ("new", "code", 2)):
            documents = chain(seed, num_documents=1200)
            shop.store(name, domain=domain, train=documents[:1100], heldout=documents[1100:])
        common = {
            "data.stores": {name: str(shop.root / name) for name in ("old", "new")},
            "data.seq_len": SEQ_LEN,
            "train.global_batch_tokens": STEP_TOKENS,
            "train.micro_batch_size": 32,
            "train.schedule": {"name": "rewarm_cosine", "warmup_steps": 4},
            "eval.tokens_per_source": 4096,
            "log.every_steps": 20,
        }
        base = {**common, "train.tokens": BASE_STEPS * STEP_TOKENS, "replay.share_general": 1.0}
        assert shop.cpt("train", shop.run_file("base", base)).code == 0
        origin = shop.run_dir("base") / f"checkpoints/step_{BASE_STEPS:08d}"
        for share in SHARES:
            fields = {"model.fresh": None, "model.init_from": str(origin), "replay.share_general": share}
            file = shop.run_file(f"replay_{share}", {**common, "train.tokens": STEPS * STEP_TOKENS, **fields})
            assert shop.cpt("train", file).code == 0
        found = {share: final_losses(shop, f"replay_{share}", STEPS) for share in SHARES}
        found[-1.0] = final_losses(shop, "base", BASE_STEPS)
        (shop.root / "outcomes.json").write_text(json.dumps(found))

    text = (made_once("forgetting", make).root / "outcomes.json").read_text()
    return {float(share): losses for share, losses in json.loads(text).items()}


def final_losses(shop: Workshop, name: str, step: int) -> dict[str, float]:
    return {source: facts["loss"] for source, facts in shop.evaluation(name, step)["sources"].items()}


def test_the_old_loss_falls_strictly_with_the_share_replayed(outcomes: dict[float, dict[str, float]]) -> None:
    old = [outcomes[share]["old"] for share in SHARES]
    assert all(less > more + 0.01 for less, more in pairwise(old)), old
    assert old[0] > outcomes[-1.0]["old"] + 0.3  # without replay it forgets


def test_the_new_loss_rises_with_the_share_replayed_but_little(outcomes: dict[float, dict[str, float]]) -> None:
    new = [outcomes[share]["new"] for share in SHARES]
    assert all(less < more + 0.005 for less, more in pairwise(new)), new
    gain = outcomes[-1.0]["new"] - new[0]
    assert gain > 0.5
    assert new[2] - new[0] < 0.25 * gain  # a quarter of replay costs a part of the gain


def test_a_quarter_replayed_undoes_most_of_the_forgetting(outcomes: dict[float, dict[str, float]]) -> None:
    base, none, quarter = (outcomes[share]["old"] for share in (-1.0, 0.0, 0.25))
    assert quarter - base < (none - base) / 3
