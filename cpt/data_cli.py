"""`cpt data VERB`: from raw files to token stores and a checked mixture. A verb's code is imported when it is called."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cpt.plan_cli import print_facts

data_app = typer.Typer(help="Corpora and token stores.", no_args_is_help=True)

TxtDocuments = Literal["file", "blank-line"]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@data_app.command()
def tokenize(
    inputs: Annotated[
        list[str], typer.Option("--input", help="files, globs, a saved dataset folder or hf://name; repeatable")
    ],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, Hugging Face folder or sentencepiece .model")],
    out: Annotated[Path, typer.Option(help="store folder; gets train/ and heldout/")],
    source: Annotated[str, typer.Option(help="name of this corpus in run files and reports")],
    domain: Annotated[
        str, typer.Option(help="label: 'general' for data to replay, anything else is a domain to learn")
    ],
    more_inputs: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE]...", help="more inputs, as a shell expands a glob")
    ] = None,
    heldout_fraction: Annotated[
        float, typer.Option(help="share of documents held out, chosen by document hash")
    ] = 0.01,
    text_key: Annotated[str, typer.Option(help="JSON key or table column that holds the text")] = "text",
    txt_documents: Annotated[TxtDocuments, typer.Option(help="what one document of a .txt file is")] = "file",
    eos_token: Annotated[str | None, typer.Option(help="end-of-document token, where the tokenizer names none")] = None,
    workers: Annotated[int, typer.Option(help="parallel workers; the output does not depend on it", min=1)] = 2,
    as_json: Json = False,
) -> None:
    """Build a token store, resumable: cpt data tokenize --input corpus/*.jsonl.zst --tokenizer TOKENIZER --out
    stores/medical ...
    """
    from data_tools.commands import tokenize_with_progress
    from data_tools.sources import ReadOptions
    from data_tools.store_builder import StoreRequest

    request = StoreRequest(
        inputs=(*inputs, *(more_inputs or [])),
        tokenizer=tokenizer,
        out=out,
        source=source,
        domain=domain,
        heldout_fraction=heldout_fraction,
        eos_token=eos_token,
        read=ReadOptions(text_key=text_key, txt_documents=txt_documents),
        workers=workers,
    )
    tokenize_with_progress(request, as_json=as_json)


@data_app.command()
def inspect(
    store: Annotated[Path, typer.Argument(help="store folder")],
    tokenizer: Annotated[Path | None, typer.Option(help="the store's tokenizer, to show text instead of ids")] = None,
    num_documents: Annotated[int, typer.Option(help="documents to show from each split", min=0)] = 3,
    as_json: Json = False,
) -> None:
    """Show what is in a token store: cpt data inspect stores/medical --tokenizer TOKENIZER"""
    from data_tools.store_view import inspect_store, render_inspection

    facts = inspect_store(store, tokenizer=tokenizer, num_documents=num_documents)
    print_facts(facts, render_inspection, as_json=as_json)
