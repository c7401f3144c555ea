"""`cpt eval`: checkpoints by their folders, or a verb. A verb's code is imported when it is called."""

import difflib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from cpt.cli_options import Json, local
from cpt.exit_codes import EXIT_GATE
from cpt.plan_cli import print_facts

if TYPE_CHECKING:
    from cpt.eval.suite import Suite
    from cpt.eval_checkpoints import Written


class CheckpointsByDefault(TyperGroup):
    """`cpt eval CHECKPOINT...` is `cpt eval checkpoints CHECKPOINT...`; a mistyped verb is no checkpoint."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] in self.commands or args[0] == "--help":
            return super().parse_args(ctx, args)
        near = difflib.get_close_matches(args[0], self.commands, n=1)
        if near and not Path(args[0]).exists():
            ctx.fail(f"{args[0]!r} is neither a checkpoint folder nor a verb. Did you mean {near[0]!r}?")
        return super().parse_args(ctx, ["checkpoints", *args])


eval_app = typer.Typer(
    cls=CheckpointsByDefault,
    no_args_is_help=True,
    subcommand_metavar="CHECKPOINT... | VERB ...",
    help="""What was learned and what was forgotten, with error bars: cpt eval runs/NAME/checkpoints/step_00000500
    --suite suite.yaml

    Then what it means: cpt eval compare runs/A runs/B --baseline base; what exactly was forgotten: cpt eval items
    runs/A; whether a pipeline may go on: cpt eval gate runs/A --require 'domain_gain >= 0.10'. Every verb takes --json.
    """,
)

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of a run that was evaluated")]
RunDirs = Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="folders of runs that were evaluated")]
SuiteName = Annotated[
    str | None, typer.Option("--suite", metavar="SUITE", help="whose results: its name or YAML; default: the only one")
]
Baseline = Annotated[
    str, typer.Option(metavar="base|RUN_DIR", help="compare with each run's own base, or with another run")
]
Step = Annotated[int | None, typer.Option(help="of the checkpoint; default: the last one that was evaluated", min=0)]
Suites = Annotated[
    list[Path] | None, typer.Option("--suite", metavar="SUITE.yaml", help="benchmarks, see configs/evals/; repeatable")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; default: a GPU where there is one")]
Cache = Annotated[
    Path | None, typer.Option(callback=local, help="results by weights and task; default: ~/.cache/cpt/evals")
]


@eval_app.command()
def checkpoints(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT...", help="RUN_DIR/checkpoints/step_N")],
    suite: Suites = None,
    device: Device = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Held-out losses of checkpoints on every source of their run: cpt eval runs/NAME/checkpoints/step_00000500; with
    --suite their benchmarks: cpt eval runs/NAME/checkpoints/step_00000500 --suite suite.yaml

    The model that a run started from is evaluated on the suite, too, where it has no results yet.
    """
    from cpt.offline import base_record, eval_facts, evaluate_checkpoint, render_evals

    if suite:
        _on_suites(checkpoints, suite, device, cache, as_json=as_json)
        return
    facts = [eval_facts(evaluate_checkpoint(path, device=device), base_record(path)) for path in checkpoints]
    print_facts(facts, render_evals, as_json=as_json)


def _on_suites(
    checkpoints: list[Path], files: list[Path], device: str | None, cache: Path | None, *, as_json: bool
) -> None:
    """Benchmarks of checkpoints, their base's and their held-out losses, each where it is missing."""
    from dataclasses import asdict

    from cpt.eval.suite import load_suite
    from cpt.eval_checkpoints import SuiteRun, evaluate_on_suite, held_out_if_missing, suite_bar
    from cpt.eval_tables import render_suites

    facts: list[Any] = []
    for suite in [load_suite(file) for file in files]:
        for path in checkpoints:
            with suite_bar(path.name, suite) as tell:
                found = evaluate_on_suite(path, SuiteRun(suite, device, cache, tell))
            base = _base_if_missing(path.absolute().parent.parent, suite, device, cache)
            facts += [asdict(each.record) for each in (base, found) if each]
    for path in checkpoints:
        if trouble := held_out_if_missing(path, device=device):
            typer.echo(f"WARNING: {trouble}", err=True)
    print_facts(facts, render_suites, as_json=as_json)


