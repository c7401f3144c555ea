"""Training on best-fit rows and on views: a bucket, a curriculum; alone and together."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Workshop = Any  # the fixtures of tests/conftest.py
TWO_STEPS = {"train.tokens": 512}


@pytest.fixture
def shop(workshop: Workshop) -> Workshop:
    workshop.stores()
    uneven = [[1 + (i * j) % 60 for j in range(1 + i * i % 57)] for i in range(400)]
    workshop.store("uneven", domain="law", train=uneven, heldout=uneven[:20])
    return workshop


def curriculum(shop: Workshop) -> Path:
    """``code`` with its last document first."""
    from cpt.data.store_selection import open_split

    store = open_split(shop.root / "code" / "train")
    scores = shop.root / "scores.npy"
    np.save(scores, -np.arange(store.num_documents, dtype=np.float32))
    scores.with_suffix(".json").write_text(json.dumps({"store_content_hash": store.manifest.content_hash}))
    out: Path = shop.root / "ordered"
    done = shop.cpt("data", "view", shop.root / "code", "--scores", scores, "--order", "ascending", "--out", out)
    assert done.code == 0, done.text
    return out


def stores(shop: Workshop, **paths: Path) -> dict[str, str]:
    return {"prose": str(shop.root / "prose"), **{name: str(path) for name, path in paths.items()}}


def test_a_run_on_best_fit_rows_says_so_in_its_plan_and_resumes_to_the_same_loss(shop: Workshop) -> None:
    fields = {"data.stores": stores(shop, uneven=shop.root / "uneven"), "data.packing": "best_fit"}
    file = shop.run_file("best", {**TWO_STEPS, **fields, "checkpoint.every_steps": 1})
    dry = shop.cpt("train", file, "--dry-run", "--json")
    assert dry.code == 0, dry.text
    by_source = {facts["source"]: facts for facts in json.loads(dry.out)["packing"]}
    assert by_source["uneven"]["packing"] == "best_fit" and by_source["uneven"]["cut_needlessly"] == 0
    assert "needless" in shop.cpt("train", file, "--dry-run").out
    done = shop.cpt("train", file)
    assert done.code == 0, done.text
    assert all(np.isfinite(loss) for loss in shop.losses("best").values()) and len(shop.losses("best")) == 2
    assert (shop.root / "uneven" / "train" / "packs" / "best_fit_32").is_dir()
    plan = json.loads((shop.run_dir("best") / "plan.json").read_text())
    assert plan["packing"] == "best_fit"
    second = shop.losses("best")[2]
    shutil.rmtree(shop.run_dir("best") / "checkpoints" / "step_00000002")
    resumed = shop.cpt("resume", shop.run_dir("best"), f"data.pack_dir={shop.root / 'elsewhere'}")
    assert resumed.code == 0 and "resumes after step 1" in resumed.text, resumed.text
    assert shop.losses("best")[2] == second and (shop.root / "elsewhere").is_dir()
    again = shop.cpt("train", shop.run_file("concat", {**TWO_STEPS, **fields, "data.packing": "concat"}))
    other = json.loads((shop.run_dir("concat") / "plan.json").read_text())
    assert again.code == 0 and other["fingerprint"] != plan["fingerprint"]


def test_a_curriculum_is_read_in_its_order_beside_a_shuffled_source(shop: Workshop) -> None:
    from cpt.config import load_config
    from cpt.data.sampler import locate, rows_of_step
    from cpt.plan import read_plan
    from cpt.prepare import prepare

    fields = {"data.stores": stores(shop, ordered=curriculum(shop)), "data.packing": "best_fit"}
    file = shop.run_file("curriculum", {"train.tokens": 2048, **fields})
    prepared = prepare(load_config(file, ()))
    plan = prepared.plan
    at = locate(plan, np.concatenate([rows_of_step(plan, step) for step in range(plan.num_steps)]))
    ordered = [source.name for source in plan.sources].index("ordered")
    assert [source.in_order for source in plan.sources] == [name == "ordered" for name in fields["data.stores"]]
    rows = at.row_in_source[at.source_index == ordered].tolist()
    assert rows == list(range(len(rows))) and len(rows) > 30
    shuffled = at.row_in_source[at.source_index != ordered].tolist()
    assert shuffled != sorted(shuffled)
    last = prepared.train_stores["ordered"].store
    first_row = prepared.rows["ordered", plan.seq_len].row(0).input_ids.tolist()
    assert first_row == last.read(last.num_tokens - 41, last.num_tokens)[:32].tolist()
    done = shop.cpt("train", file)
    assert done.code == 0, done.text
    assert read_plan(shop.run_dir("curriculum") / "plan.json") == plan


def test_a_bucket_trains_like_a_store_and_a_changed_store_is_noticed(shop: Workshop) -> None:
    done = shop.cpt("data", "view", shop.root / "uneven", "--min-length", 20, "--out", shop.root / "long")
    assert done.code == 0, done.text
    fields = {"data.stores": stores(shop, long=shop.root / "long"), "data.packing": "best_fit"}
    done = shop.cpt("train", shop.run_file("bucket", {**TWO_STEPS, **fields}))
    assert done.code == 0, done.text
    assert set(shop.evaluation("bucket", 2)["sources"]) == {"prose", "long"}
    shop.store("uneven", domain="law", train=[[1, 2, 3]] * 500, heldout=[[1, 2]] * 20)
    refused = shop.cpt("train", shop.run_file("late", {**TWO_STEPS, **fields}))
    assert refused.code == 2 and "data.stores.long" in refused.text and "made anew" in refused.text
