"""`cpt eval` from outside: checkpoints or a verb, tables and JSON, gates with their exit codes, and messages to act on."""

import json
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cpt.eval_tables import render_items, render_suites

Workshop = Any  # the fixtures of tests/conftest.py
VERBS = ["checkpoints", "init", "watch", "compare", "gate", "items", "documents", "tokens", "sequence"]
GATE = ("eval", "gate")


@pytest.fixture
def run(tmp_path: Path, evaluations: Any) -> Path:
    """General text went from 2.0 over 2.5 to 2.2 nats, the domain from 3.0 to 2.4; 80 of 100 pairs were right, 60 are."""
    folder = tmp_path / "runs" / "law"
    for step, web, law in ((0, 2.0, 3.0), (5, 2.5, 2.7), (10, 2.2, 2.4)):
        evaluations.losses(folder, step, web=web, law=law)
    evaluations.suite(folder, 0, 80)
    evaluations.suite(folder, 10, 60)
    return folder


# --- the group


def test_help_teaches_every_form_with_an_example(workshop: Workshop) -> None:
    told = " ".join(workshop.cpt("eval", "--help").out.replace("│", " ").split())
    assert "cpt eval runs/NAME/checkpoints/step_00000500" in told and "CHECKPOINT... | VERB" in told
    assert all(f"cpt eval {verb} " in told for verb in VERBS if verb != "checkpoints")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_knows_json(workshop: Workshop, verb: str) -> None:
    done = workshop.cpt("eval", verb, "--help")
    assert done.code == 0 and "Usage:" in done.out
    assert "--json" in done.out or verb == "watch"


def test_the_verbs_need_no_torch_where_they_read_files_only(run: Path) -> None:
    program = (
        "import sys\n"
        "from cpt import cli\n"
        f"for words in {[['compare', str(run)], ['items', str(run)], ['documents', str(run)], ['sequence', str(run)]]!r}:\n"
        "    sys.argv = ['cpt', 'eval', *words]\n"
        "    try:\n        cli.main()\n    except SystemExit as end:\n        assert not end.code, words\n"
        "assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_no_checkpoint_is_evaluated_and_refused_as_one(workshop: Workshop, run: Path) -> None:
    for words in ([run], ["--json", run], ["--device", "cpu", run / "checkpoints" / "step_00000010"]):
        done = workshop.cpt("eval", *words)
        assert done.code == 2 and str(run) in done.err, done.text


def test_a_mistyped_verb_is_not_taken_for_a_checkpoint(workshop: Workshop) -> None:
    done = workshop.cpt("eval", "comapre", "runs/a")
    assert done.code == 2 and "Did you mean 'compare'" in done.err


def test_a_folder_that_is_called_like_a_typo_is_a_checkpoint(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gates").mkdir()
    done = workshop.cpt("eval", "gates")
    assert done.code == 2 and "Did you mean" not in done.err


# --- compare


def test_compare_says_what_dropped_in_words_and_as_json(workshop: Workshop, run: Path) -> None:
    done = workshop.cpt("eval", "compare", run)
    assert done.code == 0 and "general loss +0.2000" in done.out and "drop" in done.out and "gain" in done.out
    facts = json.loads(workshop.cpt("eval", "compare", run, "--json").out)
    [compared] = facts["runs"]
    assert compared["general_forgetting"]["value"] == pytest.approx(0.2)
    assert {row["name"]: row["word"] for row in compared["groups"]} == {"general": "drop"}


def test_compare_with_another_run_names_it(workshop: Workshop, run: Path, evaluations: Any) -> None:
    other = run.parent / "other"
    evaluations.losses(other, 10, web=2.2, law=2.4)
    evaluations.suite(other, 10, 60)
    done = workshop.cpt("eval", "compare", run, "--baseline", other)
    assert "against other" in done.out and "within noise" in done.out and "drop" not in done.out.split("p is")[0]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--suite", "suit"], "suit"),
        (["--baseline", "nowhere"], "--baseline"),
        (["--step", "7"], "step 7"),
        (["--suite", "absent.yaml"], "absent.yaml"),
    ],
)
def test_what_cannot_be_compared_is_named(workshop: Workshop, run: Path, words: list[str], named: str) -> None:
    done = workshop.cpt("eval", "compare", run, *words)
    assert done.code == 2 and named in done.err


