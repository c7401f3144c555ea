"""Retention: what is deleted or reduced, and above all what never is."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpt.checkpoint.marker import is_usable, reduce_to_weights
from cpt.checkpoint.portable import CheckpointMeta, Fragment
from cpt.checkpoint.retention import Action, Kind, Pin, Policy, apply, decide, read_pins, survey, write_pin
from cpt.checkpoint.writing import finish_checkpoint, start_checkpoint, write_shard
from cpt.rundir import DataError, step_name

KINDS = st.sampled_from(["full", "weights", "broken"])
FOUND = st.dictionaries(st.integers(0, 60), KINDS, max_size=12)
POLICIES = st.builds(Policy, st.integers(1, 5), st.none() | st.integers(1, 20))
LOSSES = st.dictionaries(st.integers(0, 60), st.floats(0.5, 9.0), max_size=12)


def after(found: dict[int, Kind], actions: dict[int, Action]) -> dict[int, Kind]:
    left = {step: kind for step, kind in found.items() if actions[step] != "delete"}
    return {step: "weights" if actions[step] == "reduce" else kind for step, kind in left.items()}


@given(FOUND, POLICIES, LOSSES)
def test_what_must_never_go_stays(found: dict[int, Kind], policy: Policy, losses: dict[int, float]) -> None:
    actions = decide(found, policy, losses=losses)
    assert actions.keys() == found.keys()
    full = sorted(step for step, kind in found.items() if kind == "full")
    for step in full[-policy.keep_last :]:
        assert actions[step] == "keep"
    for step, kind in found.items():
        if kind == "weights" or not full or step > full[-1]:
            assert actions[step] == "keep"  # weights are kept for good; a newer folder may be being written
        if actions[step] == "reduce":
            assert kind == "full" and policy.keep_weights_every and step % policy.keep_weights_every == 0
        elif policy.keep_weights_every and kind == "full" and step % policy.keep_weights_every == 0:
            assert actions[step] == "keep"


@given(FOUND, POLICIES, LOSSES)
def test_deciding_again_changes_nothing(found: dict[int, Kind], policy: Policy, losses: dict[int, float]) -> None:
    left = after(found, decide(found, policy, losses=losses))
    assert set(decide(left, policy, losses=losses).values()) <= {"keep"}


@given(FOUND, POLICIES, LOSSES)
def test_the_complete_checkpoint_of_the_lowest_loss_stays_as_it_is(
    found: dict[int, Kind], policy: Policy, losses: dict[int, float]
) -> None:
    measured = {step: losses[step] for step, kind in found.items() if kind != "broken" and step in losses}
    if measured and "full" in found.values():
        best = max(step for step, loss in measured.items() if loss == min(measured.values()))
        assert decide(found, policy, losses=losses)[best] == "keep"


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(1, 60))
def test_a_run_keeps_the_same_whatever_its_cadence_of_saves_and_evaluations(
    save_every: int, eval_every: int, keep_last: int, times: int, steps: int
) -> None:
    """Step by step, as a run does it, against the rule said in one sentence."""
    policy, losses = Policy(keep_last, save_every * times), {}
    found: dict[int, Kind] = {}
    for step in range(1, steps + 1):
        if step % eval_every == 0:
            losses[step] = 3.0 + abs(step - 20) / 100
        if step % save_every == 0:
            found[step] = "full"
            found = after(found, decide(found, policy, losses=losses))
    saves = [step for step in range(1, steps + 1) if step % save_every == 0]
    window = saves[-keep_last:]
    assert set(window) <= {step for step, kind in found.items() if kind == "full"}
    kept_for_good = {step for step in saves if step % policy.keep_weights_every == 0}  # type: ignore[operator]
    measured = [step for step in saves if step in losses]
    pinned = {min(measured, key=lambda step: (losses[step], -step))} if measured else set()
    assert kept_for_good | set(window) <= set(found)
    assert set(found) <= kept_for_good | set(window) | set(measured)
    if policy.keep_last >= len(saves):
        assert set(found) == set(saves)
    assert pinned <= set(found)


def test_the_example_of_the_module() -> None:
    found: dict[int, Kind] = dict.fromkeys((100, 200, 300, 400), "full")
    assert decide(found, Policy(2, 200), losses={100: 2.0, 200: 2.5, 300: 2.1}) == {
        100: "keep",
        200: "reduce",
        300: "keep",
        400: "keep",
    }


@given(FOUND, POLICIES, LOSSES, st.sets(st.integers(0, 60)))
def test_what_is_pinned_stays_as_it_is_and_costs_no_other_checkpoint_its_place(
    found: dict[int, Kind], policy: Policy, losses: dict[int, float], pinned: set[int]
) -> None:
    without, actions = decide(found, policy, losses=losses), decide(found, policy, losses=losses, pinned=pinned)
    assert actions == {step: "keep" if step in pinned else action for step, action in without.items()}


def test_a_pin_moves_and_pins_of_several_names_stand_side_by_side(tmp_path: Path) -> None:
    assert read_pins(tmp_path) == {}
    write_pin(tmp_path, "law", Pin(5, "best general.accuracy"))
    write_pin(tmp_path, "poems", Pin(5, "kept by hand"))
    write_pin(tmp_path, "law", Pin(10, "best general.accuracy"))
    assert read_pins(tmp_path) == {"law": Pin(10, "best general.accuracy"), "poems": Pin(5, "kept by hand")}
    assert survey(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": "5", "reason": ""}', '{"step": 5}'])
def test_a_pin_that_cannot_be_read_is_refused_by_name(tmp_path: Path, content: str) -> None:
    write_pin(tmp_path, "law", Pin(5, "best"))
    (tmp_path / "pins" / "law.json").write_text(content)
    with pytest.raises(DataError, match=r"pins/law\.json"):
        read_pins(tmp_path)


def test_a_copy_under_way_keeps_its_files() -> None:
    found: dict[int, Kind] = dict.fromkeys((1, 2, 3), "full")
    assert decide(found, Policy(1), busy={1}) == {1: "keep", 2: "delete", 3: "keep"}


@pytest.mark.parametrize("keep_last", [0, -3])
def test_the_newest_survives_even_a_nonsensical_number_to_keep(keep_last: int) -> None:
    assert decide({5: "full", 10: "full"}, Policy(keep_last)) == {5: "delete", 10: "keep"}


def save(root: Path, *steps: int) -> Path:
    for step in steps:
        folder, meta = root / step_name(step), CheckpointMeta(step, 9, {}, step, 0, "f", {"w": [2]}, {}, {}, {})
        start_checkpoint(folder, 100)
        state = {kind: torch.ones(2) for kind in ("param", "exp_avg")}
        finish_checkpoint(folder, meta, [write_shard(folder, [Fragment("w", 0, state)], rank=0, world_size=1)])
    return root


def test_folders_are_told_apart_and_changed_as_decided(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 20, 25)
    reduce_to_weights(tmp_path / step_name(5))
    (tmp_path / step_name(25) / "meta.json").write_text("")  # claims to be complete, and is not
    (tmp_path / step_name(7)).mkdir()
    for name in ("best", "step_00000005.bak", "step_5"):
        (tmp_path / name).mkdir()
    found = survey(tmp_path)
    assert found == {5: "weights", 7: "broken", 10: "full", 15: "full", 20: "full", 25: "broken"}
    done = apply(tmp_path, decide(found, Policy(keep_last=1, keep_weights_every=10)))
    assert done == {"pruned": [step_name(7), step_name(15)], "reduced": [step_name(10)]}
    assert survey(tmp_path) == {5: "weights", 10: "weights", 20: "full", 25: "broken"}
    assert {path.name for path in tmp_path.iterdir()} >= {"best", "step_00000005.bak", "step_5"}


def test_what_a_reduction_left_behind_is_swept_up_the_next_time(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    left = tmp_path / step_name(5) / "shard_00000-of-00001.state.safetensors"
    content = left.read_bytes()
    reduce_to_weights(tmp_path / step_name(5))
    left.write_bytes(content)  # as if killed between marker and deletion
    assert survey(tmp_path)[5] == "weights"
    assert apply(tmp_path, {5: "keep", 10: "keep"}) == {"pruned": [], "reduced": []}
    assert not left.exists() and is_usable(left.parent)


def test_a_run_without_checkpoints_has_nothing_to_give_up(tmp_path: Path) -> None:
    assert survey(tmp_path / "checkpoints") == {} and decide({}, Policy(1)) == {}
