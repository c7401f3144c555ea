"""Benchmarks for the checkpoints of a run: a checkpoint, or the model that the run started from, on a suite.

    evals/SUITE/step_00000500.json            the record, written last: what is there was evaluated completely
    evals/SUITE/step_00000500.items.parquet   one row per item
    evals/SUITE/texts.parquet                 what the items ask, once for all steps

Works on the run folder alone, so also on a copy of it without the token stores. A checkpoint becomes a Hugging Face
folder in a scratch place only where something is not in the cache, and torch is imported only then. Refuses a
tokenizer other than that of the run's stores, a suite of the same name and other content, and writes nothing for a
checkpoint that disappeared while it was read.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.checkpoint.marker import META, content_hash, is_state_shard, read_json, read_marker
from cpt.config import RunConfig
from cpt.data.store_selection import open_split
from cpt.eval.cache import default_cache
from cpt.eval.harness import ModelOnDisk, SuiteOutcome, run_suite
from cpt.eval.results import SuiteRecord, record_file
from cpt.eval.suite import Suite
from cpt.eval.suite_files import Evaluated, check_same_suite, keep_outcome
from cpt.prepare import own_tokenizer_path, tokenizer_path
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError, RunDir
from cpt.runfolder import read_run_config
from data_tools.encoders import tokenizer_fingerprint
from launch.local.devices import visible_gpus

Tell = Callable[[str], None]


@dataclass(frozen=True)
class SuiteRun:
    """How a suite is run: where (None: the first GPU, else the CPU), with which cache, and who is told the label of
    each task that has its results.
    """

    suite: Suite
    device: str | None = None
    cache: Path | None = None
    on_entry: Tell = lambda label: None


@dataclass(frozen=True)
class Written:
    """A record that was written, and how many of the suite's entries were scored for it; the others were known."""

    record: SuiteRecord
    path: Path
    scored: int


def evaluate_on_suite(checkpoint: Path, run: SuiteRun) -> Written:
    """Score a checkpoint of a run folder and write the results there.

    Raises:
        ConfigError: the suite, the tokenizer, or a suite of this name with other content.
        DataError: no run folder, an incomplete or vanished checkpoint, items that cannot be used.
        RuntimeError: lm_eval, or a data set, is not here.
    """
    rundir, config = _run_of(checkpoint)
    check_same_suite(rundir.evals / run.suite.name, run.suite, field="name")
    try:
        meta = read_json(checkpoint / META)
        model = _checkpoint_model(checkpoint, config, tokenizer_path(config))
        outcome = _run(model, run)
    except Exception as error:  # whatever reading a vanished file looks like to the library that reads it
        if not checkpoint.is_dir():
            rule = "was removed while it was read, nothing was written"
            raise DataError(f"{checkpoint}: {rule}; to evaluate such ones, pin them or keep more of them") from error
        raise
    return _write(rundir, run.suite, model, outcome, at=(meta["step"], meta["tokens_seen"]))


def evaluate_base(run_dir: Path, run: SuiteRun) -> Written:
    """Score the model that a run started from, as step 0.

    Raises:
        ConfigError: as of a checkpoint; also where the run started from fresh weights, or its base is not here.
        DataError, RuntimeError: as of a checkpoint.
    """
    rundir, config = RunDir(run_dir), read_run_config(run_dir)
    check_same_suite(rundir.evals / run.suite.name, run.suite, field="name")
    model = _base_model(config)
    return _write(rundir, run.suite, model, _run(model, run), at=(0, 0))


def _run(model: ModelOnDisk, run: SuiteRun) -> SuiteOutcome:
    cache = run.cache or default_cache()
    return run_suite(model, run.suite, device=_device(run.device), cache=cache, on_entry=run.on_entry)


def _write(rundir: RunDir, suite: Suite, model: ModelOnDisk, outcome: SuiteOutcome, *, at: tuple[int, int]) -> Written:
    """``at``: step, tokens seen."""
    folder = rundir.evals / suite.name
    about = Evaluated(*at, weights_hash=model.weights_hash, tokenizer=model.tokenizer, dtype=model.dtype)
    record = keep_outcome(folder, outcome, suite, about, copying=outcome.copying)
    return Written(record, record_file(folder, record.step), outcome.scored)


def held_out_if_missing(checkpoint: Path, *, device: str | None = None) -> str:
    """Evaluate a checkpoint on its run's held-out text where that was not done; returns why it cannot be done here,
    such as on a copy without the stores, or "".
    """
    rundir, _ = _run_of(checkpoint)
    if rundir.eval_file(read_json(checkpoint / META)["step"]).is_file():
        return ""
    from cpt.offline import evaluate_checkpoint

    try:
        evaluate_checkpoint(checkpoint, device=device)
    except (ConfigError, DataError) as error:
        return f"no held-out losses of {checkpoint.name}: {error}"
    return ""


def _device(name: str | None) -> str:
    """Raises ConfigError: no such device on this machine; torch would say so minutes later, in a process of its own."""
    gpus = [f"cuda:{number}" for number in range(len(visible_gpus()))]
    known = ["cpu", *gpus, *(["cuda"] if gpus else [])]
    if name is not None and name not in known:
        raise ConfigError(Problem("--device", name, "is not on this machine", f"there is {', '.join(known)}"))
    return name or known[-1]


