"""What the image is built from, read as text: locks with hashes that agree with what was tested, a Dockerfile without
surprises, a build context without a working folder's secrets. Builds nothing.
"""

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
LOCKS = sorted(DOCKER.glob("requirements-*.txt"))
WHOLE = [DOCKER / f"requirements-{variant}.txt" for variant in ("cpu", "cuda")]
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def entries(lock: str) -> list[str]:
    """A lock's entries, each in one line: ``name==version ; marker --hash=... --hash=...``."""
    return [line for line in lock.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def pinned(lock: str) -> dict[str, set[str]]:
    """Versions by name; there may be one per Python version."""
    found: dict[str, set[str]] = {}
    for entry in entries(lock):
        requirement = Requirement(entry.split("--hash")[0].strip())
        (version,) = requirement.specifier
        found.setdefault(canonicalize_name(requirement.name), set()).add(version.version)
    return found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line.strip() and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def disagreements(lock: str, tested: dict[str, str]) -> list[str]:
    """Where a lock has another version than constraints.txt; the ``+cpu`` of a build is none."""
    return [
        f"{name}: {sorted(versions)} in the lock, {tested[name]} in constraints.txt"
        for name, versions in pinned(lock).items()
        if name in tested and {version.split("+")[0] for version in versions} != {tested[name]}
    ]


def product_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["data"])]


def stage(number: int) -> str:
    return "FROM " + re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[number]


