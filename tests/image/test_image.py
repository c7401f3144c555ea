"""The image, really built and run: `make image` builds it, runs this, and takes everything away again.

Containers here have what Docker gives one with --read-only, --network none and a volume at /data: namespaces of their
own, the image's user, environment and entrypoint, and tini as the first process.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from benchmarks.launch.image import LAB, SIZE_BAR, USER, ImageLab, installed_bytes, missing_parts

ROOT = Path(__file__).resolve().parents[2]
FOLDER = os.environ.get(LAB, "")
pytestmark = [
    pytest.mark.skipif(not FOLDER, reason=missing_parts() or "make image builds the image, then runs this"),
    pytest.mark.timeout(1500),  # the quickstart's, on a machine that does something else as well
]

START_SECONDS, RUN_SECONDS = 240.0, 900.0
SETTINGS = (
    "run.name=stopped",
    "run.dir=runs",
    "train.tokens=20480000",
    "checkpoint.every_steps=100000",
    "eval.at_steps=[]",
)


class Started:
    """A container in the background; ``init`` is its first process."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def init(self) -> psutil.Process:
        def found() -> psutil.Process | None:
            family = psutil.Process(self._process.pid).children()
            return family[0] if family and family[0].name() == "tini" else None

        return wait_for(found, self, "tini")

    def wait(self, seconds: float = START_SECONDS) -> int:
        return self._process.wait(seconds)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()  # unshare takes the first process, and with it all of the container, along
        self._process.wait(30)


def wait_for(look: Callable[[], Any], container: Started, what: str) -> Any:
    deadline = time.monotonic() + START_SECONDS
    while not (found := look()):
        assert not container.ended(), f"ended before there was {what}:\n{container.log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"no {what}:\n{container.log.read_text()[-4000:]}"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def lab() -> ImageLab:
    return ImageLab(Path(FOLDER))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A fresh /data."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def quickstarted(lab: ImageLab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A /data in which `cpt quickstart --fast` has run."""
    folder = tmp_path_factory.mktemp("quickstarted")
    done = run(lab, folder, "quickstart", "--fast", "--out", "quickstart", seconds=RUN_SECONDS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.fixture
def start(lab: ImageLab, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts containers; those that still run are killed at the end."""
    started = []

    def begin(folder: Path, *arguments: str, **options: Any) -> Started:
        command = lab.command(folder, arguments, **options)
        started.append(Started(command, tmp_path / f"container_{len(started)}.log"))
        return started[-1]

    yield begin
    for container in started:
        container.kill()


def run(
    lab: ImageLab, folder: Path, *arguments: str, entrypoint: Sequence[str] | None = None, seconds: float = 120.0
) -> Any:
    command = lab.command(folder, arguments, entrypoint=entrypoint)
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def health(lab: ImageLab, container: Started) -> Any:
    """The image's own health check, in a running container."""
    settings = lab.settings()
    inside = ["env", "-i", "-C", settings["WorkingDir"], *settings["Env"], *settings["Healthcheck"]["Test"][1:]]
    enter = [
        "nsenter",
        "--target",
        str(container.init.pid),
        "--all",
        "--root",
        "--setuid",
        str(USER),
        "--setgid",
        str(USER),
    ]
    return subprocess.run([*enter, *inside], capture_output=True, text=True, timeout=60, check=False)


def test_it_is_confined_as_it_says(lab: ImageLab, data: Path) -> None:
    program = """
import json, os, socket
def fails(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return error.strerror
with open("/proc/1/cmdline") as file:
    first = file.read().split("\\0")[0]
with open("/proc/net/dev") as file:
    links = [line.split(":")[0].strip() for line in file if ":" in line]
print(json.dumps({"ids": [os.getuid(), os.getgid(), os.getgroups()], "first": first, "links": links,
    "etc": fails("/etc/x"), "code": fails("/opt/cpt/x"), "tmp": fails("/tmp/x"), "data": fails("/data/x")}))
"""
    done = run(lab, data, "-c", program, entrypoint=["tini", "--", "python"])
    found = json.loads(done.stdout)
    assert found["ids"] == [USER, USER, [USER]] and found["first"] == "tini" and found["links"] == ["lo"]
    assert found["etc"] and found["code"] and found["tmp"] is None and found["data"] is None


def test_it_brings_no_build_tools_and_fresh_bytecode(lab: ImageLab) -> None:
    tree = lab.tree()
    tools = {"gcc", "g++", "cc", "make", "git", "curl", "wget", "pip", "sshd"}
    assert not [
        file
        for folder in ("usr/bin", "opt/venv/bin", "opt/cpt/bin")
        for file in (tree / folder).iterdir()
        if file.name in tools
    ]
    for module in (
        "opt/cpt/cpt/cli.py",
        *(
            f"opt/venv/lib/python3.11/site-packages/{name}"
            for name in ("torch/nn/modules/module.py", "deepspeed/__init__.py")
        ),
    ):
        source = tree / module
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.cpython-*.pyc")
        assert int.from_bytes(compiled.read_bytes()[8:12], "little") == int(source.stat().st_mtime), (
            f"{module} is recompiled"
        )


def test_it_is_hardly_larger_than_its_installed_wheels(lab: ImageLab) -> None:
    assert lab.image_bytes("localhost/cpt:cpu") <= SIZE_BAR * sum(installed_bytes(lab.tree()))


def test_the_doctor_finds_it_well(lab: ImageLab, data: Path) -> None:
    done = run(lab, data, "doctor")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_quickstart_runs_without_a_network_or_a_writable_root(quickstarted: Path) -> None:
    assert (quickstarted / "quickstart" / "report" / "index.html").stat().st_size > 10_000
    assert {path.stat().st_uid for path in quickstarted.rglob("*")} == {USER}


def test_sigterm_to_the_first_process_saves_and_the_run_goes_on_from_there(
    lab: ImageLab, quickstarted: Path, start: Callable[..., Started]
) -> None:
    container = start(quickstarted, "train", "quickstart/run_files/no_replay.yaml", *SETTINGS)
    metrics = quickstarted / "runs" / "stopped" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, container, "a step")
    assert (checked := health(lab, container)).returncode == 0, checked.stdout + checked.stderr
    container.init.send_signal(signal.SIGTERM)
    assert container.wait() == 143, container.log.read_text()[-4000:]
    (saved,) = (quickstarted / "runs" / "stopped" / "checkpoints").glob("step_*")
    assert (saved / "COMPLETE").is_file()
    again = start(quickstarted, "resume", "runs/stopped")
    size = metrics.stat().st_size
    wait_for(lambda: metrics.stat().st_size > size, again, "a step after it was resumed")
    again.init.send_signal(signal.SIGTERM)
    assert again.wait() == 143
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] > int(saved.name.removeprefix("step_"))


