"""Runs against their base and against each other, from small run folders; every figure by hand or by its module."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cpt.eval.comparing import Comparison, RunComparison, compare_runs, suites_of
from cpt.eval.comparison_rows import Row
from cpt.eval.records import EvalRecord, SourceEval, aggregate, write_eval
from cpt.eval.results import (
    ITEMS,
    CopyingProbe,
    Measured,
    SuiteRecord,
    TaskResult,
    group_scores,
    items_file,
    pieces_file,
    read_pieces,
    record_file,
    texts_file,
    write_items,
    write_pieces,
    write_suite_record,
    write_texts,
)
from cpt.eval.significance import Difference
from cpt.problems import ConfigError
from cpt.rundir import DataError, RunDir

Scores = Mapping[str, Sequence[float]]  # task -> score of each item
GROUP_OF = {"arc": "general", "blimp": "general", "law_cloze": "domain", "wiki": "general"}


def result(name: str, scores: Sequence[float], **changes: Any) -> TaskResult:
    metric, upward = ("bits_per_byte", False) if name == "wiki" else ("acc", True)
    fields: dict[str, Any] = {
        **{"group": GROUP_OF.get(name, "general"), "kind": "cloze", "metric": metric, "higher_is_better": upward},
        **{"value": float(np.mean(scores)), "stderr": 0.01, "metrics": {metric: Measured(0.5, 0.01)}},
        **{"items": len(scores), "truncated": 0, "overlapping": 0, "value_without_overlap": None},
        **{"stderr_without_overlap": None, "few_shot": 0, "task_hash": "1", "seconds": 1.0},
    }
    return TaskResult(**(fields | changes))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder that is filled step by step."""

    root: Path
    suite: str = "exam"

    @property
    def folder(self) -> Path:
        return RunDir(self.root).evals / self.suite

    def exam(
        self,
        step: int,
        scores: Scores,
        *,
        overlap: Sequence[int] = (),
        truncated: Sequence[int] = (),
        weights: Sequence[float] = (),
        **about: Any,
    ) -> None:
        """``weights`` are those of wiki's items; ``about``: fields of the record, or of a task as ``arc={"few_shot": 5}``."""
        of_tasks = {name: about.pop(name) for name in scores if name in about}
        tasks = {name: result(name, values, **of_tasks.get(name, {})) for name, values in scores.items()}
        fields: dict[str, Any] = {"suite_hash": "0", "tokens_seen": step, "weights_hash": f"w{step}", "tokenizer": "t"}
        fields |= {"dtype": "fp32", "harness": "lm_eval 0.4.9", "groups": group_scores(tasks)}
        write_suite_record(
            record_file(self.folder, step), SuiteRecord(suite=self.suite, step=step, tasks=tasks, **(fields | about))
        )
        rows = [
            {
                "task": name,
                "item": item,
                "score": score,
                "weight": weights[item] if weights and name == "wiki" else 1.0,
                "margin": None,
                "chosen": None,
            }
            | {"truncated": item in truncated, "overlap": item in overlap}
            for name, values in scores.items()
            for item, score in enumerate(values)
        ]
        write_items(items_file(self.folder, step), pa.Table.from_pylist(rows, schema=ITEMS))

    def texts(self, prompts: Mapping[str, Sequence[str]]) -> None:
        rows = [(task, item, prompt) for task, items in prompts.items() for item, prompt in enumerate(items)]
        columns: dict[str, Any] = dict(zip(("task", "item", "prompt"), map(list, zip(*rows, strict=True)), strict=True))
        empty = {"subset": [None] * len(rows), "gold": [""] * len(rows), "choices": [[]] * len(rows)}
        write_texts(texts_file(self.folder), pa.table(columns | empty))

    def losses(self, step: int, stderr: float | None = None, *, pieces: bool = True, **nats: Sequence[float]) -> None:
        """Loss of each document, of 100 tokens each, by source."""
        evals, sources, table = RunDir(self.root).evals, {}, []
        for name, losses in nats.items():
            group = "domain" if name.startswith("law") else "general"
            mean = float(np.mean(losses))
            loss = mean if np.isfinite(mean) else None
            sources[name] = SourceEval(group, loss, None, None, 100 * len(losses), len(losses), stderr)
            table += [(name, document, 100, 100 * value) for document, value in enumerate(losses)]
        write_eval(evals / f"step_{step:08d}.json", EvalRecord(step, step, sources, aggregate(sources)))
        if pieces:
            names = ("source", "document", "tokens", "nats")
            columns = zip(*table, strict=True)
            write_pieces(pieces_file(evals, step), pa.table(dict(zip(names, map(list, columns), strict=True))))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "a_run")


