"""A suite's tasks in lm_eval, scored by a model with known answers; what cannot be scored is refused first."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.model import LM

from cpt.eval.harness_tasks import find_tasks, score
from cpt.eval.suite import LocalTask, NamedTask
from cpt.problems import ConfigError
from cpt.rundir import DataError


class ShortestFirst(LM):  # type: ignore[misc]
    """The likelihood of a text falls with its length, one nat a character; it always writes " 42 "."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Any] = []

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        self.read += [request.args for request in requests]
        return [(-float(len(request.args[1])), len(request.args[1]) <= 4) for request in requests]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        return [-math.log(2) * 3 * len(request.args[0].encode()) for request in requests]

    def generate_until(self, requests: Any) -> list[str]:
        self.read += [request.args for request in requests]
        return [" 42 " for _ in requests]


def items_file(folder: Path, name: str, items: list[dict[str, Any]]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def only(folder: Path, entry: Any) -> Any:
    """(its one task, items as dicts, texts as dicts, what the model read)."""
    model = ShortestFirst()
    found = score(find_tasks([entry], folder)[0], model, seed=1)
    return found.tasks[0], found.items.to_pylist(), found.texts.to_pylist(), model.read


QUESTIONS = [
    {"prompt": "A?", "choices": ["no", "maybe"], "answer": 0, "level": "easy"},
    {"prompt": "B?", "choices": ["never", "yes"], "answer": "never", "level": "hard"},
    {"prompt": "7", "choices": ["a", "bb", "ccc"], "answer": 0, "level": "easy"},
]


def test_multiple_choice_is_scored_item_by_item(tmp_path: Path) -> None:
    file = items_file(tmp_path, "q", QUESTIONS)
    entry = LocalTask(name="q", file=file, kind="multiple_choice", subset_field="level")
    task, items, texts, read = only(tmp_path, entry)
    assert (task.kind, task.metric, task.metrics["acc"].value) == ("multiple_choice", "acc", pytest.approx(2 / 3))
    assert task.metrics["acc"].stderr == pytest.approx(math.sqrt(2 / 9 / 2))
    assert [item["score"] for item in items] == [1, 0, 1]
    assert [item["margin"] for item in items] == [3, -2, 1]
    assert [item["chosen"] for item in items] == ["no", "yes", "a"]
    assert [text["subset"] for text in texts] == ["easy", "hard", "easy"]
    assert [text["gold"] for text in texts] == ["no", "never", "a"]
    assert read[0] == ("A?", " no") and read[4] == ("7", " a")  # a prompt of digits is a prompt, not a number


def test_a_limit_takes_the_first_items_and_a_metric_can_be_chosen(tmp_path: Path) -> None:
    file = items_file(tmp_path, "q", QUESTIONS)
    entry = LocalTask(name="q", file=file, kind="multiple_choice", limit=2, metric="acc_norm")
    task, items, _, _ = only(tmp_path, entry)
    assert task.metric == "acc_norm" and len(items) == 2


def test_minimal_pairs_prefer_the_likelier_sentence(tmp_path: Path) -> None:
    pairs = [
        {"sentence_good": "He is.", "sentence_bad": "He are."},
        {"sentence_good": "longer", "sentence_bad": "short"},
    ]
    entry = LocalTask(name="p", file=items_file(tmp_path, "p", pairs), kind="minimal_pairs")
    task, items, _, read = only(tmp_path, entry)
    assert task.metrics["acc"].value == 0.5 and [item["margin"] for item in items] == [1, -1]
    assert read[0] == ("", " He is.")


def test_a_cloze_is_right_when_greedy_decoding_gives_it(tmp_path: Path) -> None:
    words = [{"prompt": "one", "answer": "two"}, {"prompt": "four", "answer": "fives"}]
    entry = LocalTask(name="c", file=items_file(tmp_path, "c", words), kind="cloze")
    task, items, _, read = only(tmp_path, entry)
    assert task.metric == "acc" and [item["score"] for item in items] == [1, 0]
    assert task.metrics["perplexity"].value == pytest.approx(math.exp(5))
    assert read == [("one", " two"), ("four", " fives")]


def test_a_perplexity_beyond_every_number_is_unknown_and_the_rest_is_not(tmp_path: Path) -> None:
    words = [{"prompt": "one", "answer": "x" * 1000}]
    task, _, _, _ = only(tmp_path, LocalTask(name="c", file=items_file(tmp_path, "c", words), kind="cloze"))
    assert task.metrics["perplexity"].value is None and task.metrics["acc"].value == 0.0


def test_an_exact_match_ignores_white_space_around_it(tmp_path: Path) -> None:
    sums = [{"prompt": "6*7=", "answer": "42"}, {"prompt": "6*8=", "answer": 48}]
    entry = LocalTask(name="m", file=items_file(tmp_path, "m", sums), kind="exact_match", stop=["."], max_new_tokens=5)
    task, items, texts, read = only(tmp_path, entry)
    assert task.metric == "exact_match" and [item["score"] for item in items] == [1, 0]
    assert [item["chosen"] for item in items] == ["42", "42"] and texts[1]["gold"] == "48"
    assert read[0][1]["until"] == ["."] and read[0][1]["max_gen_toks"] == 5


def test_perplexity_is_told_in_bits_per_byte(tmp_path: Path) -> None:
    entry = LocalTask(name="t", file=items_file(tmp_path, "t", [{"text": "ab"}, {"text": "üü"}]), kind="perplexity")
    task, items, _, _ = only(tmp_path, entry)
    assert task.metric == "bits_per_byte" and not task.higher_is_better
    assert task.metrics["bits_per_byte"].value == pytest.approx(3)
    assert [item["weight"] for item in items] == [2, 4]


def test_texts_that_all_look_like_dates_stay_texts(tmp_path: Path) -> None:
    days = [{"prompt": "2020-01-02", "choices": ["2020-01-01", "2020-01-03"], "answer": 1}]
    entry = LocalTask(name="days", file=items_file(tmp_path, "days", days), kind="multiple_choice")
    _, _, _, read = only(tmp_path, entry)
    assert read == [("2020-01-02", " 2020-01-01"), ("2020-01-02", " 2020-01-03")]


def test_examples_stand_before_an_item(tmp_path: Path) -> None:
    shots = items_file(tmp_path, "shots", [{"prompt": "x", "answer": "y"}])
    file = items_file(tmp_path, "c", [{"prompt": "one", "answer": "two"}])
    entry = LocalTask(name="c", file=file, kind="cloze", fewshot_file=shots, num_fewshot=1)
    task, _, _, read = only(tmp_path, entry)
    assert task.few_shot == 1 and read == [("x y\n\none", " two")]


def test_lm_evals_own_task_on_local_items_agrees_with_a_local_task(tmp_path: Path) -> None:
    pairs = [{"sentence_good": "He is.", "sentence_bad": "He are.", "UID": "x"}] * 3
    file = items_file(tmp_path, "pairs", pairs)
    entries = [
        NamedTask(task="blimp_adjunct_island", data={"test": file}, subset_field="UID", name="island"),
        LocalTask(name="pairs", file=file, kind="minimal_pairs", subset_field="UID"),
    ]
    own, local = (score(found, ShortestFirst(), seed=1) for found in find_tasks(entries, tmp_path))
    assert own.tasks[0].name == "island" and own.tasks[0].metrics == local.tasks[0].metrics
    for column in ("item", "line", "score", "margin", "chosen"):
        assert own.items[column].to_pylist() == local.items[column].to_pylist()
    assert own.texts["subset"].to_pylist() == local.texts["subset"].to_pylist() == ["x"] * 3


def test_fields_of_a_named_task_are_not_taken_for_ours(tmp_path: Path) -> None:
    pair = json.dumps({"sentence_good": "He is.", "sentence_bad": "He are.", "UID": "x", "subset": "y", "line": 77})
    (tmp_path / "pairs.jsonl").write_text(f"{pair}\n\n{pair}\n")
    entry = NamedTask(task="blimp_adjunct_island", data={"test": tmp_path / "pairs.jsonl"}, subset_field="UID")
    _, items, texts, _ = only(tmp_path, entry)
    assert [item["line"] for item in items] == [1, 3]
    assert [text["subset"] for text in texts] == ["x", "x"]


def test_what_lm_eval_does_not_have_is_told_at_once_with_the_nearest_names(tmp_path: Path) -> None:
    file = items_file(tmp_path, "q", QUESTIONS)
    entries = [
        NamedTask(task="arc_esay"),
        NamedTask(task="blimp", data={"test": file}),
        NamedTask(task="mmlu", name="m"),
    ]
    with pytest.raises(ConfigError) as caught:
        find_tasks(entries, tmp_path)
    unknown, group, renamed = (str(problem) for problem in caught.value.problems)
    assert "'arc_esay': is not a task of lm_eval; did you mean arc_easy" in unknown
    assert "is a group: it takes no local files; name its tasks one by one" in group
    assert "m.name = 'm': mmlu is a group" in renamed


def test_what_cannot_be_asked_of_a_task_is_told_before_a_model_is_touched(tmp_path: Path) -> None:
    gsm = items_file(tmp_path, "gsm", [{"question": "1+1?", "answer": "#### 2"}])
    piqa = items_file(tmp_path, "piqa", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}])
    entries = [NamedTask(task="gsm8k", data={"test": gsm}), NamedTask(task="piqa", data={"test": piqa}, metric="bleu")]
    entries.append(LocalTask(name="own", file=gsm, kind="cloze", prompt="{{question}}", metric="acc,strict"))
    with pytest.raises(ConfigError) as caught:
        find_tasks(entries, tmp_path)
    shots, metric, filtered = (str(problem) for problem in caught.value.problems)
    assert "gsm8k.data.fewshot" in shots and "5 examples" in shots and "num_fewshot: 0" in shots
    assert "piqa.metric = 'bleu': task piqa has acc, acc_norm" in metric
    assert "own.metric = 'acc,strict': task own has acc, perplexity" in filtered


@pytest.mark.parametrize(
    ("items", "told"),
    [
        ([{"question": "q"}], "line 1: does not fit task arc_easy: .*choices"),
        (
            [{"question": "q", "choices": {"text": texts, "label": ["A"] * len(texts)}, "answerKey": "A"}
             for texts in (["a", "b"], [])],
            "line 2: does not fit task arc_easy",
        ),
    ],
    ids=["other fields", "no choices"],
)  # fmt: skip
def test_local_items_must_fit_the_named_task(tmp_path: Path, items: list[dict[str, Any]], told: str) -> None:
    file = items_file(tmp_path, "arc", items)
    with pytest.raises(DataError, match=rf"arc\.jsonl: {told}"):
        find_tasks([NamedTask(task="arc_easy", data={"test": file})], tmp_path)
