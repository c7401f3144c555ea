"""Ranks that share rows compute what one rank computes: logits, losses and gradients, for packed documents too.

Each number of ranks is started once, on gloo, and goes through all families; the ranks run ``compare`` of this file.
"""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpt.config import ConfigError
from cpt.data.batch import Batch
from cpt.data.place import Place
from cpt.eval.perplexity import EvalSpec, HeldOut, evaluate
from cpt.model import kernels
from cpt.model.attention import attention_in_use, name_of_shared
from cpt.model.ulysses import _check_model, attend_shared, share_rows
from cpt.plan_parts import heads_rule
from cpt.train.losses import losses_of_logits

ROOT = Path(__file__).resolve().parents[3]
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE | {"model_type": "llama", "num_key_value_heads": 4},
    "llama-one-kv-head": SHAPE | {"model_type": "llama", "num_key_value_heads": 1},
    "llama-two-kv-heads": SHAPE | {"model_type": "llama", "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 64},
    "mixed-windows": SHAPE
    | {
        "model_type": "qwen2",
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "mistral-window": SHAPE | {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 5},
}
DOCUMENTS = [[7, 1, 20, 4], [16, 16, 0, 0], [32, 0, 0, 0]]


def build(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(FAMILIES[family])
    torch.manual_seed(3)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    for weight in model.parameters():  # the usual init is so small that attention hardly matters
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    model = model.to(dtype).eval()
    kernels.prepare_model(model, "sdpa")
    return model


def packed() -> Batch:
    """Three rows of 32 tokens; the first documents of each are of DOCUMENTS' lengths."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 97, (3, 33), generator=generator)
    lengths = [torch.tensor([n for n in row if n]) for row in DOCUMENTS]
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(n)), n) for n in lengths])
    positions = torch.stack([torch.cat([torch.arange(int(k)) for k in n]) for n in lengths])
    labels = ids[:, 1:].clone()
    labels[:, :-1][segments[:, 1:] != segments[:, :-1]] = -100
    return Batch(ids[:, :-1], labels, positions, segments, torch.arange(3))


def loss_and_gradients(model: torch.nn.Module, batch: Batch, counted: int) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = losses_of_logits(kernels.forward_logits(model, batch, "sdpa"), batch.labels_BT).total / counted
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Text:
    """30 held-out tokens: less than a row, and one row of 29 is not to be shared evenly."""

    num_tokens = 30

    def read(self, start: int, stop: int) -> Any:
        return (np.arange(start, stop) * 7) % 97

    def document_starts(self, start: int, stop: int) -> Any:
        return np.array([at for at in (0, 11, 24) if start <= at < stop], dtype=np.int64)


def held_out_loss(model: torch.nn.Module, shared: int) -> float:
    spec = EvalSpec(32, 64, 2, "sdpa", sequence_parallel=shared)
    found = evaluate(model, {"text": HeldOut(Text(), "general", 0.3)}, spec)
    assert found is not None
    text, pieces = found.record.sources["text"], found.pieces["text"]
    assert text.loss is not None
    assert text.tokens == 27  # of 29 predictions, two open another document
    assert pieces.tokens.tolist() == [10, 12, 5]
    assert pieces.nats.sum() == pytest.approx(27 * text.loss, rel=1e-6)
    return text.loss


def compare() -> dict[str, dict[str, float]]:
    """At every rank of a job: how far the shared computation is from that of one rank, by family."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    place = Place(dist.get_rank(), dist.get_world_size(), dist.get_world_size())
    batch, found = packed(), {}
    for family in FAMILIES:
        whole = build(family)
        loss, gradient = loss_and_gradients(whole, batch, batch.num_counted)
        model = build(family)
        said = share_rows(model, "sdpa", place, vocab_size=97, device=torch.device("cpu"))
        assert said == f"rows: shared by {place.world_size} ranks each (Ulysses)"
        part = batch.held_by(place)
        own_loss, own_gradient = loss_and_gradients(model, part, batch.num_counted)
        dist.all_reduce(own_loss)
        dist.all_reduce(own_gradient)
        with torch.no_grad():
            logits = kernels.forward_logits(whole, batch, "sdpa")[:, place.positions(32)]
            apart = (kernels.forward_logits(model, part, "sdpa") - logits).abs().max() / logits.abs().max()
        dist.all_reduce(apart, op=dist.ReduceOp.MAX)
        losses = [held_out_loss(each, shared) for each, shared in ((whole, 1), (model, place.sequence_parallel))]
        found[family] = {
            "held-out": abs(losses[1] / losses[0] - 1),
            "logits": float(apart),
            "loss": abs(float(own_loss / loss) - 1),
            "gradient": float((own_gradient - gradient).norm() / gradient.norm()),
        }
    half = build("llama", torch.bfloat16)
    share_rows(half, "sdpa", place, vocab_size=97, device=torch.device("cpu"))  # raises where bf16 is off
    return found


@cache
def measured(ranks: int) -> dict[str, dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import test_ulysses as t; f = t.compare(); "
    code += "print('FOUND', json.dumps(f), flush=True); from cpt.failures import leave; leave(0)"
    job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            cwd=ROOT,
            env={**os.environ, **job, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
    (line,) = [line for line in outputs[0].splitlines() if line.startswith("FOUND")]
    return dict(json.loads(line.removeprefix("FOUND ")))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_one_rank(family: str, ranks: int) -> None:
    found = measured(ranks)[family]
    assert found["logits"] < 1e-5 and found["loss"] < 1e-6 and found["gradient"] < 1e-5, found
    assert found["held-out"] < 1e-6, found


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shared", "told"),
    [
        (8, 8, 4, None),
        (8, 2, 4, None),  # each key-value head goes to two ranks
        (8, 1, 8, None),
        (6, 6, 4, "must divide the model's 6 attention heads"),
        (12, 6, 4, "must divide the model's 6 key-value heads, or be a multiple of them"),
    ],
)
def test_heads_that_do_not_divide_are_refused(heads: int, kv_heads: int, shared: int, told: str | None) -> None:
    found = heads_rule(heads, kv_heads, shared)
    assert found is None if told is None else told in str(found)


def test_positions_that_depend_on_the_longest_one_are_refused() -> None:
    from transformers import LlamaConfig

    shape = SHAPE | {"num_key_value_heads": 4}
    config = LlamaConfig(**shape, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ConfigError, match="rotary positions \\(dynamic\\) depend on the longest one"):
        _check_model(config, 2)


def test_one_rank_alone_shares_nothing() -> None:
    model = build("llama")
    before = model.config._attn_implementation  # type: ignore[union-attr]
    assert share_rows(model, "sdpa", Place(), vocab_size=97, device=torch.device("cpu")) == ""
    assert model.config._attn_implementation == before  # type: ignore[union-attr]


def test_a_bias_by_position_is_refused() -> None:
    group: Any = None
    with pytest.raises(ConfigError, match="a bias by position"):
        attend_shared(lambda *a, **k: (a[0], None), (group, 2), object(), *torch.zeros(3, 1, 2, 4, 8), position_bias=1)


@pytest.mark.parametrize("inner", ["flash_attention_2", "flash_attention_3", "sdpa", "cpt_varlen"])
def test_ranks_can_share_rows_with_any_attention_function(inner: str) -> None:
    """transformers loads a kernel for a name with the word flash in it, and finds none for ours."""
    from transformers import AttentionInterface

    name = name_of_shared(inner)
    AttentionInterface.register(name, attend_shared)
    model: Any = build("llama")
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name and attention_in_use(model.config) == inner
