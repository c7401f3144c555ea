"""Tokens per second and utilisation on one GPU, ours against three trainers on the same card in the same call.

    python -m venv rivals && rivals/bin/pip install torch litgpt torchtitan transformers accelerate
    python -m benchmarks.gpu.throughput --peer-python rivals/bin/python
                                                  writes benchmarks/results/gpu_throughput.json

Llamas of the Llama 3.2 shapes (1B: 16 layers of 2048; 3B: 28 of 3072; vocabulary 128,256, tied), bf16 compute with
fp32 masters, AdamW, clipping, rows of 4096 random tokens. `ours` trains as `cpt train` does, once on whole rows as the
rivals do and once on packed documents; ours and litgpt also have a compiled form. Every program tries micro-batches of
8, 4, 2 and 1 rows and keeps its best: memory that a trainer saves is speed. The last rows show 32k and 128k tokens,
ours alone. Utilisation counts the model's own FLOPs (see cpt/model/size.py) against the dense bf16 peak of the card.
Bars: >= 1.3 of transformers.Trainer, >= 1.05 of the best of the others, >= 55% utilisation at 1B.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 128_256
# name -> width, layers, heads, key-value heads, MLP width, litgpt's and torchtitan's name
MODELS = {"1B": (2048, 16, 32, 8, 8192, "Llama-3.2-1B", "1B"), "3B": (3072, 28, 24, 8, 8192, "Llama-3.2-3B", "3B")}
SEQ_LEN, STEPS, WARM_UP = 4096, 16, 6
MICRO_BATCHES = (8, 4, 2, 1)
LONG_ROWS = (32_768, 131_072)


def llama(model: str, seq_len: int) -> dict[str, Any]:
    width, layers, heads, kv_heads, mlp, _, _ = MODELS[model]
    return {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": seq_len,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    }


def noise(rows: int, seq_len: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.random.default_rng(0).integers(1, VOCAB, size=(rows, seq_len), dtype=np.int64)


class Clock:
    """Seconds per step: from the fetch of a step's rows to the next, the device having caught up at both ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self) -> None:
        import torch

        torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times)]


def ours(
    model: str, micro: int, *, seq_len: int = SEQ_LEN, packed: bool = False, compiled: bool = False
) -> list[float]:
    from benchmarks.engine.ranks import read_lines, write_run
    from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split
    from cpt.train.main import main as train

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw = np.random.default_rng(1)
        for split, number in (("train", STEPS * micro + 2), ("heldout", 1)):
            lengths = draw.integers(100, 1500, size=4 * number) if packed else [seq_len] * number
            documents = [np.append(noise(1, int(length) - 1)[0], 0).tolist() for length in lengths]
            label = StoreLabel("noise", "general", split, VOCAB, 0, TokenizerFacts("none", "0" * 64, "none"))
            write_split(folder / "noise" / split, label, [documents])
        fields: dict[str, Any] = {
            "model__fresh": {"model_type": "llama", **llama(model, seq_len)},
            "data__seq_len": seq_len,
            "data__max_epochs": 1e6,
            "replay__share_general": 1.0,
            "train__tokens": STEPS * micro * seq_len,
            "train__global_batch_tokens": micro * seq_len,
            "train__micro_batch_size": micro,
            "train__peak_lr": 1e-4,
            "train__precision": "bf16",
            "train__compile": compiled,
            "train__activation_checkpointing": "none" if seq_len == SEQ_LEN else "full",
            "eval__tokens_per_source": 4096,
        }
        run_file = write_run(folder / "ours.yaml", {"noise": str(folder / "noise")}, steps=STEPS, **fields)
        if code := train([str(run_file)]):
            raise RuntimeError(f"exit code {code}")
        return [line["step_seconds"] for line in read_lines(folder / "ours" / "metrics.jsonl")]


def transformers_trainer(model: str, micro: int) -> list[float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    clock, rows = Clock(), noise(STEPS * micro, SEQ_LEN)

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            if index % micro == 0:
                clock.tick()
            row = torch.from_numpy(rows[index])
            return {"input_ids": row, "labels": row}

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=micro,
            learning_rate=1e-4,
            max_grad_norm=1.0,
            bf16=True,
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to=[],
            logging_steps=10,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        network = LlamaForCausalLM(LlamaConfig(use_cache=False, **llama(model, SEQ_LEN)))
        Trainer(model=network, args=settings, train_dataset=Rows()).train()
    return clock.seconds()


def litgpt_pretrain(model: str, micro: int) -> list[float]:
    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule
    from litgpt.pretrain import setup

    clock, rows = Clock(), noise(STEPS * micro, SEQ_LEN + 1)

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> Any:
            if index % micro == 0:
                clock.tick()
            return torch.from_numpy(rows[index])

    class Noise(DataModule):  # type: ignore[misc]
        def connect(self, **settings: Any) -> None:
            pass

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Rows(), batch_size=micro)

        val_dataloader = train_dataloader

    train = TrainArgs(
        save_interval=None,
        global_batch_size=micro,
        micro_batch_size=micro,
        max_tokens=STEPS * micro * SEQ_LEN,
        max_norm=1.0,
        lr_warmup_steps=2,
        max_seq_length=SEQ_LEN,
        tie_embeddings=True,
    )
    name = MODELS[model][5]
    sys.argv = ["litgpt", name]  # it reads the command line again to save it beside the weights
    with tempfile.TemporaryDirectory() as folder:
        setup(
            name,
            model_config=Config.from_name(name, block_size=SEQ_LEN),
            out_dir=Path(folder),
            precision="bf16-mixed",
            data=Noise(),
            train=train,
            eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
            logger_name="csv",
            devices=1,
        )
    return clock.seconds()[2:]  # two batches are the sanity check of its validation


