"""Claim: a step of ours takes no longer than the same step of other trainers, on the same machine.

    python -m venv rivals && rivals/bin/pip install torch litgpt transformers accelerate
    python -m benchmarks.engine.step_time_rivals --peer-python rivals/bin/python
                                                          writes benchmarks/results/engine_step_time.json

Three programs train a Llama of the same shape from random weights on the same rows (one document each, so that nobody
needs a mask), in fp32 with clipping and AdamW, world 1, all cores: `Trainer` of this project with its engine and
loader, `transformers.Trainer`, and litgpt's `pretrain`, each as its documentation starts it. litgpt compiles its model,
which nobody can switch off there, so ours is measured both as it comes and with `train.compile`; litgpt is compared
with the compiled one. Every program runs alone, in turn, for several rounds; a step is the time from one fetch of rows
to the next, and of a round the median counts after warm-up. Bars: <= 0.9 of transformers.Trainer, <= 1.0 of litgpt.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# name -> hidden size, layers, heads, MLP width, vocabulary, row length, rows per step
SIZES = {"12M, vocabulary 4k": (320, 8, 10, 864, 4096, 512, 2), "15M, vocabulary 32k": (320, 4, 10, 864, 32000, 512, 2)}
WARM_UP, ROUNDS = 6, 5


def ours(size: tuple[int, ...], steps: int, *, compiled: bool) -> list[float]:
    """Seconds of every step, with the run's own objects: model, kernels, engine, loader, trainer."""
    hidden, layers, heads, mlp, vocab, seq_len, rows = size
    from benchmarks.engine.ranks import write_run
    from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, number in (("train", steps * rows + rows), ("heldout", 2)):
            label = StoreLabel("noise", "general", split, vocab, 0, TokenizerFacts("none", "0" * 64, "none"))
            documents = [[*row.tolist(), 0] for row in noise(number, seq_len - 1, vocab)]
            write_split(folder / "noise" / split, label, [documents])
        model = {
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": seq_len,
            "tie_word_embeddings": False,
        }
        run_file = write_run(
            folder / "ours.yaml",
            {"noise": str(folder / "noise")},
            steps=steps,
            rows=rows,
            model__fresh=model,
            data__seq_len=seq_len,
            replay__share_general=1.0,
            train__tokens=steps * rows * seq_len,
            train__global_batch_tokens=rows * seq_len,
            train__micro_batch_size=rows,
            train__compile=compiled,
            train__peak_lr=1e-4,
        )
        return train_and_time(run_file, folder / "ours" / "metrics.jsonl")


def train_and_time(run_file: Path, metrics: Path) -> list[float]:
    from benchmarks.engine.ranks import read_lines
    from cpt.train.main import main as train

    assert train([str(run_file)]) == 0
    times = [line["time"] for line in read_lines(metrics)]
    return [after - before for before, after in pairwise(times)]


def noise(rows: int, seq_len: int, vocab: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.random.default_rng(0).integers(1, vocab, size=(rows, seq_len), dtype=np.int64)


class Rows:
    """A map-style data set that remembers when the first row of each batch was fetched."""

    def __init__(self, rows: Any, per_step: int, *, as_dict: bool) -> None:
        self.rows, self.per_step, self.as_dict = rows, per_step, as_dict
        self.times: list[float] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        import torch

        if index % self.per_step == 0:
            self.times.append(time.perf_counter())
        row = torch.from_numpy(self.rows[index])
        return {"input_ids": row, "labels": row} if self.as_dict else row

    def seconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times)]


def transformers_trainer(size: tuple[int, ...], steps: int) -> list[float]:
    hidden, layers, heads, mlp, vocab, seq_len, rows = size
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=seq_len,
        use_cache=False,
    )
    data = Rows(noise(steps * rows, seq_len, vocab), rows, as_dict=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=rows,
            learning_rate=1e-4,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            train_sampling_strategy="sequential",
        )
        Trainer(model=LlamaForCausalLM(config), args=settings, train_dataset=data).train()
    return data.seconds()