def instructions(text: str) -> list[tuple[str, str]]:
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    whole = lines.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(None, 1)[1]) for line in whole if line.strip()]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_every_package_of_a_lock_has_a_version_and_a_hash_and_no_address(lock: Path) -> None:
    text = lock.read_text()
    assert entries(text) and "://" not in text and "--index" not in text
    for entry in entries(text):
        assert re.match(r"[\w.-]+==\S+", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_holds_the_versions_that_ci_tested(lock: Path) -> None:
    assert not disagreements(lock.read_text(), constraints()), "run `make lock`"


def test_a_changed_constraint_is_seen() -> None:
    (told,) = disagreements(WHOLE[0].read_text(), {**constraints(), "numpy": "1.0"})
    assert told.startswith("numpy: ") and told.endswith("1.0 in constraints.txt")


@pytest.mark.parametrize("lock", WHOLE, ids=lambda path: path.stem)
def test_a_lock_holds_all_that_the_product_asks_for(lock: Path) -> None:
    found = pinned(lock.read_text())
    for requirement in product_requirements():
        versions = found.get(canonicalize_name(requirement.name), set())
        assert versions, f"{requirement.name} is not in {lock.name}: run `make lock`"
        assert all(requirement.specifier.contains(version, prereleases=True) for version in versions), requirement


def test_both_variants_hold_the_same_packages_but_for_cuda() -> None:
    cpu, cuda = (pinned(lock.read_text()) for lock in WHOLE)
    only_here = {name for name in cpu if not cpu[name] & cuda.get(name, set())}
    assert only_here == {"torch"} and cpu["torch"] == {f"{version}+cpu" for version in cuda["torch"]}


def test_the_final_stage_runs_as_a_numbered_user_under_tini_with_a_health_check() -> None:
    final = instructions(stage(-1))
    users = [value for name, value in final if name == "USER"]
    assert users == ["10001:10001"]
    assert ("ENTRYPOINT", '["tini", "--", "cpt"]') in final
    assert any(name == "HEALTHCHECK" and "launch.local.health" in value for name, value in final)


def test_nothing_comes_from_an_address_or_an_unpinned_image() -> None:
    found = instructions(DOCKERFILE)
    assert not [value for name, value in found if name == "ADD"]
    images = re.findall(r"^ARG (?:BUILD_)?BASE=(\S+)", DOCKERFILE, flags=re.MULTILINE)
    images += [value.split()[0] for name, value in found if name == "FROM"]
    assert len(images) >= 4
    for image in images:
        named = image.startswith("${") or image in ("packages", "flash", "code")
        assert named or re.search(r":(?!latest)[\w.-]+$|@sha256:", image), image
    assert ":latest" not in DOCKERFILE and not re.search(r"\b(curl|wget)\b", DOCKERFILE)


def test_pip_takes_nothing_whose_hash_is_not_in_a_lock() -> None:
    installs = re.findall(r"pip\b[^;]*?\b(?:install|wheel|download) [^;]*", DOCKERFILE.replace("\\\n", " "))
    assert len(installs) >= 4
    assert all("--require-hashes" in command or "--no-index" in command for command in installs), installs


def test_the_code_is_the_last_layer_and_the_final_stage_installs_no_build_tools() -> None:
    final = instructions(stage(-1))
    assert final[-1] == ("COPY", "--from=code /opt/cpt /opt/cpt")
    packages = " ".join(value for name, value in final if name == "RUN")
    assert not re.search(r"\b(g\+\+|gcc|build-essential|python3-pip|python3-venv|git)\b", packages)


def test_the_flash_lock_is_what_the_extra_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = pinned((DOCKER / "requirements-flash.txt").read_text())
    for requirement in map(Requirement, project["optional-dependencies"]["flash"]):
        assert all(requirement.specifier.contains(version) for version in found[canonicalize_name(requirement.name)])


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a file into the build context: the last pattern that matches it or a folder above."""
    sent = True
    above = ["/".join(path.split("/")[:depth]) for depth in range(1, path.count("/") + 2)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if not pattern or pattern.startswith("#"):
            continue
        anywhere = pattern.removeprefix("**/")
        names = [part for name in above for part in ((name.split("/")[-1],) if "**/" in pattern else (name,))]
        if any(fnmatch.fnmatch(name, anywhere) and ("/" in pattern or "/" not in name) for name in names):
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", "runs/a/metrics.jsonl", "stores/a/manifest.json", ".env", "wandb/x", ".venv/bin/python",
        "cpt/__pycache__/cli.cpython-311.pyc", "docker/Dockerfile", "tests/conftest.py", "build/x", "id_rsa",
    ],
)  # fmt: skip
def test_a_working_folders_files_stay_out_of_the_build_context(path: str) -> None:
    assert not is_sent(path)


def test_all_that_the_dockerfile_copies_is_in_the_build_context() -> None:
    copied = [
        word.rstrip("/")
        for name, value in instructions(DOCKERFILE)
        if name == "COPY" and "--from" not in value
        for word in value.split()[:-1]
    ]
    assert "cpt" in copied and "docker/requirements-build.txt" in copied
    for name in (path.replace("${VARIANT}", variant) for path in copied for variant in ("cpu", "cuda")):
        assert (ROOT / name).exists() and is_sent(name), name
    assert is_sent("cpt/train/main.py") and is_sent("docker/wheels/a.whl")


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DOCKER / "compose.yaml").read_text()))


def test_the_two_nodes_of_the_compose_file_are_two_hosts_of_one_run() -> None:
    services = compose()["services"]
    nodes = [services["node0"], services["node1"]]
    assert [node["environment"]["JOB_COMPLETION_INDEX"] for node in nodes] == ["0", "1"]
    assert all(node["environment"]["MASTER_ADDR"] == nodes[0]["hostname"] for node in nodes)
    assert nodes[0]["command"] == nodes[1]["command"] and nodes[0]["command"][:2] == ["--hosts", "2"]


def test_the_compose_services_are_confined_and_publish_nothing() -> None:
    content = compose()
    assert all(network["internal"] for network in content["networks"].values())
    for name, service in content["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert not {"ports", "privileged", "network_mode", "user"} & set(service), name


def test_the_commands_of_the_compose_file_are_understood(tmp_path: Path) -> None:
    """Each node's as launch.local.node reads it, up to what this host lacks: an environment that says which host it is."""
    node = compose()["services"]["node1"]
    assert node["entrypoint"][:3] == ["tini", "--", "python"]
    done = subprocess.run(
        [sys.executable, *node["entrypoint"][3:], *node["command"]],
        cwd=ROOT, env={"PATH": "", "JOB_COMPLETION_INDEX": "9"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "must be the number of this host, from 0 to 1" in done.stderr
