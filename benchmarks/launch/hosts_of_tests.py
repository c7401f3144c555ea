"""The hosts and the workshop of the tests, for benchmarks: nothing of them is part of the product."""

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/multinode"))
from cluster_of_namespaces import missing, namespaces  # noqa: E402
from launching import FIELDS, LIMIT, Site  # noqa: E402


def workshop(folder: Path) -> Any:
    """tests/conftest.py's, by its path: `conftest` is the name of many. With its stores."""
    spec = importlib.util.spec_from_file_location("tests_conftest", ROOT / "tests/conftest.py")
    assert spec and spec.loader, "the file is there"
    module = sys.modules["tests_conftest"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder.mkdir(parents=True, exist_ok=True)
    shop = module.Workshop(folder)
    shop.stores()
    return shop


@contextmanager
def site_of(folder: Path, *, num_hosts: int) -> Iterator[Site]:
    """Hosts and a workshop in a new folder. Raises SystemExit where there can be no namespaces."""
    if why := missing():
        raise SystemExit(f"cannot run: {why}")
    shop = workshop(folder)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # through every `finally`
    with namespaces(folder / "cluster", num_hosts=num_hosts) as cluster:
        yield Site(shop, cluster)


def losses_on_one_host(folder: Path) -> dict[int, float]:
    """By step, of the same run with two ranks on this machine."""
    shop = workshop(folder)
    process = shop.start("train", shop.run_file("whole", FIELDS), "--nproc", "2")
    try:
        out, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, out
    return dict(shop.losses("whole"))
