"""What is done with a checkpoint after training, in a process of its own: evaluate it, look at one document through it,
or export it to Hugging Face format.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from cpt.checkpoint.portable import Checkpoint, CheckpointMeta
from cpt.config import ConfigError, Problem, RunConfig
from cpt.data.batch import collate
from cpt.data.packing import concat_row
from cpt.data.store_selection import Split
from cpt.eval.held_out_files import document_ids, keep_beginnings, keep_evaluation, store_decoder
from cpt.eval.perplexity import EvalSpec, evaluate, held_out
from cpt.eval.records import EvalRecord, read_eval
from cpt.eval.retention import measure_retention
from cpt.eval.token_view import MOST_TOKENS, TokenView, token_losses, token_texts
from cpt.model.build import LoadedModel, load_tensors
from cpt.model.export import ExportReport, ExportSpec, export_checkpoint
from cpt.model.kernels import forward_logits
from cpt.prepare import Prepared, prepare, tokenizer_path
from cpt.run_model import build_from_meta, load_model, needs_of
from cpt.rundir import DataError, RunDir
from cpt.runfolder import check_same_plan, read_run_config
from cpt.train.engine import Topology
from cpt.train.loss_head import attach_loss_head


@dataclass(frozen=True)
class Restored:
    """A checkpoint as a live model, with the run it belongs to."""

    prepared: Prepared
    rundir: RunDir
    meta: CheckpointMeta
    loaded: LoadedModel
    device: torch.device

    @property
    def config(self) -> RunConfig:
        return self.prepared.config


def restore(path: Path, *, exact: bool = False, device: str | None = None) -> Restored:
    """The model of a checkpoint that lies in a run folder, with its weights.

    ``exact``: to compute in fp32 with the plain attention back-end, whatever the run used. ``device``: by default the
    first GPU, where there is one.

    Raises:
        ConfigError: this machine has no such device.
        DataError: an incomplete checkpoint, or one that lies in no run folder.
    """
    checkpoint = Checkpoint.open(path)
    root = path.absolute().parent.parent
    if not RunDir(root).config.is_file():
        raise DataError(f"{path}: lies in no run folder ({root} has no config.yaml); give RUN_DIR/checkpoints/step_N")
    prepared = prepare(
        read_run_config(root, ["model.attention=sdpa", "model.kernels=torch", "train.precision=fp32"] if exact else [])
    )
    check_same_plan(RunDir(root), prepared.plan)
    place = _device(device)
    loaded = build_from_meta(prepared.config, checkpoint.meta, needs_of(prepared), place)
    load_tensors(loaded.model, checkpoint.tensors(), origin=str(path))
    return Restored(prepared, RunDir(root), checkpoint.meta, loaded, place)


def _device(name: str | None) -> torch.device:
    gpus = torch.cuda.device_count()
    known = ["cpu", *(f"cuda:{number}" for number in range(gpus)), *(["cuda"] if gpus else [])]
    if name is None:
        return torch.device(known[-1])
    if name not in known:
        raise ConfigError(Problem("--device", name, "is not on this machine", f"there is {', '.join(known)}"))
    return torch.device(name)


def evaluate_checkpoint(path: Path, *, device: str | None = None) -> EvalRecord:
    """Held-out loss of a checkpoint on every source of its run, in the run's precision; also written to ``evals/``."""
    restored = restore(path, device=device)
    config = restored.config
    spec = EvalSpec(
        seq_len=restored.prepared.plan.seq_len,
        tokens_per_source=config.eval.tokens_per_source,
        micro_batch_size=config.train.micro_batch_size,
        backend=restored.loaded.report.attention,
        device=restored.device,
    )
    stores = restored.prepared.heldout_stores
    sources = {name: held_out(store) for name, store in stores.items()}
    with _as_trained(restored):
        meta, model, vocab_size = restored.meta, restored.loaded.model, restored.prepared.vocab_size
        attach_loss_head(model, spec.backend, vocab_size=vocab_size, device=restored.device)
        found = evaluate(model, sources, spec, step=meta.step, tokens_seen=meta.tokens_seen)
    assert found is not None, "nothing asked this evaluation to stop"
    restored.rundir.evals.mkdir(exist_ok=True)
    keep_evaluation(restored.rundir, found)
    trouble = keep_beginnings(restored.rundir, found, stores, tokenizer_path(config))
    if trouble:
        print(f"WARNING: {trouble}", file=sys.stderr, flush=True)
    return found.record


def _as_trained(restored: Restored) -> Any:
    """Computing in the precision of the run."""
    if restored.config.train.precision == "bf16":
        return torch.autocast(restored.device.type, torch.bfloat16)
    return nullcontext()


