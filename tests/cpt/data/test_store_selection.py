"""Views: what is read through one equals the chosen documents laid end to end, and nothing else is ever taken for it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.data.store_selection import StoreView, ViewRequest, is_ordered, open_split, write_view
from cpt.data.token_store import StoreLabel, TokenizerFacts, TokenStore, write_split
from cpt.rundir import DataError

LABEL = StoreLabel("s", "law", "train", 100, 0, TokenizerFacts("t", "f", "c"))
DOCUMENTS = [[5, 7, 0], [9, 0], [4, 0], [8, 8, 8, 0], [0]]


def make_store(folder: Path, documents: list[list[int]] = DOCUMENTS, *, first_shard: int = 2) -> TokenStore:
    write_split(folder, LABEL, [documents[:first_shard], [], documents[first_shard:]], utf8_bytes=120)
    return TokenStore.open(folder)


def make_view(out: Path, store: TokenStore | StoreView, numbers: list[int], order: str = "none") -> StoreView:
    write_view(out, {"train": ViewRequest(store, np.array(numbers, np.int64), {"why": "a test"}, order)})
    found = open_split(out / "train")
    assert isinstance(found, StoreView)
    return found


def test_the_example_of_the_module_docstring_holds(tmp_path: Path) -> None:
    view = make_view(tmp_path / "view", make_store(tmp_path / "store", DOCUMENTS[:3]), [2, 0])
    assert view.read(1, 4).tolist() == [0, 5, 7]
    assert view.document_starts(0, 5).tolist() == [0, 2] and view.document_bounds(1, 2).tolist() == [2, 5]


choices = st.lists(
    st.lists(st.integers(1, 99), max_size=6).map(lambda ids: [*ids, 0]), min_size=1, max_size=12
).flatmap(
    lambda texts: st.tuples(
        st.just(texts), st.lists(st.integers(0, len(texts) - 1), unique=True, min_size=1), st.integers(0, len(texts))
    )
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices, st.data())
def test_a_view_reads_as_the_chosen_documents_end_to_end(
    tmp_path: Path, choice: tuple[list[list[int]], list[int], int], data: st.DataObject
) -> None:
    texts, numbers, first_shard = choice
    for name in ("store", "view"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    view = make_view(tmp_path / "view", make_store(tmp_path / "store", texts, first_shard=first_shard), numbers)
    chosen = [texts[number] for number in numbers]
    flat = [token for text in chosen for token in text]
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    starts = np.cumsum([0, *map(len, chosen)])[:-1].tolist()
    assert view.read(start, stop).tolist() == flat[start:stop] and view.read(start, stop).dtype == np.uint16
    assert view.document_starts(start, stop).tolist() == [p for p in starts if start <= p < stop]
    assert [text.tolist() for text in view.documents()] == chosen
    assert view.document_lengths().tolist() == list(map(len, chosen))
    assert (view.num_tokens, view.num_documents, view.manifest.tokens) == (len(flat), len(chosen), len(flat))
    view.verify()


def test_a_view_says_what_a_store_says_but_has_a_content_hash_of_its_own(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    view = make_view(tmp_path / "view", store, [0, 2])
    assert (view.manifest.domain, view.manifest.eos_id, view.vocab_size, view.dtype) == ("law", 0, 100, store.dtype)
    assert view.manifest.utf8_bytes == 50  # 5 of 12 tokens: the store counts bytes of a whole split only
    hashes = {make_view(tmp_path / f"v{i}", store, n, o).manifest.content_hash
              for i, (n, o) in enumerate([([0, 2], "none"), ([2, 0], "none"), ([0, 2], "ascending"), ([0], "none")])}  # fmt: skip
    assert len({*hashes, store.manifest.content_hash}) == 5 and view.manifest.content_hash in hashes
    assert sum(file.stat().st_size for file in (tmp_path / "view" / "train").glob("*.bin")) == 16 * 2 + 8


def test_a_view_of_a_view_names_the_stores_documents(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    first = make_view(tmp_path / "first", store, [4, 3, 0])
    second = make_view(tmp_path / "second", first, [1, 2])
    assert second.numbers.tolist() == [3, 0] and second.store.path == store.path.resolve()
    shutil.rmtree(tmp_path / "first")
    assert open_split(tmp_path / "second" / "train").read(0, 7).tolist() == [8, 8, 8, 0, 5, 7, 0]


def test_a_view_and_its_store_may_move_together_or_the_view_alone(tmp_path: Path) -> None:
    make_view(tmp_path / "a" / "view", make_store(tmp_path / "a" / "store"), [1])
    shutil.copytree(tmp_path / "a" / "view", tmp_path / "view")
    assert open_split(tmp_path / "view" / "train").read(0, 2).tolist() == [9, 0]
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert open_split(tmp_path / "b" / "view" / "train").read(0, 2).tolist() == [9, 0]
    with pytest.raises(DataError, match=r"its store is neither at .* nor at"):
        open_split(tmp_path / "view" / "train")


def test_a_store_that_was_made_anew_is_noticed(tmp_path: Path) -> None:
    make_view(tmp_path / "view", make_store(tmp_path / "store"), [1])
    make_store(tmp_path / "store", [[1, 2, 0], *DOCUMENTS])
    with pytest.raises(DataError, match="the store was made anew"):
        open_split(tmp_path / "view" / "train")


def test_the_same_view_again_is_no_error_and_another_in_its_folder_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    make_view(tmp_path / "view", store, [1, 2])
    make_view(tmp_path / "view", store, [1, 2])
    with pytest.raises(DataError, match="exists and is not this view"):
        make_view(tmp_path / "view", store, [1])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["store", "view"]  # no part of a refused view


@pytest.mark.parametrize(("numbers", "told"), [([0, 5], "0 to 5 are asked for"), ([-1], "numbered from 0"), ([1, 1], "document 1 is named twice")])  # fmt: skip
def test_numbers_that_are_none_are_refused(tmp_path: Path, numbers: list[int], told: str) -> None:
    with pytest.raises(DataError, match=told):
        make_view(tmp_path / "view", make_store(tmp_path / "store"), numbers)
    assert not (tmp_path / "view").exists()


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"format_version": 9}, "format_version is 9"),
        ({"documents": -1}, "documents is -1"),
        ({"store": 3}, "store is 3"),
        ({"extra": 3}, "unknown field 'extra'"),
    ],
)
def test_an_edited_view_is_refused_with_file_and_field(tmp_path: Path, edit: dict[str, object], told: str) -> None:
    make_view(tmp_path / "view", make_store(tmp_path / "store"), [1, 3])
    file = tmp_path / "view" / "train" / "view.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    with pytest.raises(DataError, match=rf"view.json: .*{told}"):
        open_split(tmp_path / "view" / "train")


def test_files_cut_short_are_refused_and_flipped_bits_are_found_by_verify(tmp_path: Path) -> None:
    view = make_view(tmp_path / "view", make_store(tmp_path / "store"), [1, 3])
    file = tmp_path / "view" / "train" / "documents.bin"
    file.write_bytes(bytes([0]) + file.read_bytes()[1:])
    with pytest.raises(DataError, match=r"documents.bin: sha256 is"):
        view.verify()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"documents.bin: has 15 bytes, view.json says 16"):
        open_split(tmp_path / "view" / "train")
    (tmp_path / "view" / "train" / "view.json").write_text("{")
    with pytest.raises(DataError, match="not a complete JSON file"):
        open_split(tmp_path / "view" / "train")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["view.json", "documents.bin", "starts.bin"]), data=st.data())
def test_a_view_with_damaged_bytes_is_refused_or_reads_as_many_tokens_as_were_asked_for(
    tmp_path: Path, name: str, data: st.DataObject
) -> None:
    file = tmp_path / "view" / "train" / name
    if not file.exists():
        make_view(tmp_path / "view", make_store(tmp_path / "store"), [3, 0, 1])
    whole = file.read_bytes()
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(broken)
    try:
        view = open_split(tmp_path / "view" / "train")
        assert [len(view.read(start, start + 4)) for start in range(view.num_tokens - 3)] == [4] * (view.num_tokens - 3)
    except DataError:
        pass
    finally:
        file.write_bytes(whole)


def test_what_needs_the_store_itself_says_so_of_a_view(tmp_path: Path) -> None:
    make_view(tmp_path / "view", make_store(tmp_path / "store"), [1])
    with pytest.raises(DataError, match="it is a view, which holds no tokens"):
        TokenStore.open(tmp_path / "view" / "train")


def test_an_empty_view_opens_and_an_order_is_meant_or_not(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    empty = make_view(tmp_path / "empty", store, [])
    assert empty.num_tokens == 0 and len(empty.read(0, 0)) == 0 and not list(empty.documents())
    assert not is_ordered(empty) and not is_ordered(store)
    assert is_ordered(make_view(tmp_path / "ordered", store, [3, 1], "descending"))
    with pytest.raises(IndexError, match="which has 0"):
        empty.read(0, 1)
