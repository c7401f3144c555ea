"""`cpt VERB`: ten lines per verb. A verb's code is imported when it is called, so ``cpt --help`` needs no torch."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from cpt.config import RunConfig

from cpt.ckpt_cli import ckpt_app
from cpt.data_cli import data_app
from cpt.doctor_cli import doctor_app
from cpt.eval_cli import eval_app
from cpt.launch_cli import launch_app
from cpt.plan_cli import plan_app, print_facts

app = typer.Typer(
    help="Continual pre-training: plan the mixture, tokenize, train with replay, evaluate both sides, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="Run files.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(ckpt_app, name="ckpt")
app.add_typer(config_app, name="config")
app.add_typer(plan_app, name="plan")
app.add_typer(eval_app, name="eval")
app.add_typer(launch_app, name="launch")
app.add_typer(doctor_app)

ConfigPath = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="run file, see configs/runs/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="fields to change, e.g. train.peak_lr=1e-3")
]
RunDirs = Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="run folders; several are compared")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Profile = Annotated[
    int, typer.Option("--profile", metavar="STEPS", help="write a trace of so many steps, after 3", min=0, max=20)
]
Supervise = Annotated[
    bool, typer.Option("--supervise", help="start it again from its newest checkpoint whenever it crashes or hangs")
]
MaxRestarts = Annotated[int, typer.Option(help="of --supervise: in a row without a new complete checkpoint", min=0)]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(help="processes on this machine", min=1)] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check stores, mixture and batch, and show the plan; train nothing")
    ] = False,
    profile: Profile = 0,
    supervise: Supervise = False,
    max_restarts: MaxRestarts = 10,
    as_json: Json = False,
) -> None:
    """Train a new run: cpt train configs/runs/cpt_cpu.yaml train.peak_lr=1e-3 --nproc 2"""
    from cpt.config import load_config

    loaded = load_config(config, overrides or [])
    if dry_run:
        from cpt.new_tokens import find_extension
        from cpt.prepare import packing_facts, plan_facts, prepare_job, render_plan

        prepared = prepare_job(loaded, nproc)
        find_extension(loaded)
        print_facts({**plan_facts(prepared), "packing": packing_facts(prepared)}, render_plan, as_json=as_json)
        return
    arguments = [str(config), *(overrides or []), *_profiling(profile)]
    if supervise:
        _supervise(loaded, arguments, ["--resume", str(loaded.run_dir)], nproc, max_restarts)
    _train(arguments, nproc)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run that was stopped or killed")],
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(help="processes on this machine; may differ from before", min=1)] = 1,
    profile: Profile = 0,
    supervise: Supervise = False,
    max_restarts: MaxRestarts = 10,
) -> None:
    """Continue a run from its newest complete checkpoint, with another mixture from there on if one is given: cpt
    resume runs/NAME; cpt resume runs/NAME replay.share_general=0.4 data.stores.law=stores/law
    """
    from cpt.remix import split_overrides
    from cpt.runfolder import check_changeable, finished_words, is_finished, read_run_config

    mixture, others = split_overrides(overrides or [])
    check_changeable(others)
    if mixture:
        _change_mixture(run_dir, mixture, others)
    elif is_finished(run_dir):
        typer.echo(finished_words(run_dir))
        return
    again = ["--resume", str(run_dir), *others]
    arguments = [*again, *_profiling(profile)]
    if supervise:
        _supervise(read_run_config(run_dir, others), arguments, again, nproc, max_restarts)
    _train(arguments, nproc)


@app.command()
def extend(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run that has finished, or was stopped")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[a.b=c]...", help="rate and mixture of the steps to come, e.g. train.peak_lr=1e-4"),
    ] = None,
    tokens: Annotated[str, typer.Option(help="+20M: so many more; 120M: so many in all")] = "",
    nproc: Annotated[int, typer.Option(help="processes on this machine; may differ from before", min=1)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the new curve of the rate; write nothing")] = False,
    no_train: Annotated[bool, typer.Option("--no-train", help="extend it, and leave the rest to cpt resume")] = False,
    as_json: Json = False,
) -> None:
    """Give a run more tokens, show how its learning rate goes on, and train on: cpt extend runs/NAME --tokens +20M

    The rate of every step that was trained stays what it was; train.peak_lr and train.schedule say what follows,
    counted from the extension.
    """
    from cpt import extend as extension
    from cpt.rundir import RunDir

    kept, others = extension.split_extension(overrides or [])
    if dry_run:
        from cpt.remix import newest_step

        facts = extension.extension_facts(run_dir, tokens, kept, newest_step(run_dir))
        print_facts(facts, extension.render_extension, as_json=as_json)
        return
    from cpt.checkpoint.portable import latest_complete

    newest, _ = latest_complete(RunDir(run_dir).checkpoints)
    facts = extension.extend(run_dir, tokens, kept, newest.meta.step if newest else 0)
    print_facts(facts, extension.render_extension, as_json=as_json)
    if not no_train:
        _train(["--resume", str(run_dir), *others], nproc)


def _profiling(steps: int) -> list[str]:
    return ["--profile", str(steps)] if steps else []


def _change_mixture(run_dir: Path, mixture: list[str], others: list[str]) -> None:
    """Once, before any rank starts; nothing is written where the rest of the command line is wrong."""
    from cpt.checkpoint.portable import latest_complete
    from cpt.remix import change_mixture
    from cpt.rundir import RunDir
    from cpt.runfolder import check_changeable, read_run_config

    check_changeable(others)
    read_run_config(run_dir, others)
    newest, _ = latest_complete(RunDir(run_dir).checkpoints)
    facts = change_mixture(run_dir, mixture, newest.meta.step if newest else 0)
    shares = ", ".join(
        f"{name} {facts['shares_before'].get(name, 0):.1%} → {share:.1%}"
        for name, share in facts["shares_after"].items()
    )
    typer.echo(f"mixture changed after step {facts['step']}: {shares} of the tokens to come")


def _supervise(config: "RunConfig", first: list[str], again: list[str], nproc: int, max_restarts: int) -> NoReturn:
    from cpt.prepare import check_world
    from cpt.problems import ConfigError
    from cpt.rundir import RunDir
    from cpt.runfolder import lock_folder
    from launch.local.supervise import Job, supervise

    def fits(world_size: int) -> bool:
        try:
            check_world(config, world_size)
        except ConfigError:
            return False
        return True

    check_world(config, nproc)
    if config.run_dir.is_dir():  # another job's beats, steps and checkpoints would be taken for this one's
        lock_folder(RunDir(config.run_dir)).close()
    job = Job(
        run_dir=config.run_dir,
        arguments=first,
        again=again,
        num_processes=nproc,
        fits=fits,
        hang_seconds=config.guard.hang_seconds,
        max_restarts=max_restarts,
    )
    raise typer.Exit(supervise(job))


def _train(arguments: list[str], nproc: int) -> None:
    if nproc > 1:
        from launch.local.ranks import run_local

        raise typer.Exit(run_local(arguments, num_processes=nproc))
    from cpt.train.main import main as train_main

    raise typer.Exit(train_main(arguments))


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the resolved run file: every default filled in, every override applied."""
    from cpt.config import load_config, to_yaml

    resolved = load_config(config, overrides or [])
    typer.echo(json.dumps(resolved.model_dump(mode="json"), indent=1) if as_json else to_yaml(resolved), nl=as_json)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of run files, for completion and checks in an editor."""
    from cpt.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="RUN_DIR/checkpoints/step_N")],
    out: Annotated[Path, typer.Option(help="new folder for the Hugging Face model")],
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="type of the weights")] = "fp32",
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder and verify its logits: cpt export CHECKPOINT --out hf_dir"""
    from dataclasses import asdict

    from cpt.offline import export as export_folder

    written = export_folder(checkpoint, out, dtype=dtype)
    if as_json:
        typer.echo(json.dumps({**asdict(written), "out": str(written.out)}, indent=1))
    else:
        size = f"{written.parameters:,} parameters, {written.bytes:,} bytes in {len(written.files)} files"
        typer.echo(f"{written.out}: {size}; reloaded, largest logit difference {written.logit_difference:.2g}")


