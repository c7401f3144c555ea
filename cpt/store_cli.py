"""`cpt data` verbs on finished token stores: how they pack, views of them, what a run makes of them, other formats."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cpt.cli_options import Json, local
from cpt.plan_cli import print_facts
from cpt.problems import ConfigError, Problem

store_app = typer.Typer()  # its verbs are `cpt data` ones, see cpt.data_cli


@store_app.command(rich_help_panel="Token stores")
def pack(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="store or view folders")],
    seq_len: Annotated[
        list[int] | None, typer.Option("--seq-len", help="tokens in a row; repeatable, to compare; default 2048")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the consequences, build no index")] = False,
    pack_dir: Annotated[
        Path | None,
        typer.Option(callback=local, help="for the indexes, as data.pack_dir; default: beside each store"),
    ] = None,
    figure: Annotated[Path | None, typer.Option(callback=local, help="draw the lengths and cuts: an .svg")] = None,
    as_json: Json = False,
) -> None:
    """Show what packing does to documents (fill, cuts, lengths) and build the best_fit index: cpt data pack
    stores/medical --seq-len 2048 --seq-len 8192 --dry-run
    """
    from data_tools.pack_facts import check_figure, pack_facts, render_packing, write_figure

    if figure:
        check_figure(figure)
    facts = pack_facts(stores, seq_len or [2048], build=not dry_run, pack_dir=pack_dir)
    if figure:
        write_figure(figure, facts)
    print_facts(facts, render_packing, as_json=as_json)


@store_app.command(rich_help_panel="Token stores")
def view(
    store: Annotated[Path, typer.Argument(help="store (or view) folder to choose documents from")],
    out: Annotated[Path, typer.Option(callback=local, help="folder of the view; usable wherever a store is")],
    scores: Annotated[Path | None, typer.Option(help="scores.npy of `cpt data score`, lower is better")] = None,
    heldout_scores: Annotated[
        Path | None, typer.Option(help="scores of the held-out split, to choose from it too; default: all of it")
    ] = None,
    keep_best: Annotated[float | None, typer.Option(help="share of the documents, best scores first")] = None,
    keep_tokens: Annotated[float | None, typer.Option(help="tokens of the best documents, e.g. 5e9")] = None,
    quantile: Annotated[str | None, typer.Option(metavar="LO:HI", help="bucket by rank, e.g. 0.1:0.5")] = None,
    max_score: Annotated[float | None, typer.Option(help="highest score to keep")] = None,
    min_length: Annotated[int | None, typer.Option(help="tokens a document must have")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens a document may have")] = None,
    documents: Annotated[Path | None, typer.Option(help="numbers of documents: .npy, or a text of lines")] = None,
    order: Annotated[
        Literal["none", "ascending", "descending"], typer.Option(help="by score: a curriculum, trained in this order")
    ] = "none",
    as_json: Json = False,
) -> None:
    """Choose documents without copying a token, as a quality bucket or a curriculum: cpt data view stores/medical
    --scores scores.npy --keep-best 0.1 --out views/medical_best
    """
    from data_tools import choose_documents as choosing

    choice = choosing.Choice(
        keep_best=keep_best,
        keep_tokens=None if keep_tokens is None else choosing.whole_tokens(keep_tokens),
        quantile=choosing.parse_quantile(quantile) if quantile else None,
        max_score=max_score,
        min_length=min_length,
        max_length=max_length,
        documents=choosing.read_documents(documents) if documents else None,
        order=order,
    )
    facts = choosing.make_view(store, out, choice, scores=scores, heldout_scores=heldout_scores)
    print_facts(facts, choosing.render_view, as_json=as_json)


@store_app.command("preview-mix", rich_help_panel="Mixture")
def preview_mix(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml|RUN_DIR", help="run file, or a run that has begun")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="fields to change, e.g. replay.share_general=0.4")
    ] = None,
    out: Annotated[Path | None, typer.Option(callback=local, help="draw it: this .png, an .svg beside it")] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="give RUN_DIR this mixture from its newest checkpoint on; train nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Shares, epochs and repeats of every source over time, as they will be trained: cpt data preview-mix RUN.yaml
    data.mix.name=temperature data.mix.tau=5 --out mix.png
    """
    from cpt.planner.picture_mix import draw_mix
    from cpt.planner.picture_style import save_figure
    from cpt.planner.preview_mix import render_mix
    from cpt.remix import apply_preview, preview

    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(Problem("--out", str(out), "lies in a folder that is not there", "make the folder first"))
    facts = (apply_preview if apply else preview)(run, overrides or [])
    if out is not None:
        save_figure(draw_mix(facts), out.absolute().with_suffix(""))
    print_facts(facts, render_mix, as_json=as_json)


@store_app.command(rich_help_panel="Other formats")
def export_megatron(
    store: Annotated[Path, typer.Argument(help="a split of a token store, e.g. stores/medical/train")],
    out: Annotated[Path, typer.Option(callback=local, help="prefix; gives PREFIX.bin and PREFIX.idx")],
    as_json: Json = False,
) -> None:
    """Write a split for Megatron's IndexedDataset: cpt data export-megatron stores/web/train --out megatron/web"""
    from data_tools.interop.commands import export_with_progress, render_export

    print_facts(export_with_progress(store, out), render_export, as_json=as_json)


@store_app.command(rich_help_panel="Other formats")
def import_megatron(
    prefix: Annotated[Path, typer.Argument(help="prefix of PREFIX.bin and PREFIX.idx")],
    tokenizer: Annotated[Path, typer.Option(help="the tokenizer that made the file")],
    out: Annotated[Path, typer.Option(callback=local, help="store folder; gets train/ and heldout/")],
    source: Annotated[str, typer.Option(help="name of this corpus in run files and reports")],
    domain: Annotated[str, typer.Option(help="label: 'general' for data to replay, else a domain to learn")],
    heldout_fraction: Annotated[float, typer.Option(help="share held out, chosen by hash of the ids")] = 0.01,
    eos_token: Annotated[str | None, typer.Option(help="end-of-document token, where the tokenizer names none")] = None,
    as_json: Json = False,
) -> None:
    """Make a token store of .bin/.idx files, resumable: cpt data import-megatron megatron/pile --tokenizer TOKENIZER
    --out stores/pile --source pile --domain general
    """
    from data_tools.interop.commands import import_with_progress, render_import
    from data_tools.interop.megatron_import import MegatronRequest

    request = MegatronRequest(prefix, tokenizer, out, source, domain, heldout_fraction, eos_token)
    print_facts(import_with_progress(request), render_import, as_json=as_json)