def only(comparison: Comparison) -> RunComparison:
    (found,) = comparison.runs
    return found


def row(rows: Sequence[Row], name: str) -> Row:
    return next(found for found in rows if found.name == name)


def known(change: Difference | None) -> Difference:
    assert change is not None
    return change


def answers(right: int, wrong: int) -> list[float]:
    return [1.0] * right + [0.0] * wrong


def test_a_run_is_compared_with_its_base_on_the_same_items(run: Run) -> None:
    run.exam(0, {"arc": answers(80, 20), "blimp": answers(90, 10), "law_cloze": answers(40, 60)})
    run.exam(100, {"arc": answers(10, 90), "blimp": answers(1, 99), "law_cloze": answers(40, 60)})  # not the last one
    run.exam(500, {"arc": answers(79, 21), "blimp": answers(60, 40), "law_cloze": answers(70, 30)})
    found = only(compare_runs([run.root]))
    assert (found.run, found.suite_step, found.loss_step) == ("a_run", 500, None)
    arc, blimp, law = (row(found.tasks, name) for name in ("arc", "blimp", "law_cloze"))
    assert (arc.change.before, arc.change.after, arc.change.units) == (0.8, 0.79, 100)
    assert (arc.word, blimp.word, law.word) == ("within noise", "drop", "gain")
    general, domain = row(found.groups, "general"), row(found.groups, "domain")
    assert general.change.value == pytest.approx((-0.01 - 0.3) / 2)
    assert (general.word, domain.word) == ("drop", "gain")
    assert domain.change == dataclasses.replace(law.change, p=domain.change.p)


def test_a_step_may_be_chosen(run: Run) -> None:
    for step, right in ((0, 80), (100, 10), (500, 79)):
        run.exam(step, {"arc": answers(right, 100 - right)})
    assert only(compare_runs([run.root], step=100)).tasks[0].change.after == 0.1
    with pytest.raises(DataError, match="no evaluation of step 7; run `cpt eval` on a checkpoint of a_run"):
        compare_runs([run.root], step=7)


def test_held_out_losses_are_compared_by_document(run: Run) -> None:
    rng = np.random.default_rng(0)
    web, law = rng.normal(3.0, 0.5, 60), rng.normal(4.0, 0.5, 60)
    run.losses(0, web=list(web), law=list(law))
    run.losses(500, web=list(web + rng.normal(0.0, 0.05, 60)), law=list(law - 1.0 + rng.normal(0.0, 0.1, 60)))
    found = only(compare_runs([run.root]))
    web_row, law_row = row(found.sources, "web"), row(found.sources, "law")
    assert (web_row.word, law_row.word) == ("within noise", "gain")
    assert (law_row.change.units, law_row.metric, law_row.higher_is_better) == (60, "loss", False)
    gain = known(found.domain_gain)
    assert gain.value == pytest.approx(1.0, abs=0.05)
    assert gain.low is not None and gain.high is not None and gain.value is not None
    assert gain.low < gain.value < gain.high
    forgetting, change = known(found.general_forgetting), row(found.source_groups, "general").change
    assert forgetting == change


def test_a_loss_group_is_taken_over_all_its_tokens(run: Run) -> None:
    run.losses(0, web=[2.0, 2.0], books=[4.0] * 6)
    run.losses(500, web=[4.0, 4.0], books=[4.0] * 6)
    general = row(only(compare_runs([run.root])).source_groups, "general").change
    assert (general.before, general.after, general.units) == (pytest.approx(3.5), pytest.approx(4.0), 8)


