"""`cpt data pack`: the consequences of packing, and the index built ahead of training."""

import json
from typing import Any

import pytest

from data_tools.pack_facts import pack_facts

Workshop = Any  # the fixtures of tests/conftest.py


@pytest.fixture
def shop(workshop: Workshop) -> Workshop:
    workshop.store("mixed", domain="law", train=[[1] * n for n in (1, 3, 3, 9, 30, 100)], heldout=[[1, 2]])
    return workshop


def test_a_dry_run_compares_both_rules_at_each_row_length_and_builds_nothing(shop: Workshop) -> None:
    done = shop.cpt("data", "pack", shop.root / "mixed", "--seq-len", 16, "--seq-len", 64, "--dry-run", "--json")
    (store,) = json.loads(done.out)["stores"]
    assert (store["documents"], store["tokens"], store["lengths"]["longest"]) == (6, 152, 101)
    assert [(effect["packing"], effect["seq_len"]) for effect in store["effects"]] == [
        ("concat", 16), ("best_fit", 16), ("concat", 64), ("best_fit", 64)
    ]  # fmt: skip
    by_rule = {(effect["packing"], effect["seq_len"]): effect for effect in store["effects"]}
    assert by_rule["best_fit", 16]["cut_documents"] == 2 and by_rule["best_fit", 64]["cut_documents"] == 1
    assert by_rule["concat", 64]["rows"] == 2 and by_rule["concat", 64]["lost_tokens"] == 152 - 128
    assert by_rule["best_fit", 64]["pad_tokens"] == 3 * 64 - 152
    assert not (shop.root / "mixed" / "train" / "packs").exists() and store["indexes"] == []


def test_the_histogram_counts_every_document_and_token_once(shop: Workshop) -> None:
    (store,) = pack_facts([shop.root / "mixed"], [16], build=False)["stores"]
    lengths = store["lengths"]
    assert [(row["from"], row["to"], row["documents"], row["tokens"]) for row in lengths["histogram"]] == [
        (2, 4, 1, 2), (4, 8, 2, 8), (8, 16, 1, 10), (16, 32, 1, 31), (32, 64, 0, 0), (64, 128, 1, 101)
    ]  # fmt: skip
    assert lengths["percentiles"]["50"] == 4 and lengths["percentiles"]["99"] == 101
    assert lengths["mean"] == pytest.approx(152 / 6)


def test_the_index_is_built_beside_the_store_or_where_told_and_shown(shop: Workshop) -> None:
    done = shop.cpt("data", "pack", shop.root / "mixed", "--seq-len", 16, "--figure", shop.root / "lengths.svg")
    assert done.code == 0, done.text
    assert (shop.root / "mixed" / "train" / "packs" / "best_fit_16" / "index.json").is_file()
    assert "best_fit" in done.out and "concat" in done.out and "tokens per document" in done.out
    picture = (shop.root / "lengths.svg").read_text()
    assert picture.startswith("<svg") and "tokens per document" in picture
    (store,) = json.loads(
        shop.cpt("data", "pack", shop.root / "mixed", "--pack-dir", shop.root / "packs", "--json").out
    )["stores"]
    (index,) = store["indexes"]
    assert index["seq_len"] == 2048 and index["path"].startswith(str(shop.root / "packs")) and index["rows"] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere",), "no manifest.json"),
        (("--seq-len", 1), "seq_len is 1"),
        (("--figure", "picture.pdf"), "picture.svg"),
        (("--figure", "none/picture.svg"), "its folder is not there"),
    ],
)
def test_what_cannot_be_packed_is_refused(shop: Workshop, arguments: tuple[object, ...], told: str) -> None:
    stores = () if arguments[0] == "nowhere" else (shop.root / "mixed",)
    done = shop.cpt("data", "pack", *stores, *arguments)
    assert done.code == 2 and told in done.text, done.text
    assert not (shop.root / "mixed" / "train" / "packs").exists()


def test_a_source_whose_name_looks_like_markup_keeps_it(workshop: Workshop) -> None:
    workshop.store("web[red]", domain="law", train=[[1] * 9] * 9, heldout=[[1, 2]])
    done = workshop.cpt("data", "pack", workshop.root / "web[red]", "--seq-len", 16)
    found = done.out.replace("\n", "").count("web[red]")  # the path of the head may be broken over two lines
    assert done.code == 0 and found >= 3, done.text  # its head, and a row for each rule


def test_an_ordered_view_gets_no_index(shop: Workshop) -> None:
    from cpt.data.store_selection import ViewRequest, open_split, write_view

    store = open_split(shop.root / "mixed" / "train")
    import numpy as np

    write_view(shop.root / "view", {"train": ViewRequest(store, np.array([3, 1]), {}, "ascending")})
    done = shop.cpt("data", "pack", shop.root / "view", "--seq-len", 16)
    assert done.code == 0 and "always packed by concat" in done.out
    assert not (shop.root / "view" / "train" / "packs").exists()