def test_a_suite_may_be_named_by_its_file(workshop: Workshop, run: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}\n')
    task = {"name": "pairs", "file": "pairs.jsonl", "kind": "minimal_pairs"}
    (tmp_path / "my.yaml").write_text(json.dumps({"name": "suite", "groups": {"general": [task]}}))  # JSON is YAML
    assert workshop.cpt("eval", "compare", run, "--suite", tmp_path / "my.yaml").code == 0


# --- gate


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("RUN --require 'domain_gain >= 0.10'", 0),
        ("RUN --require 'domain_gain >= 0.10' 'general_forgetting <= 0.3'", 0),
        ("--require 'domain_gain >= 0.10' 'general_forgetting <= 0.3' RUN", 0),
        ("RUN --require 'domain_gain>=0.10' --require 'general_forgetting.high<=0.3'", 0),
        ("RUN --require 'domain_gain >= 0.10' 'general_forgetting <= 0.02'", 4),
        ("RUN --require 'worst_general_forgetting <= 0.4'", 4),
        ("RUN --require 'worst_general_forgetting.high <= 9'", 4),
        ("RUN --require 'relative_general_forgetting <= 11%' 'general.accuracy.change >= -25%'", 0),
        ("RUN --require 'general.accuracy.low >= 60%'", 4),
        ("RUN --require 'law.loss < 2.5' 'pairs.acc.change.high < 0'", 0),
        ("RUN --require 'domain_gian >= 0.10'", 2),
        ("RUN --require domain_gain", 2),
        ("RUN", 2),
        ("--require 'domain_gain >= 0.10'", 2),
        ("RUN RUN --require 'domain_gain >= 0.10'", 2),
        ("RUN/nowhere --require 'domain_gain >= 0.10'", 2),
        ("RUN --baseline RUN --require 'domain_gain >= 0.10'", 2),
    ],
)
def test_a_gate_ends_with_0_met_4_not_met_and_2_not_understood(
    workshop: Workshop, run: Path, words: str, code: int
) -> None:
    done = workshop.cpt(*GATE, *(word.replace("RUN", str(run)) for word in shlex.split(words)))
    assert done.code == code, done.text


def test_a_gate_shows_the_requirement_what_was_measured_and_why_it_is_not_met(workshop: Workshop, run: Path) -> None:
    words = ["--require", "general_forgetting <= 0.02", "domain_gain >= 0.1"]
    told = " ".join(workshop.cpt(*GATE, run, *words).out.replace("│", " ").split())
    assert "general_forgetting <= 0.02" in told and "0.2000" in told and "is not <= 0.02" in told
    assert "not met: 1 of 2" in told
    facts = json.loads(workshop.cpt(*GATE, run, *words, "--json").out)
    assert facts["met"] is False and [check["met"] for check in facts["checks"]] == [False, True]
    low, high = facts["checks"][0]["interval"]
    assert low <= facts["checks"][0]["value"] <= high


def test_a_gate_says_which_checkpoint_it_judged_and_what_makes_that_doubtful(
    workshop: Workshop, run: Path, evaluations: Any
) -> None:
    evaluations.losses(run, 20, web=2.2, law=2.4)  # its benchmarks lag behind
    words = ["--require", "domain_gain >= 0.1"]
    told = " ".join(workshop.cpt(*GATE, run, *words).out.split())
    assert "law after step 20, against its base" in told
    assert "note: benchmarks are of step 10, held-out losses of step 20" in told
    facts = json.loads(workshop.cpt(*GATE, run, *words, "--json").out)
    assert (facts["suite_step"], facts["loss_step"], len(facts["notes"])) == (10, 20, 1)


def test_a_gate_on_what_was_never_measured_is_not_met(workshop: Workshop, tmp_path: Path, evaluations: Any) -> None:
    evaluations.losses(tmp_path / "run", 10, web=2.0, law=2.0)  # without a base
    done = workshop.cpt(*GATE, tmp_path / "run", "--require", "domain_gain >= -100")
    assert done.code == 4 and "NO" in done.out and "not known" in done.out


def test_a_requirement_that_is_not_understood_names_the_nearest_metric(workshop: Workshop, run: Path) -> None:
    done = workshop.cpt(*GATE, run, "--require", "general_forgeting <= 1")
    assert "did you mean general_forgetting" in done.err


# --- what was forgotten