@contextlib.contextmanager
def suite_bar(title: str, suite: Suite) -> Iterator[Tell]:
    """A bar on standard error that counts a suite's tasks; gives what ``on_entry`` takes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task(title, total=len(list(suite.tasks())))
        yield lambda label: bar.update(shown, advance=1, description=f"{title}: {label} done")


# --- models -----------------------------------------------------------------------------------------------------------


def _run_of(checkpoint: Path) -> tuple[RunDir, RunConfig]:
    root = checkpoint.absolute().parent.parent
    if not RunDir(root).config.is_file():
        raise DataError(
            f"{checkpoint}: lies in no run folder ({root} has no config.yaml); give RUN_DIR/checkpoints/step_N"
        )
    return RunDir(root), read_run_config(root)


def _checkpoint_model(checkpoint: Path, config: RunConfig, tokenizer: Path | None) -> ModelOnDisk:
    known = _known_tokenizer(tokenizer, config)
    return ModelOnDisk(
        weights_hash=checkpoint_hash(checkpoint),
        tokenizer=tokenizer_fingerprint(known),
        dtype=config.train.precision,
        place=lambda scratch: _export(checkpoint, known, config, scratch),
        tokenizer_settings=_settings_of(known),
    )


def _base_model(config: RunConfig) -> ModelOnDisk:
    origin = config.model.init_from
    if origin is None:
        rule = "the run started from fresh weights: there is no base model to compare with"
        raise ConfigError(Problem("model.init_from", None, rule, "compare with its first checkpoint"))
    folder = Path(origin) if Path(origin).is_dir() else downloaded(origin)
    tokenizer = own_tokenizer_path(str(folder)) or tokenizer_path(config)
    if (folder / META).is_file():
        return _checkpoint_model(folder, config, tokenizer)
    known = _known_tokenizer(tokenizer, None)
    return ModelOnDisk(
        weights_hash=folder_hash(folder),
        tokenizer=tokenizer_fingerprint(known),
        dtype=config.train.precision,
        place=lambda scratch: folder if known == folder else _with_tokenizer(folder, known, scratch),
        tokenizer_settings=_settings_of(known),
    )


def downloaded(name: str) -> Path:
    """Where a model of the Hugging Face hub lies on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        rule = "is neither a folder here nor a model that was downloaded on this machine"
        fix = f"copy it here, or fetch it where there is a network: hf download {name}"
        raise ConfigError(Problem("model.init_from", name, rule, fix)) from None


def _known_tokenizer(tokenizer: Path | None, config: RunConfig | None) -> Path:
    """The tokenizer, if there is one and, where the run's stores are here, they were made with it."""
    if tokenizer is None or not tokenizer.exists():
        rule = "is not known here" if tokenizer is None else "does not exist here"
        fix = "benchmarks are text: put the model's tokenizer there, or name it in the run folder's config.yaml"
        raise ConfigError(Problem("model.tokenizer", None if tokenizer is None else str(tokenizer), rule, fix))
    wanted = tokenizer_fingerprint(tokenizer)
    for name, folder in (config.data.stores if config else {}).items():
        try:
            made_with = open_split(folder / "train").manifest.tokenizer
        except DataError:  # not here, or not readable: that is for the run to say
            continue
        if made_with.fingerprint != wanted:
            rule = f"is another tokenizer than store {name} was made with ({made_with.name})"
            raise ConfigError(Problem("model.tokenizer", str(tokenizer), rule, "give the stores' tokenizer"))
    return tokenizer


def _settings_of(tokenizer: Path) -> str:
    """Hash of the files that name its special tokens, of which the fingerprint knows nothing: one of them stands before
    a text without a context.
    """
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return _hash({name: content_hash(tokenizer / name) for name in names if (tokenizer / name).is_file()})


def checkpoint_hash(checkpoint: Path) -> str:
    """32 hex digits of the weights and the model's config, from what the marker promises; no tensor is read.

    Raises:
        DataError: the checkpoint is incomplete.
    """
    files = read_marker(checkpoint)
    shards = {name: facts.xxh3_128 for name, facts in files.items() if name != META and not is_state_shard(name)}
    meta = read_json(checkpoint / META)
    return _hash([shards, meta.get("model_config"), meta.get("parameter_shapes")])


def folder_hash(folder: Path) -> str:
    """32 hex digits of a Hugging Face folder's weights and config, by content.

    Raises:
        DataError: it holds no weights as safetensors.
    """
    shards = sorted(folder.glob("*.safetensors"))
    if not shards or not (folder / "config.json").is_file():
        raise DataError(f"{folder}: holds no config.json with .safetensors; pickled weights are not read, convert them")
    return _hash([{path.name: content_hash(path) for path in shards}, read_json(folder / "config.json")])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _export(checkpoint: Path, tokenizer: Path, config: RunConfig, scratch: Path) -> Path:
    """A Hugging Face folder of a checkpoint, in the dtype that it computed in; no stores are needed."""
    from transformers import AutoConfig

    from cpt.checkpoint.portable import Checkpoint
    from cpt.model.export import ExportSpec, export_checkpoint

    opened = Checkpoint.open(checkpoint)
    spec = ExportSpec(out=scratch / "model", dtype=config.train.precision, tokenizer=tokenizer)
    export_checkpoint(opened.tensors(), AutoConfig.for_model(**opened.meta.model_config), spec)
    return spec.out


def _with_tokenizer(folder: Path, tokenizer: Path, scratch: Path) -> Path:
    """A folder with links to a model's files and a tokenizer that lies elsewhere. What the model's folder has of a
    tokenizer is left out: it would be written over, through the link.
    """
    from cpt.model.export import TOKENIZER_FILES, write_tokenizer

    made = scratch / "model"
    made.mkdir()
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.json")):
        if path.name not in TOKENIZER_FILES:
            (made / path.name).symlink_to(path.absolute())
    write_tokenizer(tokenizer, made)
    return made