def test_another_run_may_be_the_baseline_by_folder_or_by_name(tmp_path: Path, run: Run) -> None:
    other = Run(tmp_path / "replay")
    run.exam(500, {"arc": answers(50, 50)})
    other.exam(300, {"arc": answers(90, 10)})
    by_name = compare_runs([run.root, other.root], baseline="replay")
    assert (by_name.baseline, only(by_name).run) == ("replay", "a_run")
    assert only(by_name).tasks[0].change.value == pytest.approx(-0.4)
    assert compare_runs([run.root], baseline=other.root).runs == by_name.runs
    swapped = only(compare_runs([other.root], baseline=run.root)).tasks[0]
    assert swapped.change.value == pytest.approx(0.4)
    assert (swapped.change.p, swapped.word) == (only(by_name).tasks[0].change.p, "gain")


def test_a_run_is_not_compared_with_itself_alone(run: Run) -> None:
    run.exam(0, {"arc": [1.0]})
    with pytest.raises(ConfigError, match="is the only run given; give another, or base"):
        compare_runs([run.root], baseline=run.root)


def test_an_unknown_baseline_names_what_there_is(run: Run) -> None:
    run.exam(0, {"arc": [1.0]})
    with pytest.raises(ConfigError, match="no run folder; give one, or one of base, a_run"):
        compare_runs([run.root], baseline="replaay")


def test_different_item_sets_are_compared_on_the_shared_items_and_it_says_so(run: Run) -> None:
    run.exam(0, {"arc": answers(50, 50), "blimp": answers(5, 5)})
    run.exam(500, {"arc": answers(40, 20), "blimp": answers(5, 5)})
    found = only(compare_runs([run.root]))
    assert row(found.tasks, "arc").change.units == 60
    assert row(found.tasks, "arc").change.before == pytest.approx(50 / 60)
    assert "arc (60): compared on the items that both scored only; their number in brackets" in found.notes


def test_items_that_could_not_be_scored_are_left_out_and_it_says_so(run: Run) -> None:
    run.exam(0, {"arc": answers(2, 2), "blimp": [1.0]})
    run.exam(500, {"arc": [1.0, float("nan"), 0.0, 0.0], "blimp": [float("nan")]})
    found = only(compare_runs([run.root]))
    assert [(task.name, task.change.units, task.change.before) for task in found.tasks] == [
        ("arc", 3, pytest.approx(1 / 3))
    ]
    assert "blimp: not compared, has no item that both scored" in found.notes


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"few_shot": 5}, "one has 0 examples before an item, the other 5"),
        ({"metric": "acc_norm"}, "one is scored by acc, the other by acc_norm"),
        ({"task_hash": "2"}, "the two are of another definition of the task"),
    ],
)
def test_tasks_that_are_not_the_same_are_not_compared(run: Run, change: dict[str, Any], why: str) -> None:
    run.exam(0, {"arc": [1.0, 1.0], "blimp": [1.0, 0.0], "law_cloze": [1.0, 1.0]})
    run.exam(500, {"arc": [1.0, 0.0], "blimp": [1.0, 1.0], "wiki": [1.0, 1.0]}, arc=change)
    found = only(compare_runs([run.root]))
    assert [task.name for task in found.tasks] == ["blimp"]
    assert f"arc: not compared, {why}" in found.notes
    assert "wiki, law_cloze: not compared, measured on one of the two only" in found.notes


def test_items_of_two_runs_whose_tasks_were_defined_apart_are_known_by_their_texts(tmp_path: Path, run: Run) -> None:
    """As after a change of the limit: the first items are the same ones."""
    other = Run(tmp_path / "other")
    run.exam(500, {"arc": [1.0, 1.0, 1.0]})
    run.texts({"arc": ["one", "two", "three"]})
    other.exam(500, {"arc": [0.0, 0.0]}, arc={"task_hash": "2"}, suite_hash="9")
    other.texts({"arc": ["one", "another two"]})
    found = only(compare_runs([other.root], baseline=run.root))
    assert found.tasks[0].change == Difference(1.0, 0.0, -1.0, units=1)
    assert "the suite exam was changed between the two: tasks with the same items are compared" in found.notes
    assert "arc (1): compared on the items that both scored only; their number in brackets" in found.notes


