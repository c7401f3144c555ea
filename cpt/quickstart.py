"""The whole pipeline on text that every Python installation holds: corpora, tokenizer, stores, a base model, pilots, a
recommended share of replay, continuations, a report.

A small base is trained on general English prose. Pilots, shorter runs at a few shares of general data, tell how much of
it a continuation on Python code needs so that the base forgets no more than a given bound; the base is then continued
at an equal token budget with that share, with none, with 5% and with 50%, and a new model is trained on the code alone.
Every stage leaves files; a stage whose files are complete is skipped, so a second call is instant and a killed one goes
on where it was. Trains through the same run files and the same command as any other run.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cpt.checkpoint.marker import COMPLETE
from cpt.exit_codes import EXIT_STOPPED
from cpt.planner.pilot_runs import run_pilots
from cpt.planner.pilots import load_pilots
from cpt.planner.wording import headline
from cpt.quickstart_crew import Training, end_stopped, in_fork, launcher, train_all
from cpt.quickstart_runs import (
    COMPARED,
    FAST,
    FULL,
    VOCAB_SIZE,
    Quickstart,
    check_settings,
    num_steps,
    pilot_settings,
    run_settings,
)
from cpt.recommendation import read_recommendation, write_recommendation
from cpt.report.render import build_report
from cpt.rundir import write_atomic
from data_tools.embedded import write_embedded_corpus
from data_tools.sources import ReadOptions, read_texts, resolve_inputs
from data_tools.store_builder import StoreRequest, build_store
from data_tools.train_tokenizer import train_bpe


def quickstart(out: Path, *, seed: int = 1234, fast: bool = False) -> Path:
    """Run every stage that is not done yet; returns the report's HTML page."""
    job = Quickstart(out.absolute(), seed, FAST if fast else FULL)
    job.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    bound = f"a general loss at most {job.scale.tolerance:.0%} above the base's"
    stages: list[tuple[str, Callable[[Quickstart], None]]] = [
        ("corpora: English prose and Python code from this installation", _corpora),
        (f"tokenizer: byte-level BPE, {VOCAB_SIZE} tokens, from the general text alone", _tokenizer),
        ("token stores", _stores),
        ("base model on the general corpus; beside it a new model on the domain alone", _new_models),
        ("base model: exported to Hugging Face format", _export_base),
        ("pilots: short runs at a few shares of general data", _pilots),
        (f"recommended share of general data, for {bound}", partial(_recommend, console=console)),
        ("continued: with the recommended share, 5%, 50% and no general data", _continuations),
    ]
    for number, (title, stage) in enumerate(stages, start=1):
        console.print(f"[bold]{number}/{len(stages) + 1}  {title}[/]")
        started = time.monotonic()
        stage(job)
        console.print(f"      {time.monotonic() - started:.1f} s", style="dim")
    console.print(f"[bold]{len(stages) + 1}/{len(stages) + 1}  report[/]")
    paths = build_report([job.rundir(name).root for name in COMPARED], job.out / "report")
    console.print(f"\nThe report: {paths.html}\n  and as text: {paths.markdown}")
    return paths.html


def _corpora(job: Quickstart) -> None:
    done = job.out / "corpora" / "DONE"
    if not done.exists():
        in_fork(partial(_write_corpora, job.out / "corpora", done))
    print("      " + done.read_text().strip().replace("\n", ", "), flush=True)


def _write_corpora(folder: Path, done: Path) -> None:
    corpus = write_embedded_corpus(folder)
    write_atomic(done, f"general {corpus.general_bytes} bytes\ndomain {corpus.domain_bytes} bytes\n")


def _tokenizer(job: Quickstart) -> None:
    if not (job.tokenizer / "tokenizer.json").exists():
        in_fork(partial(_train_tokenizer, job))


def _train_tokenizer(job: Quickstart) -> None:
    (corpus,) = resolve_inputs([str(job.out / "corpora" / "general.jsonl.zst")])
    train_bpe(read_texts(corpus, ReadOptions()), vocab_size=VOCAB_SIZE, out=job.tokenizer)