def _base_if_missing(run_dir: Path, suite: "Suite", device: str | None, cache: Path | None) -> "Written | None":
    """The model that a run started from, as step 0; None where it has results, or there is no such model here."""
    from cpt.config import ConfigError
    from cpt.eval.results import record_file
    from cpt.eval_checkpoints import SuiteRun, evaluate_base, suite_bar
    from cpt.rundir import DataError
    from cpt.rundir import RunDir as Paths
    from cpt.runfolder import read_run_config

    folder = Paths(run_dir).evals / suite.name
    if record_file(folder, 0).is_file() or read_run_config(run_dir).model.init_from is None:
        return None
    try:
        with suite_bar("base", suite) as tell:
            return evaluate_base(run_dir, SuiteRun(suite, device, cache, tell))
    except (ConfigError, DataError) as error:
        typer.echo(f"WARNING: the base was not evaluated, so nothing can be compared with it: {error}", err=True)
        return None


@eval_app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="items, .jsonl or .parquet")],
    kind: Annotated[
        Literal["multiple_choice", "cloze", "minimal_pairs", "exact_match", "perplexity"],
        typer.Option(help="how an item is scored"),
    ],
    out: Annotated[Path, typer.Option(callback=local, help="the suite's YAML")] = Path("suite.yaml"),
    group: Annotated[str, typer.Option(help="what it is reported as: general, domain, or another name")] = "general",
    prompt: Annotated[str, typer.Option(help="template over an item's fields, e.g. 'Q: {{question}}'")] = "",
    choices: Annotated[list[str] | None, typer.Option(help="template of a list; or repeated, one for each")] = None,
    answer: Annotated[str, typer.Option(help="template of the answer: its text, or its number from 0")] = "",
    subset_field: Annotated[str | None, typer.Option(help="field by which lost items are grouped")] = None,
    as_json: Json = False,
) -> None:
    """Write a suite for a file of items, and show the first as a model will see it: cpt eval init items.jsonl --kind
    multiple_choice --out suite.yaml

    Templates that are not given are taken from the names of the fields.
    """
    from cpt.eval.suite_draft import Draft, write_draft

    draft = Draft(file, kind, group, prompt, tuple(choices or ()), answer, subset_field)
    first = write_draft(draft, out)
    if as_json:
        typer.echo(json.dumps({"suite": str(out), "first_item": first}, indent=1))
        return
    shown = "\n".join(f"  {name}: {value!r}" for name, value in first.items())
    typer.echo(f"{out}: {kind}, group {group}. The first item:\n{shown}")


@eval_app.command()
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN_DIR|URL", help="run folder, a copy of one, or its URL")],
    suite: Annotated[Path, typer.Option(metavar="SUITE.yaml", help="benchmarks, see configs/evals/")],
    device: Device = None,
    cache: Cache = None,
    once: Annotated[bool, typer.Option("--once", help="what there is now; wait for no more")] = False,
    keep_best: Annotated[
        str, typer.Option(metavar="RULE", help="pin the best against pruning, e.g. general.accuracy or arc_easy.acc")
    ] = "",
    as_json: Json = False,
) -> None:
    """Evaluate every checkpoint beside the training, once, the newest first: cpt eval watch runs/NAME --suite
    suite.yaml

    It ends with the run. Several watchers, on any hosts, share the work.
    """
    from contextlib import redirect_stdout

    from cpt.eval_watching import Watching, outcome_facts, watch_run

    asked = Watching(run, suite, device, cache, once, keep_best)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        facts = outcome_facts(watch_run(asked))
    counts = f"{len(facts['evaluated'])} evaluated by this watcher"
    not_complete = "".join(f"; step {step} is not complete: {why}" for step, why in facts["partial"].items())
    print_facts(facts, lambda _: counts + not_complete, as_json=as_json)


@eval_app.command()
def compare(
    run_dirs: RunDirs,
    baseline: Baseline = "base",
    suite: SuiteName = None,
    step: Step = None,
    as_json: Json = False,
) -> None:
    """Paired differences with intervals, and which are within noise: cpt eval compare runs/A runs/B --baseline base"""
    from cpt.eval.comparing import compare_runs
    from cpt.eval_tables import render_comparison

    found = compare_runs(run_dirs, baseline=baseline, suite=_suite_name(suite), step=step)
    print_facts(found.to_dict(), render_comparison, as_json=as_json)


