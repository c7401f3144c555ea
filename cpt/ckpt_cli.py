"""`cpt ckpt VERB`: look into checkpoints, prove them, and exchange them with Hugging Face and DeepSpeed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from cpt.cli_options import Json, local
from cpt.plan_cli import print_facts

ckpt_app = typer.Typer(help="Checkpoints.", no_args_is_help=True)

Paths = Annotated[list[Path], typer.Argument(metavar="PATH...", help="checkpoint folders, or run folders: all of them")]


@ckpt_app.command()
def inspect(
    paths: Paths,
    params: Annotated[
        bool, typer.Option("--params", help="list every parameter: shape and norms; reads it all")
    ] = False,
    as_json: Json = False,
) -> None:
    """What checkpoints hold, who wrote them and why they are kept: cpt ckpt inspect runs/NAME"""
    from rich.console import Group

    from cpt.ckpt_facts import inspect as look
    from cpt.ckpt_facts import render_inspection

    found = [look(path, params=params) for path in paths]
    print_facts(found, lambda facts: Group(*map(render_inspection, facts)), as_json=as_json)


@ckpt_app.command()
def verify(paths: Paths, as_json: Json = False) -> None:
    """Read checkpoints whole: hashes, every element once, finite values; exit code 2 and what is wrong where one is
    damaged: cpt ckpt verify runs/NAME
    """
    from rich.console import Group

    from cpt.ckpt_facts import render_verification
    from cpt.ckpt_facts import verify as prove

    with _progress() as say:
        found = [prove(path, say) for path in paths]
    print_facts(found, lambda facts: Group(*map(render_verification, facts)), as_json=as_json)
    if not all(facts["good"] for facts in found):
        raise typer.Exit(2)


@ckpt_app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="checkpoint of cpt, Hugging Face or DeepSpeed")],
    out: Annotated[Path, typer.Option(callback=local, help="new folder; appears when it is proved equal")],
    to: Annotated[Literal["cpt", "hf", "deepspeed"], typer.Option(help="deepspeed: its universal format")],
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face folder of the model, where DeepSpeed's holds no config.json")
    ] = None,
    as_json: Json = False,
) -> None:
    """Exchange checkpoints with other programs: cpt ckpt convert trainer/checkpoint-500 --to cpt --out ckpt_cpt"""
    from cpt.ckpt_convert import convert as convert_folder
    from cpt.ckpt_convert import render_conversion

    with _progress() as say:
        facts = convert_folder(source, out, to, model=model, say=say)
    print_facts(facts, render_conversion, as_json=as_json)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A status line on the terminal's error stream; nothing where it is no terminal."""
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:
        yield lambda text: status.update(text)
