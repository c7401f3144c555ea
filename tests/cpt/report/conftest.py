"""Run folders for the report's tests, and a browser to read the page in where there is one."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from chromium import Browser, browser_command
from run_stories import Story, write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        return write_run(tmp_path / "runs", Story(**changes))

    return make


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if browser_command() is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found