@eval_app.command()
def gate(
    words: Annotated[
        list[str], typer.Argument(metavar="RUN_DIR", help="the run; more requirements may follow the first one")
    ],
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="'METRIC >= NUMBER'", help="in quotes; metrics may end in .low or .high, of 95%"),
    ] = None,
    baseline: Baseline = "base",
    suite: SuiteName = None,
    step: Step = None,
    as_json: Json = False,
) -> None:
    """Exit code 4 unless every requirement is met: cpt eval gate runs/NAME --require 'domain_gain >= 0.10'
    'general_forgetting.high <= 0.02' 'general.accuracy.change >= -1%'

    A metric that was not measured is not met. A requirement that cannot be understood ends with 2.
    """
    from cpt.eval.comparing import compare_runs
    from cpt.eval.gate import check, is_requirement, parse_requirements
    from cpt.eval.run_metrics import run_metrics
    from cpt.eval_tables import render_gate

    run_dir = _only_run([word for word in words if not is_requirement(word)])
    texts = [*(require or []), *(word for word in words if is_requirement(word))]
    comparison = compare_runs([run_dir], baseline=baseline, suite=_suite_name(suite), step=step)
    measured = run_metrics(run_dir, comparison)
    checks = check(parse_requirements(texts, measured), measured)
    met = all(each.met for each in checks)
    [run] = comparison.runs
    about = {"run": run.run, "baseline": comparison.baseline, "suite": comparison.suite}
    steps = {"suite_step": run.suite_step, "loss_step": run.loss_step}
    judged = {"met": met, "notes": run.notes, "checks": [each.to_dict() for each in checks]}
    print_facts({**about, **steps, **judged}, render_gate, as_json=as_json)
    if not met:
        raise typer.Exit(EXIT_GATE)


@eval_app.command()
def items(
    run_dir: RunDir,
    baseline: Baseline = "base",
    suite: SuiteName = None,
    step: Step = None,
    examples: Annotated[int, typer.Option(help="items shown of each subset that lost some", min=0)] = 3,
    as_json: Json = False,
) -> None:
    """The items that were right before and are wrong now, and back, by task and subset: cpt eval items runs/NAME"""
    from cpt.eval.lost_items import lost_items
    from cpt.eval_tables import render_items

    facts = lost_items(run_dir, baseline=baseline, suite=_suite_name(suite), step=step, examples=examples)
    print_facts(facts, render_items, as_json=as_json)


@eval_app.command()
def documents(run_dir: RunDir, step: Step = None, as_json: Json = False) -> None:
    """The held-out documents that lost and gained most since the base: cpt eval documents runs/NAME"""
    from cpt.eval.document_losses import document_facts, render_documents
    from cpt.rundir import RunDir as Paths

    print_facts(document_facts(Paths(run_dir).evals, step=step), render_documents, as_json=as_json)


@eval_app.command()
def tokens(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="RUN_DIR/checkpoints/step_N")],
    document: Annotated[str, typer.Option(metavar="SOURCE:N", help="as `cpt eval documents` names them")],
    out: Annotated[Path | None, typer.Option(callback=local, help="write one self-contained HTML page")] = None,
    as_json: Json = False,
) -> None:
    """One document token by token, base against checkpoint: cpt eval tokens runs/NAME/checkpoints/step_00000500
    --document web:12 --out tokens.html
    """
    from cpt.eval.token_view import html_page, render_tokens, view_facts
    from cpt.offline import view_document
    from cpt.rundir import write_atomic

    source, number = _source_and_number(document)
    view = view_document(checkpoint, source, number)
    if out is not None:
        write_atomic(out.absolute(), html_page(view))
    print_facts(view_facts(view), lambda _: render_tokens(view), as_json=as_json)


@eval_app.command()
def sequence(run_dirs: RunDirs, as_json: Json = False) -> None:
    """What runs that continued each other learned, retained and forgot, in their order: cpt eval sequence runs/law
    runs/medicine
    """
    from cpt.eval.domain_sequence import read_sequence
    from cpt.eval_tables import render_sequence

    print_facts(read_sequence(run_dirs).to_dict(), render_sequence, as_json=as_json)


def _suite_name(given: str | None) -> str | None:
    """A suite by its name, or by its file."""
    if given is None or not given.endswith((".yaml", ".yml")):
        return given
    from cpt.eval.suite import load_suite

    return load_suite(Path(given)).name


def _only_run(words: list[str]) -> Path:
    from cpt.problems import ConfigError, Problem

    if len(words) != 1:
        fix = "and quote requirements, for a shell takes > and <: --require 'domain_gain >= 0.10'"
        raise ConfigError(Problem("RUN_DIR", " ".join(words) or None, "give the folder of one run", fix))
    return Path(words[0])


def _source_and_number(text: str) -> tuple[str, int]:
    """A source's name may hold colons; a number does not."""
    source, _, number = text.rpartition(":")
    if not source or not number.isdecimal():
        from cpt.problems import ConfigError, Problem

        raise ConfigError(
            Problem("--document", text, "must be SOURCE:NUMBER", "such as web:12; see cpt eval documents")
        )
    return source, int(number)