def test_items_lists_what_was_right_and_is_wrong_now(workshop: Workshop, run: Path) -> None:
    done = workshop.cpt("eval", "items", run)
    assert done.code == 0 and "20 items lost, 0 regained" in done.out and "It is." in done.out
    facts = json.loads(workshop.cpt("eval", "items", run, "--examples", "1", "--json").out)
    assert (facts["lost"], facts["gained"]) == (20, 0)
    [subset] = facts["subsets"]
    assert (subset["subset"], len(subset["lost_examples"])) == ("be", 1)


def test_items_without_results_of_the_base_say_how_to_get_them(workshop: Workshop, run: Path) -> None:
    (run / "evals" / "suite" / "step_00000000.json").unlink()
    done = workshop.cpt("eval", "items", run)
    assert done.code == 2 and "no results of the base" in done.err and "--suite" in done.err


def test_items_against_what_is_no_run_are_refused_as_compare_does(workshop: Workshop, run: Path) -> None:
    done = workshop.cpt("eval", "items", run, "--baseline", "nowhere")
    assert done.code == 2 and "--baseline" in done.err and "is no run folder" in done.err


def test_names_from_outside_are_shown_and_not_interpreted() -> None:
    task = {"group": "[/general]", "metric": "acc", "value": 0.5, "stderr": None}
    task |= {"items": 2, "truncated": 0, "overlapping": 0}
    record = {"suite": "s", "step": 5, "tasks": {"pairs": task}, "groups": {}, "copying": None, "errors": []}
    subset = {"task": "pairs", "subset": "be\x1b[2J", "items": 2, "right_before": 1, "right_after": 0}
    example = {"item": 1, "prompt": "", "gold": "", "chosen_after": "", "overlap": False}
    example |= {"margin_before": None, "margin_after": None}
    diff = {**subset, "lost": 1, "gained": 0, "lost_examples": [example]}
    items = {"run": "r", "step": 5, "baseline": "base", "suite": "s", "lost": 1, "gained": 0, "subsets": [diff]}
    out = StringIO()
    Console(file=out, width=200, force_terminal=True, color_system=None).print(
        render_suites([record]), render_items(items)
    )
    assert "[/general]" in out.getvalue() and "\x1b[2J" not in out.getvalue() and "be␛[2J" in out.getvalue()


def test_items_against_another_run_compare_both_ends(workshop: Workshop, run: Path, evaluations: Any) -> None:
    evaluations.suite(run.parent / "other", 10, 65)
    facts = json.loads(workshop.cpt("eval", "items", run, "--baseline", run.parent / "other", "--json").out)
    assert (facts["lost"], facts["baseline"]) == (5, "other")


def test_documents_are_listed_with_their_change(workshop: Workshop, run: Path) -> None:
    done = workshop.cpt("eval", "documents", run)
    assert done.code == 0 and "+0.2000 nats per token" in done.out
    assert set(json.loads(workshop.cpt("eval", "documents", run, "--json").out)["sources"]) == {"law", "web"}


@pytest.mark.parametrize("document", ["web", "web:", ":3", "web:x", "web:-1"])
def test_a_document_is_named_by_source_and_number(workshop: Workshop, run: Path, document: str) -> None:
    done = workshop.cpt("eval", "tokens", run / "checkpoints" / "step_00000010", "--document", document)
    assert done.code == 2 and "SOURCE:NUMBER" in done.err


def test_a_sequence_tells_what_was_retained(workshop: Workshop, run: Path) -> None:
    done = workshop.cpt("eval", "sequence", run)
    assert done.code == 0 and "+0.2000" in done.out
    assert json.loads(workshop.cpt("eval", "sequence", run, "--json").out)["retained"] == pytest.approx(2.3)


# --- a suite for a file


def test_init_writes_a_suite_and_shows_the_first_item(workshop: Workshop, tmp_path: Path) -> None:
    items, out = tmp_path / "items.jsonl", tmp_path / "suite.yaml"
    items.write_text('{"question": "1 + 1?", "choices": ["1", "2"], "answer": 1}\n')
    done = workshop.cpt("eval", "init", items, "--kind", "multiple_choice", "--group", "maths", "--out", out)
    assert done.code == 0 and "Question: 1 + 1?" in done.out and out.is_file()
    again = workshop.cpt("eval", "init", items, "--kind", "multiple_choice", "--out", out)
    assert again.code == 2 and "is there already" in again.err
    shown = workshop.cpt("eval", "init", items, "--kind", "multiple_choice", "--out", tmp_path / "b.yaml", "--json").out
    assert json.loads(shown)["first_item"]["answer"] == 1
