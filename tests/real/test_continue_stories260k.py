"""A real pre-trained model, stories260K, is continued on school mathematics with and without replay of TinyStories."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Workshop = Any  # the fixtures of tests/conftest.py
SHARED = Path(os.environ.get("CPT_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
WEIGHTS = SHARED / "weights/stories260K"
pytestmark = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"{WEIGHTS} is absent; set CPT_SHARED_DATA")
STEPS = 40


@pytest.fixture(scope="session")
def losses(made_once: Callable[..., Workshop]) -> dict[str, dict[str, dict[str, Any]]]:
    """run -> "before" or "after" -> source -> what was measured."""

    def make(shop: Workshop) -> None:
        import zstandard

        for source, corpus, domain in (("stories", "en_tinystories", "general"), ("math", "math_gsm8k", "math")):
            file = shop.root / f"{source}.jsonl"
            with zstandard.open(SHARED / f"corpora/{corpus}/train.jsonl.zst", "rt", encoding="utf-8") as lines:
                file.write_text("".join(itertools.islice(lines, 1000)), encoding="utf-8")
            request = ["--tokenizer", WEIGHTS, "--out", shop.root / source, "--source", source, "--domain", domain]
            done = shop.cpt("data", "tokenize", "--input", file, *request, "--heldout-fraction", "0.05")
            assert done.code == 0, done.text
        found = {}
        for name, share in (("no_replay", 0.0), ("replay", 0.25)):
            fields = {
                "model.fresh": None,
                "model.init_from": str(WEIGHTS),
                "data.stores": {source: str(shop.root / source) for source in ("stories", "math")},
                "data.seq_len": 256,
                "replay.share_general": share,
                "train.tokens": STEPS * 2048,
                "train.global_batch_tokens": 2048,
                "train.micro_batch_size": 8,
                "train.peak_lr": 2e-3,
                "train.schedule": {"name": "rewarm_cosine", "warmup_steps": 3},
                "eval.tokens_per_source": 8192,
                "log.every_steps": 20,
            }
            done = shop.cpt("train", shop.run_file(name, fields))
            assert done.code == 0, done.text
            when = {"before": 0, "after": STEPS}
            found[name] = {key: shop.evaluation(name, step)["sources"] for key, step in when.items()}
        (shop.root / "losses.json").write_text(json.dumps(found))

    return dict(json.loads((made_once("stories260k", make).root / "losses.json").read_text()))


def test_the_domain_loss_falls_with_and_without_replay(losses: dict[str, Any]) -> None:
    for run in losses.values():
        assert run["before"]["math"]["group"] == "domain"
        assert run["after"]["math"]["loss"] < run["before"]["math"]["loss"] - 0.5


def test_before_training_it_is_the_known_model(losses: dict[str, Any]) -> None:
    for run in losses.values():
        assert run["before"]["stories"]["loss"] == pytest.approx(1.6, abs=0.15)


def test_with_replay_it_forgets_less_at_a_small_price(losses: dict[str, Any]) -> None:
    change = {
        name: {source: run["after"][source]["loss"] - run["before"][source]["loss"] for source in ("stories", "math")}
        for name, run in losses.items()
    }
    assert change["no_replay"]["stories"] > 0.2
    assert change["replay"]["stories"] < change["no_replay"]["stories"] / 2
    assert change["replay"]["math"] < 0.85 * change["no_replay"]["math"]  # both negative
