"""Pin every Python package of the images, with the hashes of its files: `make lock`, after a change of pyproject.toml
or constraints.txt.

    docker/requirements-cpu.txt      Python 3.11 on x86-64, torch without CUDA
    docker/requirements-cuda.txt     Python 3.11 and newer on Linux
    docker/requirements-flash.txt    FlashAttention and Liger kernels, on top of the CUDA lock
    docker/requirements-build.txt    what builds a package that has no wheel

Resolves with uv, from where pip takes its packages: torch without CUDA lies in pip's find-links folder, or else on
PyTorch's own index. Refuses to write a lock that names an index: which one is asked is the builder's business.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
UV = "uv==0.13.9"
SETTINGS = {"index-url": "UV_DEFAULT_INDEX", "find-links": "UV_FIND_LINKS", "cert": "SSL_CERT_FILE"}  # pip's, uv's
PLATFORM = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28")
ANY_PLATFORM = ("--python-version", "3.11", "--universal")
HEADER = "# Written by docker/lock.py (`make lock`) from pyproject.toml and constraints.txt; not by hand.\n"


def pip_settings() -> dict[str, str]:
    """pip's configuration as uv's environment variables."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    found = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        setting = re.split(r"[.:]", name)[-1]
        if setting in SETTINGS:
            found[SETTINGS[setting]] = value.strip("'\"")
    return found


def compile_lock(name: str, wanted: list[str], options: tuple[str, ...], settings: Mapping[str, str]) -> None:
    """Resolve requirements under constraints.txt into ``docker/requirements-NAME.txt``."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "wanted.in", Path(folder) / "lock.txt"
        source.write_text("\n".join(wanted) + "\n")
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            *options,
            "--generate-hashes",
            "--no-header",
            "--quiet",
        ]
        command += ["--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--no-config"]
        command += ["--constraints", str(ROOT / "constraints.txt"), "--output-file", str(out), str(source)]
        subprocess.run(command, check=True, env={**os.environ, **settings}, timeout=600)
        text = out.read_text()
    if "://" in text:
        raise RuntimeError(f"the lock {name} names an address; nothing was written")
    (FOLDER / f"requirements-{name}.txt").write_text(HEADER + text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", UV], check=True, timeout=600)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["data"], *extras["eval"]]
    settings = pip_settings()
    without_links = {name: value for name, value in settings.items() if name != SETTINGS["find-links"]}
    torch = next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch=="))
    # The folder may hold a torch without CUDA alone, which PyPI has not; elsewhere uv knows PyTorch's index.
    backend = () if SETTINGS["find-links"] in settings else ("--torch-backend", "cpu")
    compile_lock("cpu", [*wanted, f"{torch}+cpu"], (*PLATFORM, *backend), settings)
    compile_lock("cuda", wanted, ANY_PLATFORM, without_links)
    compile_lock("flash", [*extras["flash"], "wheel"], (*ANY_PLATFORM, "--no-deps"), without_links)
    compile_lock("build", ["pip", "setuptools"], (*ANY_PLATFORM, "--no-deps"), without_links)


if __name__ == "__main__":
    main()