def litgpt_pretrain(size: tuple[int, ...], steps: int) -> list[float]:
    hidden, layers, heads, mlp, vocab, seq_len, rows = size
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule
    from litgpt.pretrain import setup
    from torch.utils.data import DataLoader

    data = Rows(noise(steps * rows, seq_len + 1, vocab), rows, as_dict=False)

    class Noise(DataModule):  # type: ignore[misc]
        def connect(self, **settings: Any) -> None:
            pass

        def train_dataloader(self) -> Any:
            return DataLoader(data, batch_size=rows)

        def val_dataloader(self) -> Any:
            return DataLoader(Rows(noise(2 * rows, seq_len + 1, vocab), rows, as_dict=False), batch_size=rows)

    config = Config(
        name="rival",
        block_size=seq_len,
        padded_vocab_size=vocab,
        vocab_size=vocab,
        n_layer=layers,
        n_head=heads,
        n_embd=hidden,
        n_query_groups=heads,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=mlp,
    )
    train = TrainArgs(
        save_interval=None,
        global_batch_size=rows,
        micro_batch_size=rows,
        max_tokens=steps * rows * seq_len,
        max_norm=1.0,
        lr_warmup_steps=2,
        max_seq_length=seq_len,
    )
    sys.argv = ["litgpt", "rival"]  # it reads the command line again to save it beside the weights
    with tempfile.TemporaryDirectory() as folder:
        setup(
            "rival",
            model_config=config,
            out_dir=Path(folder),
            precision="32-true",
            data=Noise(),
            train=train,
            eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
            logger_name="csv",
            devices=1,
        )
    return data.seconds()


PROGRAMS = {
    "ours": lambda size, steps: ours(size, steps, compiled=False),
    "ours_compiled": lambda size, steps: ours(size, steps, compiled=True),
    "transformers": transformers_trainer,
    "litgpt": litgpt_pretrain,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="Python of the environment that holds the rivals")
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program:
        seconds = PROGRAMS[options.program](SIZES[options.size], options.steps)
        options.seconds_to.write_text(json.dumps(seconds))
        return
    if options.peer_python is None:
        parser.error("--peer-python is needed: see the first lines of this help")
    from benchmarks.engine.result import write_result

    result = {name: compare(name, options) for name in SIZES}
    write_result("engine_step_time.json", {"bars": {"transformers": 0.9, "litgpt": 1.0}, "sizes": result})


def compare(size: str, options: argparse.Namespace) -> dict[str, Any]:
    medians: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for number in range(options.rounds):
        for name in PROGRAMS:
            python = sys.executable if name.startswith("ours") else str(options.peer_python)
            medians[name].append(round_of(python, name, size, options.steps))
            print(size, number, name, f"{1e3 * medians[name][-1]:.1f} ms", flush=True)

    def ratio(mine: str, theirs: str) -> float:
        return round(statistics.median(a / b for a, b in zip(medians[mine], medians[theirs], strict=True)), 3)

    return {
        "milliseconds": {name: round(1e3 * statistics.median(values), 1) for name, values in medians.items()},
        "ours_to_transformers": ratio("ours", "transformers"),
        "ours_compiled_to_transformers": ratio("ours_compiled", "transformers"),
        "ours_to_litgpt": ratio("ours", "litgpt"),
        "ours_compiled_to_litgpt": ratio("ours_compiled", "litgpt"),
        "rounds": options.rounds,
    }


def round_of(python: str, program: str, size: str, steps: int) -> float:
    """Median seconds of a step after warm-up, in a process of its own."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [python, "-m", "benchmarks.engine.step_time_rivals", "--steps", str(steps)]
        command += ["--program", program, "--size", size, "--seconds-to", file.name]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        environment["OMP_NUM_THREADS"] = str(os.cpu_count())
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stdout[-1500:]}{done.stderr[-3000:]}")
        return statistics.median(json.loads(Path(file.name).read_text())[WARM_UP:])


if __name__ == "__main__":
    main()
