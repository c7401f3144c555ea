"""A URL where a local path is meant is refused by every verb that writes, before anything is made."""

from pathlib import Path
from typing import Any

import pytest
import typer

from cpt.data_cli import data_app

URL = "s3://bucket/x"
LOCAL = {
    (name, option)
    for name, verb in typer.main.get_group(data_app).commands.items()
    for option in (parameter.opts[0] for parameter in verb.params if parameter.name in ("out", "pack_dir", "html"))
    if option.startswith("-")
}


def required(name: str, but: str) -> list[str]:
    command: Any = typer.main.get_group(data_app).commands[name]
    words: list[str] = []
    for parameter in command.params:
        if parameter.required and but not in parameter.opts:
            words += ["x"] if parameter.param_type_name == "argument" else [parameter.opts[0], "x"]
    return words


@pytest.mark.parametrize(("name", "option"), sorted(LOCAL - {("convert", "--out")}))
def test_a_url_to_write_to_is_refused(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = workshop.cpt("data", name, *required(name, option), option, URL)
    assert done.code == 2 and "must be a local path" in " ".join(done.text.replace("│", " ").split()), done.text
    assert not list(tmp_path.iterdir())
