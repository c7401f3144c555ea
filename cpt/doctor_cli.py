"""`cpt doctor`: this machine, as a table of pass, warn and fail, each with its fix."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpt.cli_options import Json
from cpt.plan_cli import print_facts

if TYPE_CHECKING:
    from launch.preflight.checks import Check

doctor_app = typer.Typer()  # its verb is one of `cpt`, see cpt.cli
ASKING = "asking torch for its attention back-ends, which takes some seconds ..."


@doctor_app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="also look at what this run needs here")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="fields of the run file to change")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at this machine, and at what a run needs of it: cpt doctor; cpt doctor RUN.yaml

    Exit code 0; 3 where the machine is at fault, 2 where only the run's files are.
    """
    from launch.preflight.checks import render_report
    from launch.preflight.doctor import examine

    report = examine([str(config), *(overrides or [])] if config else [], attention=attention_check)
    print_facts(report.to_json() if as_json else report, render_report, as_json=as_json)
    raise typer.Exit(report.exit_code)


def attention_check(has_gpus: bool) -> "Check":
    """The back-end that ``model.attention=auto`` takes. Of those for GPUs only torch knows; a CPU has one."""
    from launch.preflight.checks import Check

    if not has_gpus:
        return Check("attention", "pass", "auto is sdpa: every other back-end runs on CUDA only")
    typer.echo(ASKING, err=True)
    import torch

    from cpt.model.kernels import resolve_backend

    if not torch.cuda.is_available():
        return Check("attention", "fail", "torch sees no GPU", "compare its CUDA with the driver's; see the row torch")
    choice = resolve_backend("auto", device="cuda", dtype=torch.bfloat16)
    over = f" (passed over {choice.passed_over})" if choice.passed_over else ""
    return Check("attention", "pass", f"auto is {choice.name}{over}")
