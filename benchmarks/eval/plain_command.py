"""The plain ``lm_eval`` command on an exported folder, with the data of ../shared in place of its own: what the
benchmarks of suites compare with. The task YAMLs are written here in a few lines, not by cpt.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
EVALS, WEIGHTS = SHARED / "evals", SHARED / "weights" / "stories260K"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
BLIMP = ("adjunct_island", "animate_subject_passive", "determiner_noun_agreement_1", "npi_present_1", "passive_1")
BATCH_SIZE = 16
POSITIONS = 512  # of stories260K


@dataclass(frozen=True)
class Asked:
    """A task of lm_eval on local files: its items, those that examples are drawn from, how many, and a limit."""

    task: str
    test: Path
    fewshot: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None

    def for_suite(self) -> dict[str, Any]:
        """The same as an entry of a suite."""
        data = {"test": str(self.test), **({"fewshot": str(self.fewshot)} if self.fewshot else {})}
        stated = {"num_fewshot": self.num_fewshot, "limit": self.limit}
        return {"task": self.task, "data": data, **{name: value for name, value in stated.items() if value is not None}}

    def as_yaml(self, folder: Path, original: Path) -> Path:
        """The task on these files for ``--include_path``; ``original`` is lm_eval's own YAML."""
        files = {"test": str(self.test), **({"examples": str(self.fewshot)} if self.fewshot else {})}
        raw: dict[str, Any] = {
            "include": str(original),
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            "fewshot_split": "examples" if self.fewshot else None,
        }
        if self.num_fewshot is not None:
            raw["num_fewshot"] = self.num_fewshot
        path = folder / f"{self.task}.yaml"
        path.write_text(yaml.safe_dump({**raw, "task": f"plain_{self.task}"}))
        return path


def asked_tasks(scratch: Path, *, limit: int | None = None) -> list[Asked]:
    """What the issue names: 5 subsets of BLiMP, ARC easy, PIQA, LAMBADA, 20 items of GSM8K, 2 subjects of MMLU."""
    lines = (EVALS / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    (scratch / "gsm8k_examples.jsonl").write_text("\n".join(lines[-50:]) + "\n", encoding="utf-8")
    piqa = scratch / "piqa.jsonl"
    piqa.write_text("".join(_answers_that_fit(EVALS / "piqa" / "validation.jsonl")), encoding="utf-8")
    mmlu = EVALS / "mmlu"
    return [
        *(Asked(f"blimp_{name}", EVALS / "blimp" / f"{name}.jsonl", limit=limit) for name in BLIMP),
        Asked("arc_easy", EVALS / "arc_easy" / "test.jsonl", limit=limit),
        Asked("piqa", piqa, limit=limit),
        Asked("lambada_openai", EVALS / "lambada_openai" / "test.jsonl", limit=limit),
        Asked("gsm8k", EVALS / "gsm8k" / "test.jsonl", scratch / "gsm8k_examples.jsonl", 2, min(20, limit or 20)),
        *(
            Asked(f"mmlu_{name}", mmlu / f"{name}_test.jsonl", mmlu / f"{name}_dev.jsonl", 5, limit)
            for name in ("anatomy", "international_law")
        ),
    ]


def _answers_that_fit(file: Path) -> Iterator[str]:
    """The items of PIQA whose answers the model has positions for: of a longer one the plain command ends in an
    AssertionError, where cpt cuts it and counts it.
    """
    encoder = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        item = json.loads(line)
        if all(len(encoder.encode(f" {item[name]}").ids) <= POSITIONS for name in ("sol1", "sol2")):
            yield line


def export_stories(out: Path) -> Path:
    """The stories260K weights as cpt exports them."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from cpt.model.export import ExportSpec, export_checkpoint

    tensors = load_file(WEIGHTS / "model.safetensors")
    spec = ExportSpec(out=out, tokenizer=WEIGHTS)
    export_checkpoint(tensors.items(), AutoConfig.from_pretrained(WEIGHTS), spec)
    return out


def write_plain_tasks(tasks: Sequence[Asked], folder: Path) -> None:
    """The tasks' YAMLs in a new folder."""
    from lm_eval.tasks import TaskManager

    folder.mkdir(parents=True)
    index = TaskManager().task_index
    for task in tasks:
        original = index[task.task].yaml_path
        assert original is not None, f"{task.task} has no YAML"
        task.as_yaml(folder, original)


def run_plain(model: Path, tasks: Sequence[Asked], folder: Path, *, limit: int | None = None) -> None:
    """One ``lm_eval run`` over the tasks written to ``folder``, from start to end."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", str(BATCH_SIZE)]
    command += ["--tasks", ",".join(f"plain_{task.task}" for task in tasks), "--include_path", str(folder)]
    command += ["--output_path", str(folder / "out"), "--log_samples", *(["--limit", str(limit)] if limit else [])]
    environment = {**os.environ, **OFFLINE, "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"lm_eval ended with {done.returncode}:\n{done.stderr[-2000:]}")


def read_plain(folder: Path, task: str) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """What the command wrote of a task: its metrics, and its logged samples."""
    [results] = (folder / "out").rglob("results_*.json")
    metrics = json.loads(results.read_text())["results"][f"plain_{task}"]
    [path] = (folder / "out").rglob(f"samples_plain_{task}_2*.jsonl")
    return metrics, [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
