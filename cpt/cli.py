"""`cpt VERB`: ten lines per verb; a verb's code is imported only when it is called, so ``cpt --help`` needs no torch."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Continual pre-training: plan the mixture, tokenize, train with replay, evaluate both sides, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Corpora and token stores.", no_args_is_help=True)
config_app = typer.Typer(help="Run files.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")

ConfigPath = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="run file, see configs/runs/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="fields to change, e.g. train.peak_lr=1e-3")]
RunDirs = Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="run folders; several are compared")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(help="processes on this machine, started by the deepspeed launcher", min=1)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything and show the plan; train nothing")] = False,
    as_json: Json = False,
) -> None:
    """Train a new run: cpt train configs/runs/cpt_cpu.yaml train.peak_lr=1e-3 --nproc 2"""
    from cpt.config import load_config

    loaded = load_config(config, overrides or [])
    if dry_run:
        from cpt.prepare import plan_facts, prepare, render_plan

        _show(plan_facts(prepare(loaded)), render_plan, as_json=as_json)
        return
    _train([str(config), *(overrides or [])], nproc)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run that was stopped or killed")],
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(help="processes on this machine; may differ from before", min=1)] = 1,
) -> None:
    """Continue a run from its newest complete checkpoint: cpt resume runs/NAME"""
    _train(["--resume", str(run_dir), *(overrides or [])], nproc)


def _train(arguments: list[str], nproc: int) -> None:
    if nproc > 1:
        from launch.local import run_local

        raise typer.Exit(run_local(arguments, num_processes=nproc))
    from cpt.train.main import main as train_main

    raise typer.Exit(train_main(arguments))


def _show(facts: Any, render: Callable[[Any], Any], *, as_json: bool) -> None:
    """Print facts as JSON for programs, or as a table for people."""
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    from rich.console import Console

    Console(soft_wrap=False).print(render(facts))


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
def report(
    run_dirs: RunDirs,
    out: Annotated[Path | None, typer.Option(help="folder for the report; default: RUN_DIR/report")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page and a Markdown twin: cpt report runs/A runs/B"""
    from cpt.report.render import build_report, report_data

    if as_json:
        typer.echo(json.dumps(report_data(run_dirs), indent=1))
        return
    paths = build_report(run_dirs, out)
    typer.echo(f"{paths.html}\n{paths.markdown}")


def main() -> None:
    """Entry point: turns every failure into an exit code and, where a person can fix it, a message without a traceback."""
    try:
        app()
    except Exception as error:
        from cpt.failures import explain

        code, message = explain(error)
        print(message, file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