def torchtitan(model: str, micro: int, *, compiled: bool = True) -> list[float]:
    import torch
    from torchtitan.components.dataloader import ParallelAwareDataloader
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import CompileConfig, TrainingConfig
    from torchtitan.models.common.config_utils import decoder_vocab_size
    from torchtitan.models.llama3 import model_registry
    from torchtitan.trainer import Trainer

    clock, rows = Clock(), noise((STEPS + 2) * micro, SEQ_LEN + 1)

    class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            for index, row in enumerate(rows):
                if index % micro == 0:
                    clock.tick()
                ids = torch.from_numpy(row)
                yield {"input": ids[:-1], "positions": torch.arange(SEQ_LEN)}, ids[1:]

    class Noise(ParallelAwareDataloader):  # type: ignore[misc]
        def __init__(self, config: Any, *, local_batch_size: int, **settings: Any) -> None:
            super().__init__(Rows(), dp_rank=0, dp_world_size=1, batch_size=local_batch_size)

    class NoTokenizer(BaseTokenizer):  # type: ignore[misc]
        def __init__(self, config: Any, **settings: Any) -> None:
            super().__init__()

        def encode(self, *args: Any, **settings: Any) -> list[int]:
            return []

        def decode(self, *args: Any, **settings: Any) -> str:
            return ""

        def get_vocab_size(self) -> int:
            return VOCAB

    spec = model_registry(MODELS[model][6], attn_backend="varlen")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29507"}
    os.environ.update(alone)
    with tempfile.TemporaryDirectory() as folder:
        config = Trainer.Config(
            dump_folder=folder,
            loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))),
            model_spec=spec,
            tokenizer=NoTokenizer.Config(),
            optimizer=default_adamw(lr=1e-4),
            training=TrainingConfig(local_batch_size=micro, seq_len=SEQ_LEN, steps=STEPS),
            dataloader=Noise.Config(),
            compile=CompileConfig(enable=compiled),
        )
        trainer = config.build()
        trainer.train()
        trainer.close()
    return clock.seconds()


PROGRAMS: dict[str, Any] = {
    "ours": ours,
    "ours, compiled": lambda model, micro: ours(model, micro, compiled=True),
    "ours, packed": lambda model, micro: ours(model, micro, packed=True),
    "transformers": transformers_trainer,
    "litgpt": litgpt_pretrain,
    "torchtitan": torchtitan,
    **{f"ours, rows of {n}": (lambda model, micro, n=n: ours(model, micro, seq_len=n)) for n in LONG_ROWS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="Python of the environment that holds the rivals")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--one", nargs=4, metavar=("PROGRAM", "MODEL", "MICRO", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        program, model, micro, file = options.one
        seconds = PROGRAMS[program](model, int(micro))
        import torch

        memory = torch.cuda.max_memory_allocated()
        Path(file).write_text(json.dumps({"seconds": seconds[WARM_UP:], "memory_bytes": memory}))
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU here: this benchmark needs one")
    from benchmarks.engine.result import write_result

    rows = {
        model: {name: best(name, model, options.peer_python) for name in options.programs} for model in options.models
    }
    write_result("gpu_throughput.json", {"bars": {"transformers": 1.3, "others": 1.05, "mfu_1B": 0.55}, "models": rows})


def best(program: str, model: str, peer_python: Path | None) -> dict[str, Any]:
    """The fastest micro-batch; what did not fit or run is named with its last line."""
    mine = program.startswith("ours")
    if not mine and peer_python is None:
        return {"skipped": "needs --peer-python"}
    seq_len = int(program.rsplit(" ", 1)[-1]) if "rows of" in program else SEQ_LEN
    found, failed = [], {}
    for micro in MICRO_BATCHES if seq_len == SEQ_LEN else (1,):
        try:
            one = measure(sys.executable if mine else str(peer_python), program, model, micro)
        except RuntimeError as error:
            failed[str(micro)] = str(error)
            continue
        found.append({"micro_batch": micro, **one, **rates(model, micro, seq_len, one["step_seconds"])})
        print(program, model, found[-1], flush=True)
        if len(found) > 1 and found[-1]["tokens_per_second"] < found[-2]["tokens_per_second"]:
            break
    fastest = max(found, key=lambda row: row["tokens_per_second"], default={})
    return {**fastest, "failed": failed}


def rates(model: str, micro: int, seq_len: int, seconds: float) -> dict[str, float]:
    import torch

    from cpt.model.size import flops_per_token
    from cpt.train.metrics import device_peak_flops

    flops = flops_per_token({"model_type": "llama", **llama(model, seq_len)}, seq_len)
    peak = device_peak_flops(torch.device("cuda"))
    tokens = micro * seq_len / seconds
    return {"tokens_per_second": round(tokens), "mfu": round(tokens * (flops or 0) / peak, 4) if peak else 0.0}


def measure(python: str, program: str, model: str, micro: int) -> dict[str, float]:
    """One program with one micro-batch in a process of its own. Raises RuntimeError with the end of its output."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [python, "-m", "benchmarks.gpu.throughput", "--one", program, model, str(micro), file.name]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-400:])
        found = json.loads(Path(file.name).read_text())
    return {"step_seconds": statistics.median(found["seconds"]), "memory_gib": round(found["memory_bytes"] / 2**30, 2)}


if __name__ == "__main__":
    main()
