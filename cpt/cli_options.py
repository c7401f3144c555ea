"""Options that several `cpt data` verbs share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
TextKey = Annotated[str, typer.Option(help="JSON key or table column that holds the text")]
TxtDocuments = Annotated[
    Literal["file", "blank-line"], typer.Option(help="what one document of a .txt file is: all of it, or a paragraph")
]
Workers = Annotated[int, typer.Option(help="parallel workers; the output does not depend on it", min=1)]


def local(out: Path | None) -> Path | None:
    """For options that name something to write: a URL would quietly become a local folder of that name."""
    if out is not None and out.parts and out.parts[0].endswith(":"):
        raise typer.BadParameter("must be a local path; `cpt data convert` writes to URLs")
    return out