def view_document(path: Path, source: str, number: int) -> TokenView:
    """One held-out document through the model that the run began with and through its checkpoint at ``path``.

    Raises:
        ConfigError: no such source or document.
        DataError: as ``restore``; or the run's tokenizer is not the one that made the store.
    """
    restored = restore(path)
    store = _store_with(restored, source, number)
    tokenizer = tokenizer_path(restored.config)
    decode = None if tokenizer is None else store_decoder(tokenizer, store)
    ids = document_ids(store, number, MOST_TOKENS).tolist()
    base = load_model(restored.prepared, Topology(0, 1, restored.device), None)
    seq_len, device = restored.prepared.plan.seq_len, restored.device
    with _as_trained(restored):
        before, after = (
            token_losses(loaded.model, ids, seq_len=seq_len, backend=loaded.report.attention, device=device)
            for loaded in (base, restored.loaded)
        )
    start, stop = store.document_bounds(number, number + 1).tolist()
    return TokenView(source, number, restored.meta.step, stop - start, token_texts(ids, decode), before, after)


def _store_with(restored: Restored, source: str, number: int) -> Split:
    stores = restored.prepared.heldout_stores
    asked, field = f"{source}:{number}", "--document"
    if source not in stores:
        rule, names = "names no source of this run", ", ".join(stores)
        raise ConfigError(Problem(field, asked, rule, f"SOURCE:NUMBER with one of the sources {names}"))
    last = stores[source].num_documents - 1
    if not 0 <= number <= last:
        rule = f"is outside the held-out split of {source}, whose documents are numbered 0 to {last:,}"
        raise ConfigError(Problem(field, asked, rule, "`cpt eval documents` lists those that changed most"))
    return stores[source]


def base_record(path: Path) -> EvalRecord | None:
    """The run's evaluation at step 0, where there is one."""
    file = RunDir(path.absolute().parent.parent).eval_file(0)
    return read_eval(file) if file.is_file() else None


def eval_facts(record: EvalRecord, base: EvalRecord | None) -> dict[str, Any]:
    """An evaluation for --json and the table; ``change`` is the loss against step 0, negative where the model got
    better.
    """
    sources = {}
    for name, source in record.sources.items():
        before = base.sources[name].loss if base and name in base.sources else None
        change = source.loss - before if source.loss is not None and before is not None else None
        shown: dict[str, Any] = {"group": source.group, "loss": source.loss, "bpb": source.bpb, "ppl": source.ppl}
        sources[name] = {**shown, "tokens": source.tokens, "change": change, "stderr": source.stderr}
    facts = {"step": record.step, "tokens_seen": record.tokens_seen, "sources": sources, "errors": list(record.errors)}
    if base is None:
        return facts
    retention = measure_retention([base, record])
    return {**facts, "domain_gain": retention.domain_gain, "general_forgetting": retention.general_forgetting}


def render_evals(evals: Sequence[Mapping[str, Any]]) -> Group:
    """A table per checkpoint, one row per held-out source."""
    return Group(*(_render_eval(facts) for facts in evals))


def _render_eval(facts: Mapping[str, Any]) -> Table:
    parts = {"domain gain": facts.get("domain_gain"), "general forgetting": facts.get("general_forgetting")}
    against = "  ".join(f"{name} {value:+.4f} nats" for name, value in parts.items() if value is not None)
    title, caption = f"held-out, after step {facts['step']:,}", "\n".join([against, *facts["errors"]])
    narrow: Any = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}  # 80 columns hold it
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", **narrow)
    table.add_column("source")
    table.add_column("group")
    for column in ("loss", "±", "change", "bits/byte", "perplexity", "tokens"):
        table.add_column(column, justify="right")
    for name, source in facts["sources"].items():
        numbers = [source["loss"], source["stderr"], source["change"], source["bpb"], source["ppl"]]
        formats = ("{:.4f}", "{:.4f}", "{:+.4f}", "{:.4f}", "{:.2f}")
        shown = [form.format(x) if x is not None else "-" for x, form in zip(numbers, formats, strict=True)]
        table.add_row(name, source["group"], *shown, f"{source['tokens']:,}")
    return table


def export(path: Path, out: Path, *, dtype: Literal["fp32", "bf16"] = "fp32") -> ExportReport:
    """Write a checkpoint as a Hugging Face folder, verified against the live model on a row of held-out text."""
    restored = restore(path, exact=True)  # logits are compared to 1e-5 or so, which bf16 cannot meet
    store = next(iter(restored.prepared.heldout_stores.values()))
    length = min(restored.prepared.plan.seq_len, store.num_tokens - 1, 256)
    row = concat_row(store, 0, length)
    batch = collate([row], [0]).to(restored.device)
    # One document of that row: Hugging Face attends to everything before a token, the live model to its own document.
    first = int((row.segments == row.segments[0]).sum())
    with torch.no_grad():
        logits_BTV = forward_logits(restored.loaded.model.eval(), batch, restored.loaded.report.attention).float()
    spec = ExportSpec(
        out=out, dtype=dtype, tokenizer=tokenizer_path(restored.config), probe=row.input_ids[:first].tolist()
    )
    tensors = ((name, tensor) for name, tensor in Checkpoint.open(path).tensors())
    config: Any = restored.loaded.model.config
    return export_checkpoint(tensors, config, spec, live_logits_TV=logits_BTV[0, :first].cpu())