def test_a_rank_that_shows_no_life_makes_it_unhealthy(
    lab: ImageLab, quickstarted: Path, start: Callable[..., Started]
) -> None:
    container = start(quickstarted, "train", "quickstart/run_files/no_replay.yaml", "run.name=frozen", *SETTINGS[1:])
    beat = quickstarted / "runs" / "frozen" / "heartbeats" / "rank_00000.json"
    metrics = beat.parents[1] / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, container, "a step")
    rank = container.init.children()[0]
    rank.suspend()
    try:
        old = max(time.time() - 61, rank.create_time())  # a minute of silence, less what the test need not wait for
        time.sleep(max(0.0, 61 - (time.time() - old)))
        os.utime(beat, (old, old))
        checked = health(lab, container)
        assert (
            checked.returncode == 1 and "runs/frozen: rank 0" in checked.stdout and "no sign of life" in checked.stdout
        )
    finally:
        rank.resume()


def test_the_two_nodes_of_the_compose_file_train_one_run(
    lab: ImageLab, quickstarted: Path, start: Callable[..., Started]
) -> None:
    """In one network namespace, as the containers of a pod are; the names node0 and node1 are both its loopback."""
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    nodes = []
    for name in ("node0", "node1"):
        service = services[name]
        environment = [f"{key}={value}" for key, value in service["environment"].items()]
        options = {"entrypoint": service["entrypoint"], "environment": environment, "hostname": service["hostname"]}
        nodes.append(start(quickstarted, *service["command"], **options))
    codes = [node.wait(RUN_SECONDS) for node in nodes]
    assert codes == [0, 0], "".join(node.log.read_text()[-3000:] for node in nodes)
    run_dir = quickstarted / "runs" / "two_nodes"
    assert list((run_dir / "checkpoints").glob("step_*/COMPLETE"))
    ranks = [json.loads(path.read_text())["rank"] for path in sorted((run_dir / "heartbeats").glob("rank_*.json"))]
    assert ranks == [0, 1]