@app.command("extend-model")
def extend_model(
    base: Annotated[Path, typer.Argument(metavar="BASE_HF_DIR", help="folder or hub name of the base model")],
    tokenizer: Annotated[Path, typer.Option(help="output of cpt data extend-tokenizer")],
    out: Annotated[Path, typer.Option(help="new folder for the model with the new rows")],
    initializer: Annotated[
        Literal["mean_of_subtokens", "mean_of_all"], typer.Option("--init", help="how new rows are made")
    ] = "mean_of_subtokens",
    as_json: Json = False,
) -> None:
    """Give a model rows for new tokens, old logits unchanged: cpt extend-model base_hf --tokenizer tok_ext --out new_hf

    A run that starts from base_hf with model.tokenizer=tok_ext does the same by itself.
    """
    from cpt.new_tokens import extend_folder

    facts = extend_folder(base, tokenizer, out, initializer=initializer)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        change = f"old tokens' logits changed by {facts['old_logits_change']:.2g}"
        typer.echo(f"{facts['out']}: {facts['new_tokens']:,} new tokens; {change}\n{facts['vocabulary']}")
        if facts["compared_with"] is None:
            typer.echo(f"warning: no tokenizer lies with {base}: was {tokenizer} extended from its own?")


@app.command()
def report(
    run_dirs: RunDirs,
    out: Annotated[Path | None, typer.Option(help="folder for the report; default: RUN_DIR/report")] = None,
    show: Annotated[bool, typer.Option("--open", help="show the page in the browser")] = False,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page and a Markdown twin: cpt report runs/A runs/B --open"""
    from cpt.report.render import build_report, report_data

    if as_json:
        typer.echo(json.dumps(report_data(run_dirs), indent=1))
        return
    paths = build_report(run_dirs, out)
    typer.echo(f"{paths.html}\n{paths.markdown}")
    if show:
        import webbrowser

        if not webbrowser.open(paths.html.resolve().as_uri()):
            typer.echo(f"no browser was found here; open {paths.html} yourself", err=True)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="folder for everything that is made")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(help="seed of weights and data order", min=0)] = 1234,
    fast: Annotated[
        bool, typer.Option("--fast", help="a smaller model on fewer tokens: under 90 s, rougher figures")
    ] = False,
) -> None:
    """The whole pipeline in minutes on a CPU: see forgetting and its cure on text that Python itself brings along."""
    from cpt.quickstart import quickstart as run_all

    run_all(out, seed=seed, fast=fast)


def main() -> None:
    """Entry point: turns every failure into an exit code and, where a person can fix it, a message without a
    traceback.
    """
    try:
        app()
    except Exception as error:
        from cpt.failures import explain

        code, message = explain(error)
        print(message, file=sys.stderr)
        sys.exit(code)


def console() -> None:
    """What the ``cpt`` command calls: ``main``, then out without the interpreter's shutdown (see ``leave``)."""
    from cpt.failures import leave

    try:
        main()
    except SystemExit as ended:
        leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    leave(0)


if __name__ == "__main__":
    console()