def test_items_known_to_overlap_the_training_corpora_are_shown_apart(run: Run) -> None:
    run.exam(0, {"arc": answers(50, 50), "blimp": answers(5, 95)}, overlap=[0, 1])
    run.exam(500, {"arc": [1.0] * 2 + [0.0] * 98, "blimp": answers(5, 95)}, overlap=[0, 1], truncated=[5])
    found = only(compare_runs([run.root]))
    arc = row(found.tasks, "arc")
    assert (arc.overlapping, arc.truncated, arc.change.units) == (2, 1, 100)
    clean = known(arc.without_overlap)
    assert (clean.before, clean.after, clean.units) == (pytest.approx(48 / 98), 0.0, 98)
    general = row(found.groups, "general")
    assert (general.overlapping, known(general.without_overlap).units) == (4, 196)


def test_where_all_items_overlap_nothing_is_left_to_show(run: Run) -> None:
    run.exam(0, {"arc": answers(2, 0)}, overlap=[0, 1])
    run.exam(500, {"arc": answers(1, 1)}, overlap=[0, 1])
    assert only(compare_runs([run.root])).tasks[0].without_overlap == Difference(None, None, None)


def test_without_overlap_there_is_no_second_figure(run: Run) -> None:
    run.exam(0, {"arc": answers(2, 0)})
    run.exam(500, {"arc": answers(1, 1)})
    assert only(compare_runs([run.root])).tasks[0].without_overlap is None


def test_perplexity_is_compared_but_is_no_part_of_a_groups_accuracy(run: Run) -> None:
    rng = np.random.default_rng(2)
    text = rng.normal(1.0, 0.1, 80)
    run.exam(0, {"arc": answers(5, 5), "wiki": list(text)})
    run.exam(500, {"arc": answers(5, 5), "wiki": list(text + 0.2)})
    found = only(compare_runs([run.root]))
    assert (row(found.tasks, "wiki").word, row(found.tasks, "wiki").change.value) == ("drop", pytest.approx(0.2))
    assert row(found.groups, "general").change.units == 10


def test_a_long_text_counts_by_its_length_and_a_perplexity_by_its_logarithm(run: Run) -> None:
    about = {"metric": "word_perplexity"}
    run.exam(0, {"wiki": [1.0, 3.0]}, weights=[30.0, 10.0], wiki=about)
    run.exam(500, {"wiki": [2.0, 3.0]}, weights=[30.0, 10.0], wiki=about)
    (wiki,) = only(compare_runs([run.root])).tasks
    assert (wiki.metric, wiki.change.before, wiki.change.after) == ("log_word_perplexity", 1.5, 2.25)


def test_among_many_tasks_a_difference_by_chance_is_called_noise(run: Run) -> None:
    """p = 0.04 by itself is significant, as one of 20 it is not."""
    quiet = {f"task_{number}": answers(50, 50) for number in range(19)}
    run.exam(0, {"arc": answers(50, 50)} | quiet)
    run.exam(500, {"arc": [*answers(41, 58), 1.0]} | quiet)  # 9 lost, 1 gained
    found = only(compare_runs([run.root])).tasks
    arc = row(found, "arc")
    assert arc.change.p == pytest.approx(0.0215, abs=1e-3)
    assert arc.corrected_p == pytest.approx(20 * (arc.change.p or 0.0)) and arc.word == "within noise"


