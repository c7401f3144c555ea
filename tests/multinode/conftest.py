"""Runs over hosts that are namespaces, and the same run on one host to compare with. `make test-multinode`."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster_of_namespaces import missing, namespaces
from launching import FIELDS, LIMIT, Site

Workshop = Any  # the fixtures of tests/conftest.py


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: starts many processes; left out where time is short")


@pytest.fixture
def site_of(workshop: Workshop) -> Iterator[Callable[[int], Site]]:
    """Call it with a number of hosts. Skips where there can be none."""
    if not os.environ.get("CPT_TEST_MULTINODE"):
        pytest.skip("run by `make test-multinode`, which installs what is needed")
    if why := missing():
        pytest.skip(why)
    with ExitStack() as stack:

        def make(num_hosts: int) -> Site:
            workshop.stores()
            return Site(workshop, stack.enter_context(namespaces(workshop.root / "cluster", num_hosts=num_hosts)))

        yield make


@pytest.fixture(scope="session")
def on_one_host(made_once: Callable[..., Workshop]) -> dict[int, float]:
    """Losses by step of the same run with two ranks on this machine."""

    def make(shop: Workshop) -> None:
        shop.stores()
        process = shop.start("train", shop.run_file("whole", FIELDS), "--nproc", "2")
        out, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, out

    return dict(made_once("multinode", make).losses("whole"))
