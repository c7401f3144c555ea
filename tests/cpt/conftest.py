"""A recommendation for tests that follow one, show one, or hold a run to it; results of evaluations for tests that read
them.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def recommend() -> Callable[..., Any]:
    """Builds a recommendation; changes are its fields, ``tokens``/``share``/``weights`` those of its only stage."""

    def make(*, tokens: int = 1024, share: float | None = 0.5, weights: Any = None, **changes: Any) -> Any:
        from cpt.recommendation import (
            BaseLoss,
            LawNames,
            ObservationsFile,
            PromisePoint,
            Recommendation,
            RecommendedStage,
        )

        domain = None if share is None else 1 - share
        half = PromisePoint(tokens / 2, 2.9, (2.87, 2.93), 2.5, (2.4, 2.6))
        fields = {
            "usage": "tolerance",
            "base": "",
            "params": 8e9,
            "lr": 1e-2,
            "stages": (RecommendedStage(tokens, share, domain, weights or {}),),
            "interval": None if share is None else (0.4, 0.6),
            "law": LawNames("cmr", "dcpt"),
            "promise": (half, PromisePoint(tokens, 2.95, (2.92, 2.98), 2.3, (2.2, 2.4))),
            "base_loss": BaseLoss(2.8, 3.5),
            "observations": ObservationsFile("observations.csv", "ab" * 32),
        }
        return Recommendation(**{**fields, **changes})

    return make


class Evaluations:
    """Writes a run's results as an evaluation would. Losses: documents of ten tokens; a suite: one task of pairs."""

    documents = 40

    def losses(self, run: Path, step: int, *, web: float | None, law: float, pieces: bool = True) -> None:
        """Every document of general text has the loss ``web``, of the domain ``law``, give or take a little."""
        import pyarrow as pa

        from cpt.eval.records import EvalRecord, SourceEval, aggregate, write_eval
        from cpt.eval.results import pieces_file, write_pieces
        from cpt.rundir import RunDir

        number, given = self.documents, (("web", "general", web), ("law", "domain", law))
        sources = {name: SourceEval(group, loss, None, None, 10 * number, number, 0.01) for name, group, loss in given}
        errors = () if web is not None else ("source 'web': the loss is not finite",)
        write_eval(RunDir(run).eval_file(step), EvalRecord(step, 0, sources, aggregate(sources), errors))
        if pieces:
            rows = [
                {"source": name, "document": each, "tokens": 10, "nats": 10 * (loss + 0.01 * (-1) ** each)}
                for name, loss in (("web", math.nan if web is None else web), ("law", law))
                for each in range(number)
            ]
            write_pieces(pieces_file(RunDir(run).evals, step), pa.Table.from_pylist(rows))

    def suite(self, run: Path, step: int, right: int, *, items: int = 100, name: str = "suite") -> None:
        """``right`` of the items of the task ``pairs``, the first ones, are answered right."""
        import pyarrow as pa

        from cpt.eval.results import (
            Measured,
            SuiteRecord,
            TaskResult,
            group_scores,
            items_file,
            record_file,
            texts_file,
            write_items,
            write_suite_record,
            write_texts,
        )
        from cpt.rundir import RunDir

        value = right / items
        stderr = math.sqrt(value * (1 - value) / (items - 1))
        task = TaskResult(
            group="general",
            kind="minimal_pairs",
            metric="acc",
            higher_is_better=True,
            value=value,
            stderr=stderr,
            metrics={"acc": Measured(value, stderr), "other": Measured(0.5, None)},
            items=items,
            truncated=0,
            overlapping=0,
            value_without_overlap=value,
            stderr_without_overlap=stderr,
            few_shot=0,
            task_hash="t",
            seconds=1.0,
        )
        tasks, folder = {"pairs": task}, RunDir(run).evals / name
        record = SuiteRecord(name, "h", step, 0, f"w{step}", "tok", "fp32", "lm_eval 0", tasks, group_scores(tasks))
        write_suite_record(record_file(folder, step), record)
        told = {"weight": 1.0, "margin": 0.0, "chosen": "It are.", "truncated": False, "overlap": False}
        rows = [{"task": "pairs", "item": each, "score": float(each < right), **told} for each in range(items)]
        write_items(items_file(folder, step), pa.Table.from_pylist(rows))
        asked = {"subset": "be", "prompt": "", "gold": "It is.", "choices": ["It is.", "It are."]}
        texts = [{"task": "pairs", "item": each, **asked} for each in range(items)]
        write_texts(texts_file(folder), pa.Table.from_pylist(texts))


@pytest.fixture
def evaluations() -> Evaluations:
    return Evaluations()


WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "is", "was", "+", "=", ".")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 15 words, and as many tokens as the tiny model has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    filling = [f"w{number}" for number in range(64 - len(WORDS) - 3)]
    vocabulary = {word: number for number, word in enumerate(("</s>", "<s>", "<unk>", *WORDS, *filling))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_hf(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a Llama of 20,000 random parameters with 32 positions, and the tiny tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny_hf")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads))
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.2)  # likelihoods that differ
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(folder)
    return folder