def test_all_runs_of_one_table_are_corrected_together(tmp_path: Path) -> None:
    runs = [Run(tmp_path / name) for name in ("a", "b")]
    for each in runs:
        each.exam(0, {"arc": answers(50, 50)})
        each.exam(500, {"arc": [*answers(41, 58), 1.0]})
    together, alone = compare_runs([each.root for each in runs]), only(compare_runs([runs[0].root]))
    assert alone.tasks[0].word == "drop"
    assert [found.tasks[0].corrected_p for found in together.runs] == [pytest.approx(2 * 0.0215, abs=1e-3)] * 2


def test_losses_of_an_older_version_have_no_test_and_it_says_so(run: Run) -> None:
    run.losses(0, pieces=False, web=[2.0, 2.0], law=[4.0])
    run.losses(500, web=[2.5, 2.5], law=[3.0])
    found = only(compare_runs([run.root]))
    assert known(found.general_forgetting) == Difference(2.0, 2.5, 0.5)
    assert row(found.sources, "web").word == "not tested"
    assert any("there are no losses by document" in note for note in found.notes)


def test_without_pieces_standard_errors_serve(run: Run) -> None:
    run.losses(0, 0.03, pieces=False, web=[2.0, 2.0])
    run.losses(500, 0.04, pieces=False, web=[2.5, 2.5])
    web = row(only(compare_runs([run.root])).sources, "web")
    assert (web.change.stderr, web.word) == (pytest.approx(0.05), "drop")


def test_a_loss_that_is_not_finite_is_no_figure_whatever_its_finite_documents_say(run: Run) -> None:
    run.losses(0, web=[2.0, 2.0], law=[3.0])
    run.losses(500, web=[2.5, float("nan")], law=[2.5])
    found = only(compare_runs([run.root]))
    assert row(found.sources, "web").change == Difference(2.0, None, None)
    assert known(found.general_forgetting).value is None
    assert known(found.domain_gain).value == pytest.approx(0.5)


def test_sources_of_one_side_and_texts_tokenised_in_another_way_are_told(tmp_path: Path, run: Run) -> None:
    other = Run(tmp_path / "other")
    run.losses(500, web=[2.0, 2.0, 3.0], law=[3.0])
    other.losses(500, web=[2.5, 2.5], books=[1.0])
    found = only(compare_runs([other.root], baseline=run.root))
    assert row(found.sources, "web").change.units == 2
    assert any(note.startswith("web: compared on the 2 documents that both read; 1 ") for note in found.notes)
    assert "books, law: not compared, held-out text of one of the two only" in found.notes
    assert found.domain_gain is None


def test_losses_per_token_of_a_text_that_was_tokenised_in_another_way_have_no_difference(
    tmp_path: Path, run: Run
) -> None:
    other = Run(tmp_path / "other")
    run.losses(500, 0.01, web=[2.0, 2.0], law=[3.0, 3.0])
    other.losses(500, 0.01, web=[2.5, 2.5], law=[2.5, 2.5])
    path = pieces_file(RunDir(other.root).evals, 500)
    rows = [{**each, "tokens": 80 if each["source"] == "web" else 100} for each in read_pieces(path).to_pylist()]
    write_pieces(path, pa.Table.from_pylist(rows))
    found = only(compare_runs([other.root], baseline=run.root))
    assert row(found.sources, "web").change == Difference(2.0, 2.5, None)
    assert (row(found.sources, "web").word, known(found.general_forgetting).value) == ("not tested", None)
    assert any(note.startswith("web: not compared; 4 ") for note in found.notes)
    assert known(found.domain_gain).value == pytest.approx(0.5)


@pytest.mark.parametrize("pieces", [True, False])
@pytest.mark.parametrize("extra", [0, 500])
def test_a_source_of_one_side_is_no_change_of_its_group(run: Run, extra: int, pieces: bool) -> None:
    for step, loss in ((0, 2.0), (500, 2.5)):
        others = {"books": [9.0, 9.0]} if step == extra else {}
        run.losses(step, pieces=pieces, web=[loss, loss], **others)
    change = known(only(compare_runs([run.root])).general_forgetting)
    assert (change.before, change.after, change.value) == (2.0, 2.5, 0.5)


