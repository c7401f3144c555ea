"""`cpt plan VERB` from outside: the JSON that programs rely on, files beside it, exit code 2 and words on bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpt.cli import main

Rows = list[dict[str, Any]]
Verb = Callable[..., Any]


@pytest.fixture
def table(observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]) -> Path:
    return write_csv(observation_rows(sizes=(0.5, 1.8, 4.0), num_tokens=4))


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Verb:
    """``plan("fit", table, ...)`` runs in a folder of its own; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["cpt", "plan", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def facts_of(result: tuple[int, str, str]) -> dict[str, Any]:
    assert result[0] == 0, result[2]
    found: dict[str, Any] = json.loads(result[1])
    return found


def test_fit_gives_parameters_quality_and_held_out_errors(plan: Verb, table: Path, tmp_path: Path) -> None:
    facts = facts_of(plan("fit", table, "--law", "dcpt", "--target", "domain", "--json"))
    assert {"law", "target", "params", "r2", "huber", "mae", "heldout", "warnings"} <= facts.keys()
    assert set(facts["heldout"]) == {"share", "tokens", "params"}
    assert facts["r2"] > 0.999 and facts["heldout"]["share"] < 0.002
    assert set(facts["params"]) == {"E", "A", "alpha", "B", "beta", "eta", "C", "gamma", "eps"}
    assert json.loads((tmp_path / "fit.json").read_text()) == facts
    assert (tmp_path / "fit.png").stat().st_size > 5000 and (tmp_path / "fit.svg").stat().st_size > 5000


def test_compare_ranks_laws_for_both_targets(plan: Verb, table: Path, tmp_path: Path) -> None:
    facts = facts_of(plan("compare", table, "--json"))
    for target in ("general", "domain"):
        errors = [line["heldout_mae"] for line in facts["ranking"] if line["target"] == target and not line["excluded"]]
        assert errors == sorted(errors) and len(errors) >= 4
    assert {"law", "target", "heldout_mae", "heldout_r2"} <= facts["ranking"][0].keys()
    assert (tmp_path / "compare.svg").exists()


def test_recommend_writes_a_plan_that_show_understands(plan: Verb, table: Path, tmp_path: Path) -> None:
    asked = ("--params", "1.8e9", "--tokens", "20e9", "--tolerance", "0.03")
    facts = facts_of(plan("recommend", table, *asked, "--json"))
    low, high = facts["interval"]
    assert low <= facts["share_general"] <= high
    assert {"loss_general", "loss_domain"} <= facts["predicted"].keys()
    assert {"name", "share_general", "loss_general", "loss_domain", "regret"} <= facts["baselines"][0].keys()
    assert set(facts["law"]) == {"general", "domain"}
    shown = facts_of(plan("show", tmp_path / "plan.json", "--json"))
    assert shown["fingerprint"] == facts["fingerprint"]
    assert plan("show", tmp_path / "plan.json")[0] == 0
    assert (tmp_path / "plan.png").exists()


def test_recommend_answers_all_three_usages_in_words(plan: Verb, table: Path) -> None:
    usages = (
        ("--tokens", "20e9", "--tolerance", "0.03", "--law", "dcpt"),
        ("--params", "1.8e9", "--domain-tokens", "5e9", "--law", "dcpt"),
        ("--flops", "1e21", "--share-general", "0.2", "--law", "dcpt"),
    )
    for usage in usages:
        code, out, err = plan("recommend", table, *usage)
        assert code == 0, err
        assert "general" in out and "nats" in out


def test_critical_gives_a_share_for_every_epsilon(plan: Verb, table: Path) -> None:
    asked = ("--tokens", "20e9", "--params", "1.8e9", "--epsilon", "0.0", "0.01", "0.02", "0.05", "--json")
    facts = facts_of(plan("critical", table, *asked))
    assert [line["epsilon"] for line in facts["critical"]] == [0.0, 0.01, 0.02, 0.05]
    assert all({"epsilon", "share_general", "interval", "feasible"} <= line.keys() for line in facts["critical"])
    shares = [line["share_general"] for line in facts["critical"] if line["feasible"]]
    assert shares == sorted(shares, reverse=True)


def test_predict_gives_a_loss_with_its_interval(plan: Verb, table: Path) -> None:
    asked = ("--target", "general", "--params", "1.8e9", "--tokens", "10e9", "--share-general", "0.25", "--json")
    facts = facts_of(plan("predict", table, "--law", "auto", *asked))
    low, high = facts["interval"]
    assert low < facts["loss"] < high
    assert facts["loss"] == pytest.approx(2.849236, abs=0.005)
    assert facts["law"]


@pytest.fixture
def many(write_csv: Callable[..., Path]) -> Path:
    """24 mixtures of three sources; the loss falls with the share of b, most of all near 0."""
    import numpy as np

    shares = np.random.default_rng(0).dirichlet([1.0, 1.0, 1.0], size=24)
    return write_csv(
        [
            {"run": f"m{i}", "base": "none", "params": 1e6, "tokens": 1e9, "share_a": a, "share_b": b, "share_c": c,
             "loss_b": 3 + (0.05 + b) ** -0.3, "loss_c": 3 + (0.05 + c) ** -0.3}
            for i, (a, b, c) in enumerate(shares)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("law", ["mixing", "additive", "regmix", "auto"])
def test_more_than_two_sources_are_predicted_from_weights(plan: Verb, many: Path, tmp_path: Path, law: str) -> None:
    losses = []
    for name, weights in (("little", {"a": 8, "b": 1, "c": 1}), ("much", {"a": 1, "b": 8, "c": 1})):
        (tmp_path / f"{name}.json").write_text(json.dumps(weights))
        asked = ("--law", law, "--target", "b", "--weights", tmp_path / f"{name}.json", "--json")
        losses.append(facts_of(plan("predict", many, *asked))["loss"])
    assert losses[0] > losses[1]


def test_more_than_two_sources_are_mixed_within_what_they_hold(plan: Verb, many: Path, tmp_path: Path) -> None:
    (tmp_path / "available.json").write_text(json.dumps({"a": 2e9, "b": 2e7, "c": 2e9}))
    asked = ("--tokens", "1e9", "--available", tmp_path / "available.json", "--law", "mixing", "--json")
    facts = facts_of(plan("recommend", many, *asked))
    assert facts["weights"]["b"] == pytest.approx(0.08, abs=1e-3)  # four passes
    assert sum(facts["weights"].values()) == pytest.approx(1)
    assert {line["name"] for line in facts["baselines"]} == {"uniform", "token-proportional", "best pilot"}
    assert plan("show", tmp_path / "plan.json")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fit", "absent.csv"), "absent.csv: cannot be read"),
        (("fit", "TABLE", "--law", "nonsense"), "--law = 'nonsense': no such law"),
        (("fit", "TABLE", "--target", "french"), "no column loss_french"),
        (("predict", "TABLE", "--share-general", "1.5"), "--share-general = 1.5"),
        (("predict", "TABLE"), "--share-general: is what these observations of 2 sources need"),
        (("recommend", "TABLE"), "--tokens: is required"),
        (("recommend", "TABLE", "--tokens", "nan"), "--tokens = nan"),
        (("show", "absent.json"), "absent.json"),
        (("critical", "TABLE", "--epsilon", "nan"), "epsilon"),
        (("predict-curve", "TABLE", "--schedule", "TABLE"), "lr"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_says_what_and_why(
    plan: Verb, table: Path, arguments: tuple[str, ...], words: str
) -> None:
    code, _, err = plan(*(table if word == "TABLE" else word for word in arguments))
    assert code == 2, err
    assert words in err, err
    assert "Traceback" not in err


def test_planning_needs_no_torch(table: Path, tmp_path: Path) -> None:
    program = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "deepspeed", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r} here", name=name)

sys.meta_path.insert(0, NoTorch())
from cpt.cli import main
sys.argv = ["cpt", "plan", "recommend", sys.argv[1], "--tokens", "10e9", "--law", "dcpt", "--json"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program, str(table)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"] == "tolerance"


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("TABLE", "is an input"),
        ("fit.png", "is the name of the figure"),
        (".", "is a folder"),
        ("TABLE/fit.json", "lies below a file"),
    ],
)
def test_what_is_there_is_not_overwritten(plan: Verb, table: Path, out: str, words: str) -> None:
    before = table.read_bytes()
    code, _, err = plan("fit", table, "--law", "dcpt", "--out", out.replace("TABLE", str(table)))
    assert code == 2 and words in err
    assert table.read_bytes() == before


def test_the_critical_share_of_a_size_that_nothing_is_known_of_is_refused(
    plan: Verb, observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows(sizes=(1.8,))
    one = write_csv([*rows, {**rows[0], "run": "b8", "base": "b8", "params": 8e9}])
    code, _, err = plan("critical", one, "--law", "dcpt", "--params", "8e9")
    assert code == 2 and "the observations hold one model size" in err
