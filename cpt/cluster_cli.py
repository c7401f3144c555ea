"""`cpt data` verbs for work in parts: send a verb as many tasks, make one of what they wrote."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cpt.cli_options import Json
from cpt.plan_cli import print_facts

cluster_app = typer.Typer()  # its verbs are `cpt data` ones, see cpt.data_cli


@cluster_app.command(rich_help_panel="Clusters")
def merge(
    out: Annotated[Path, typer.Argument(help="the --out that tasks of one command wrote to")], as_json: Json = False
) -> None:
    """Make one of what the tasks of an array job wrote, after checking all of it: cpt data merge stores/medical"""
    if (out / "stage.json").is_file():
        from data_tools.corpus.stage import finish_stage
        from data_tools.corpus.stage_view import render_summary

        print_facts(finish_stage(out, verify=True), render_summary, as_json=as_json)
        return
    if (out / "dedup.json").is_file():
        raise typer.BadParameter(f"{out} is a deduplication; run the same `cpt data dedup` command without --task")
    from data_tools.commands import merge_and_print

    merge_and_print(out, as_json=as_json)


@cluster_app.command(
    context_settings={"allow_extra_args": True, "allow_interspersed_args": False}, rich_help_panel="Clusters"
)
def submit(
    context: typer.Context,
    executor: Annotated[Literal["local", "slurm", "ray", "kubernetes"], typer.Option(help="where the tasks run")],
    tasks: Annotated[int, typer.Option(help="parts that the work is split into", min=1)],
    workers: Annotated[
        int | None, typer.Option(help="tasks at a time; default: as many as there is room for", min=1)
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="KEY=VALUE",
            help="for slurm any option of sbatch, e.g. partition=cpu; kubernetes: cluster=FILE",
        ),
    ] = None,
    logs: Annotated[Path | None, typer.Option(help="folder of the tasks' logs; default: logs/ beside --out")] = None,
) -> None:
    """Run a verb as many tasks, then merge: cpt data submit --executor slurm --tasks 64 --option partition=cpu --option
    time=04:00:00 tokenize --input 'web/*.jsonl.zst' --out stores/web ...
    """
    from data_tools.corpus.executors import Submission, out_of
    from data_tools.corpus.executors import submit as submit_tasks

    arguments = tuple(context.args)
    _check_splittable(context, arguments)
    out = out_of(arguments)
    submission = Submission(
        arguments=arguments,
        out=out,
        tasks=tasks,
        logs=(logs or out.parent / "logs" / out.name).absolute(),
        workers=workers or -1,
        options=dict(_key_and_value(text) for text in options or []),
    )
    typer.echo(submit_tasks(executor, submission))


def _check_splittable(context: typer.Context, arguments: tuple[str, ...]) -> None:
    """A wrong argument is found here, once, not by each of many tasks."""
    assert context.parent is not None, "submit is a verb of `cpt data`"
    commands: dict[str, Any] = context.parent.command.commands  # type: ignore[attr-defined]
    splittable = sorted(name for name, verb in commands.items() if any(p.name == "task" for p in verb.params))
    if not arguments or arguments[0] not in splittable:
        named = arguments[0] if arguments else "nothing"
        raise typer.BadParameter(f"cannot split {named!r} into tasks; verbs that can be: {', '.join(splittable)}")
    if "--dry-run" in arguments:
        raise typer.BadParameter("a dry run leaves nothing to merge; run it without submit")
    commands[arguments[0]].make_context(arguments[0], list(arguments[1:]), parent=context.parent)


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--option is {text!r}; it must be KEY=VALUE, e.g. partition=cpu")
    return key, value