def test_the_copying_probe_has_rows_of_its_own(run: Run) -> None:
    probes = [CopyingProbe(share, 0.01, 0.9, 0.01, 64, 32) for share in (0.6, 0.2)]
    run.exam(0, {"arc": [1.0, 0.0]}, copying=probes[0])
    run.exam(500, {"arc": [1.0, 0.0]}, copying=probes[1])
    rows = only(compare_runs([run.root])).copying
    assert [(found.metric, found.word) for found in rows] == [
        ("exact_match", "drop"),
        ("token_accuracy", "within noise"),
    ]
    assert rows[0].change.value == pytest.approx(-0.4)


@pytest.mark.parametrize(
    ("about", "note"),
    [
        ({"tokenizer": "u"}, "different tokenizers"),
        ({"dtype": "bf16"}, "one was evaluated in fp32, the other in bf16"),
        ({"harness": "lm_eval 0.5"}, "one was evaluated with lm_eval 0.4.9, the other with lm_eval 0.5"),
        ({"errors": ("task mmlu: no items",)}, "task mmlu: no items"),
    ],
)
def test_what_makes_a_comparison_doubtful_is_said(run: Run, about: dict[str, Any], note: str) -> None:
    run.exam(0, {"arc": [1.0, 0.0]})
    run.exam(500, {"arc": [1.0, 0.0]}, **about)
    assert any(note in found for found in only(compare_runs([run.root])).notes)


def test_a_run_whose_base_was_not_measured_says_what_is_missing(run: Run) -> None:
    run.exam(500, {"arc": [1.0]})
    run.losses(0, web=[2.0])
    found = only(compare_runs([run.root]))
    assert (found.tasks, found.sources) == ((), ())
    assert "benchmarks are not compared: the baseline has none" in found.notes
    assert "held-out losses are not compared: only the baseline itself was measured so far" in found.notes


def test_benchmarks_that_lag_behind_are_told(run: Run) -> None:
    for step in (0, 300):
        run.exam(step, {"arc": [1.0]})
    for step in (0, 500):
        run.losses(step, web=[2.0])
    assert "benchmarks are of step 300, held-out losses of step 500" in only(compare_runs([run.root])).notes


def test_of_several_suites_one_must_be_named(run: Run) -> None:
    second = Run(run.root, "second")
    for each in (run, second):
        each.exam(0, {"arc": [1.0]})
        each.exam(500, {"arc": [1.0]})
    assert suites_of(run.root) == ["exam", "second"]
    with pytest.raises(ConfigError, match="--suite: is required; there are results of exam, second"):
        compare_runs([run.root])
    assert compare_runs([run.root], suite="second").suite == "second"
    with pytest.raises(ConfigError, match="no run has results of it; there are results of exam, second"):
        compare_runs([run.root], suite="third")


def test_a_base_that_was_not_measured_is_refused_where_it_is_asked_for(run: Run) -> None:
    run.losses(500, web=[2.0])
    with pytest.raises(DataError, match="no evaluation of step 0"):
        compare_runs([run.root], step=0)


def test_a_run_without_an_evaluation_is_refused(run: Run) -> None:
    with pytest.raises(DataError, match="no evaluation; run `cpt eval` on a checkpoint of a_run"):
        compare_runs([run.root])


def test_damaged_results_are_refused_by_name(run: Run) -> None:
    run.exam(0, {"arc": [1.0]})
    run.exam(500, {"arc": [1.0]})
    items_file(run.folder, 0).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"exam/step_00000000\.items\.parquet"):
        compare_runs([run.root])


def test_a_comparison_is_strict_json(run: Run) -> None:
    run.exam(0, {"arc": [1.0]})
    run.exam(500, {"arc": [0.0]})
    run.losses(0, web=[2.0], law=[3.0])
    run.losses(500, web=[2.0], law=[2.0])
    (found,) = json.loads(json.dumps(compare_runs([run.root]).to_dict(), allow_nan=False))["runs"]
    assert found["tasks"][0]["change"] == dataclasses.asdict(Difference(1.0, 0.0, -1.0, units=1))
    assert found["domain_gain"]["value"] == 1.0
