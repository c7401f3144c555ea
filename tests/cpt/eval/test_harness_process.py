"""lm_eval on a tiny model: every kind of task, what does not fit the context, and weights that are not finite."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
import torch
from lm_eval.api.instance import Instance

from cpt.eval.cache import Outcome, read_outcome
from cpt.eval.harness_process import Request, open_model, run
from cpt.eval.suite import LocalTask
from cpt.problems import ConfigError
from cpt.rundir import DataError

pytestmark = pytest.mark.usefixtures("outside_a_job")


def request(model: Path, scratch: Path, *entries: LocalTask, **fields: Any) -> Request:
    plain: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "batch_size": 4, "seed": 1, "copying": False}
    return Request(model=model, scratch=scratch, entries=entries, **{**plain, **fields})


def outcomes(made: Request) -> list[Outcome]:
    told: list[dict[str, Any]] = []
    run(made, told.append)
    numbers = [event["done"] for event in told if "done" in event]
    found = [read_outcome(made.scratch / "outcomes" / str(number)) for number in numbers]
    return [outcome for outcome in found if outcome is not None]


def cloze(folder: Path, prompts: list[str], *, answer: str = "two") -> LocalTask:
    file = folder / "cloze.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt in prompts))
    return LocalTask(name="cloze", file=file, kind="cloze")


def test_likelihoods_are_those_of_the_model(tiny_hf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["one two three", "one"]
    [outcome] = outcomes(request(tiny_hf, tmp_path, cloze(tmp_path, prompts)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_hf), AutoTokenizer.from_pretrained(tiny_hf)
    wanted, greedy = [], []
    for prompt in prompts:
        whole = tokenizer.encode(f"{prompt} two")
        with torch.no_grad():
            log_p = model(torch.tensor([whole])).logits[0, -2].log_softmax(-1)
        wanted.append(float(log_p[whole[-1]]))
        greedy.append(float(log_p.argmax() == whole[-1]))
    assert outcome.items["score"].to_pylist() == greedy
    assert outcome.tasks[0].metrics["perplexity"].value == pytest.approx(math.exp(-sum(wanted) / 2), rel=1e-5)


def test_prompts_longer_than_the_context_are_cut_and_counted(tiny_hf: Path, tmp_path: Path) -> None:
    long, fits = " ".join(["one"] * 60), " ".join(["one"] * 20)
    task = cloze(tmp_path, [long, fits])
    written = task.model_copy(update={"name": "written", "kind": "exact_match", "max_new_tokens": 4})
    read = task.model_copy(update={"name": "read", "kind": "perplexity", "text": "{{prompt}}"})
    found = outcomes(request(tiny_hf, tmp_path, task, written, read))
    assert [outcome.items["truncated"].to_pylist() for outcome in found] == [[True, False], [True, False], [False] * 2]


def test_an_answer_longer_than_the_context_is_cut_too(tiny_hf: Path, tmp_path: Path) -> None:
    [outcome] = outcomes(request(tiny_hf, tmp_path, cloze(tmp_path, ["one"], answer=" ".join(["two"] * 60))))
    assert outcome.items["truncated"].to_pylist() == [True]
    assert outcome.tasks[0].metrics["perplexity"].value is not None


def test_an_answer_that_joins_the_end_of_its_prompt_is_refused(tiny_hf: Path, tmp_path: Path) -> None:
    task = cloze(tmp_path, ["one"], answer="x").model_copy(update={"delimiter": ""})
    with pytest.raises(DataError, match=r"no tokens of its own: \(prompt, answer\) = \('one', 'x'\)"):
        outcomes(request(tiny_hf, tmp_path, task))


def test_a_generation_that_leaves_no_room_for_a_prompt_is_refused(tiny_hf: Path, tmp_path: Path) -> None:
    task = cloze(tmp_path, ["one"]).model_copy(update={"kind": "exact_match", "max_new_tokens": 64})
    with pytest.raises(ConfigError, match="generates up to 64 tokens, the model has 32 positions"):
        outcomes(request(tiny_hf, tmp_path, task))


def test_a_task_may_name_its_number_of_new_tokens_as_other_libraries_do(tiny_hf: Path, tmp_path: Path) -> None:
    settings = {"until": [], "max_new_tokens": 4, "do_sample": False}
    model = open_model(request(tiny_hf, tmp_path))
    prompts = [" ".join(["one"] * number) for number in (28, 29)]
    model.generate_until([Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts])
    assert model.truncated == {(prompts[1], "")}  # of 32 positions


def test_weights_that_are_not_finite_give_no_score(tiny_hf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_hf)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_hf).save_pretrained(tmp_path / "broken")
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"sentence_good": "one two", "sentence_bad": "two one"}\n')
    pairs = LocalTask(name="pairs", file=file, kind="minimal_pairs")
    [outcome] = outcomes(request(tmp_path / "broken", tmp_path, pairs))
    [task] = outcome.tasks
    assert task.metrics["acc"].value is None
    assert task.errors == ("task pairs: log-likelihoods are not finite in 1 of 1 items",)
    assert outcome.items["chosen"].to_pylist() == [""] and math.isnan(outcome.items["score"][0].as_py())


def test_it_leaves_with_the_process_that_started_it_and_clears_the_scratch_folder(
    tiny_hf: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    asked = request(tiny_hf, scratch, cloze(tmp_path, ["one"] * 10_000))
    (scratch / "request.json").write_text(asked.model_dump_json())
    command = [sys.executable, "-m", "cpt.eval.harness_process", str(scratch / "request.json")]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert ended.returncode == 143 and not scratch.exists()


def test_bf16_computes_in_bf16(tiny_hf: Path, tmp_path: Path) -> None:
    task = cloze(tmp_path, ["one two three"])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    [exact] = outcomes(request(tiny_hf, tmp_path / "a", task))
    [rounded] = outcomes(request(tiny_hf, tmp_path / "b", task, dtype="bf16"))
    values = [found.tasks[0].metrics["perplexity"].value for found in (exact, rounded)]
    assert values[0] != values[1] and values[0] == pytest.approx(values[1], rel=0.05)