def _stores(job: Quickstart) -> None:
    manifests = [store / split / "manifest.json" for store in job.stores.values() for split in ("train", "heldout")]
    if not all(manifest.exists() for manifest in manifests):
        in_fork(partial(_build_stores, job))


def _build_stores(job: Quickstart) -> None:
    for name, file, domain in (("prose", "general", "general"), ("code", "domain", "code")):
        request = StoreRequest(
            inputs=(str(job.out / "corpora" / f"{file}.jsonl.zst"),),
            tokenizer=job.tokenizer,
            out=job.stores[name],
            source=name,
            domain=domain,
            heldout_fraction=0.03,  # of a few megabytes: enough to measure a hundredth of a nat
        )
        for split, result in build_store(request).splits.items():
            print(f"      {name}/{split}: {result.documents:,} documents, {result.tokens:,} tokens", flush=True)


def _new_models(job: Quickstart) -> None:
    _train(job, ("base", "from_scratch"))


def _export_base(job: Quickstart) -> None:
    if not job.base.exists():
        in_fork(partial(_write_base, job))


def _write_base(job: Quickstart) -> None:
    from cpt.offline import export  # torch; only here, so that a second call is instant

    steps = sorted(job.rundir("base").checkpoints.glob("step_*"))
    export(steps[-1], job.base)


def _pilots(job: Quickstart) -> None:
    """Skipped once there is a recommendation: it is what pilots are for."""
    if job.plan.exists():
        return
    _write_yaml(job.run_file("no_replay"), run_settings(job, "no_replay"))
    _write_yaml(job.run_file("pilots"), pilot_settings(job))
    grid = load_pilots(job.run_file("pilots"))
    code = run_pilots(grid, console=Console(highlight=False, soft_wrap=True), launch=launcher())
    if code == EXIT_STOPPED:
        end_stopped()
    if code:
        raise RuntimeError("not all pilots could be trained; their messages stand above. Run the same command again")


def _recommend(job: Quickstart, *, console: Console) -> None:
    if not job.plan.exists():
        in_fork(partial(_write_recommendation, job))
    found = read_recommendation(job.plan)
    last = found.promise[-1]
    predicted = {"loss_general": last.loss_general, "loss_domain": last.loss_domain}
    facts = {"share_general": found.share_general, "interval": found.interval, "predicted": predicted}
    console.print(f"      [bold]{headline(facts)}[/]")
    console.print(f"      {job.plan}, and as a figure {job.plan.with_suffix('.png')}", style="dim")


def _write_recommendation(job: Quickstart) -> None:
    """The figure first: plan.json says that the stage is done."""
    from cpt.planner.answers import Ask, recommend_facts
    from cpt.planner.observations import read_observations
    from cpt.planner.pictures import draw_recommend, save_figure
    from cpt.planner.pledge import recommendation_of

    observations = read_observations(job.out / "pilots" / "observations.csv")
    asked = Ask(tokens=job.scale.continued_tokens, tolerance=job.scale.tolerance)
    facts = recommend_facts(observations, asked)
    save_figure(draw_recommend(facts), job.plan.with_suffix(""))
    write_recommendation(job.plan, recommendation_of(observations, facts))


def _continuations(job: Quickstart) -> None:
    _train(job, [name for name in COMPARED if name != "from_scratch"])


def _train(job: Quickstart, names: Sequence[str]) -> None:
    """A finished run is skipped, a stopped one resumed, one of other settings refused."""
    for name in names:
        check_settings(job, name)
    train_all([_training(job, name) for name in names if not _is_finished(job, name)])


def _training(job: Quickstart, name: str) -> Training:
    rundir = job.rundir(name)
    if rundir.config.exists():
        arguments = ["--resume", str(rundir.root)]
    else:
        _write_yaml(job.run_file(name), run_settings(job, name))
        arguments = [str(job.run_file(name))]
    return Training(rundir, tuple(arguments), num_steps(job, name), job.log(name))


def _is_finished(job: Quickstart, name: str) -> bool:
    return (job.rundir(name).checkpoint(num_steps(job, name)) / COMPLETE).is_file()


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, yaml.safe_dump(content, sort_keys=False))
