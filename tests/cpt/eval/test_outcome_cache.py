"""Results of benchmarks on disk: read whole or not at all, kept once, made again where they are damaged."""

import contextlib
import math
from pathlib import Path

import pyarrow as pa
import pytest

from cpt.eval import cache as cache_module
from cpt.eval.cache import (
    FILES,
    OUTCOME_ITEMS,
    Metric,
    Outcome,
    OutcomeCache,
    TaskOutcome,
    default_cache,
    outcome_key,
    read_outcome,
    write_outcome,
)
from cpt.eval.results import TEXTS


def outcome(value: float = 0.5) -> Outcome:
    task = TaskOutcome("own", "cloze", "acc", True, {"acc": Metric(value, None)}, "mean", 0, 0.1)
    row = {"task": "own", "item": 0, "line": 1, "score": value, "weight": 1.0, "margin": math.nan,
           "chosen": "", "truncated": False}  # fmt: skip
    text = {"task": "own", "item": 0, "subset": "", "prompt": "a", "gold": "b", "choices": ["b", "c"]}
    return Outcome([task], pa.Table.from_pylist([row], OUTCOME_ITEMS), pa.Table.from_pylist([text], TEXTS))


def test_an_outcome_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_outcome(tmp_path / "one", outcome())
    found = read_outcome(tmp_path / "one")
    assert found is not None and found.tasks == outcome().tasks
    assert found.items.schema.names == OUTCOME_ITEMS.names and found.items["score"].to_pylist() == [0.5]
    assert math.isnan(found.items["margin"][0].as_py()) and found.texts.to_pylist() == outcome().texts.to_pylist()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_result_is_none_and_is_dropped(tmp_path: Path, name: str, damage: str) -> None:
    cache = OutcomeCache(tmp_path / "cache")
    write_outcome(tmp_path / "made", outcome())
    cache.put("abc", tmp_path / "made")
    [file] = (tmp_path / "cache").rglob(name)
    raw = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(raw[: len(raw) // 2] if damage == "cut" else raw[:-4] + b"}!!}")
    assert cache.get("abc") is None
    assert not file.parent.exists()


def test_what_was_put_is_got_by_its_key_alone(tmp_path: Path) -> None:
    cache = OutcomeCache(tmp_path / "cache")
    write_outcome(tmp_path / "made", outcome())
    cache.put("abc", tmp_path / "made")
    assert cache.get("abd") is None and not (tmp_path / "made").exists()
    found = cache.get("abc")
    assert found is not None and found.tasks[0].metrics["acc"].value == 0.5


def test_where_another_process_was_quicker_its_result_stays(tmp_path: Path) -> None:
    cache = OutcomeCache(tmp_path / "cache")
    for value in (0.5, 0.75):
        write_outcome(tmp_path / "made", outcome(value))
        cache.put("abc", tmp_path / "made")
    found = cache.get("abc")
    assert found is not None and found.tasks[0].metrics["acc"].value == 0.5
    assert [path.name for path in (tmp_path / "cache" / "ab").iterdir()] == ["abc"]


def test_what_another_process_puts_while_one_looks_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = OutcomeCache(tmp_path / "cache"), OutcomeCache(tmp_path / "cache")

    def read_too_early(folder: Path) -> None:
        write_outcome(tmp_path / "made", outcome())
        theirs.put("abc", tmp_path / "made")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "read_outcome", read_too_early)
        assert mine.get("abc") is None
    assert theirs.get("abc") is not None


def test_what_a_killed_process_left_does_not_get_into_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = OutcomeCache(tmp_path / "cache")

    def killed(made: Path, beside: Path) -> None:
        Path(beside).mkdir(exist_ok=True)
        (Path(beside) / "half").write_text("")
        raise SystemExit

    write_outcome(tmp_path / "made", outcome())
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(cache_module.shutil, "move", killed)
        patch.setattr(cache_module.shutil, "rmtree", lambda *arguments, **fields: None)
        cache.put("abc", tmp_path / "made")
    cache.put("abc", tmp_path / "made")
    assert {path.name for path in (tmp_path / "cache" / "ab" / "abc").iterdir()} == set(FILES)


def test_small_results_are_kept_too(tmp_path: Path) -> None:
    cache = OutcomeCache(tmp_path / "cache")
    assert cache.get_fields("abc") is None
    cache.put_fields("abc", {"exact_match": 0.25, "stderr": None})
    assert cache.get_fields("abc") == {"exact_match": 0.25, "stderr": None}
    (tmp_path / "cache" / "ab" / "abc.json").write_text("[1")
    assert cache.get_fields("abc") is None


def test_a_key_follows_every_setting() -> None:
    settings = {"weights": "w", "task": "t", "dtype": "fp32"}
    assert outcome_key(settings) == outcome_key(dict(reversed(settings.items())))
    assert len({outcome_key({**settings, name: "other"}) for name in settings} | {outcome_key(settings)}) == 4


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CPT_CACHE", str(tmp_path))
    assert default_cache() == tmp_path / "evals"
    monkeypatch.delenv("CPT_CACHE")
    assert default_cache() == Path.home() / ".cache" / "cpt" / "evals"
