"""The image, built and run on this machine: how large it is, and how long its build and a rebuild take.

    python -m benchmarks.launch.image         writes benchmarks/results/launch_image.json; needs root, and the packages
                                              of TOOLS (`make image` installs them, and runs tests/image on it too)

No registry is asked: the base is made by debootstrap, the wheels are fetched by their hashes with pip's settings, and
buildah builds the CPU variant of docker/Dockerfile in a network namespace that holds nothing but a loopback. Bars:
the image at most 1.2 times the size of its installed wheels, which is their files and the bytecode that pip compiles
when it installs them (the ratio to the files alone is recorded too), a rebuild after a change of the code within 60 s.

``ImageLab`` is what tests/image runs containers with: a read-only root, /tmp and /data writable, the image's own user,
environment and entrypoint, its own process, mount and network namespaces, the first process being number 1.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "launch_image.json"
TOOLS = {"buildah": "buildah", "debootstrap": "debootstrap", "ip": "iproute2", "nsenter": "util-linux"}  # -> package
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
BASE_PACKAGES = "python3,python3-venv,tini,ca-certificates,libgomp1"
NOT_IN_A_BASE = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt", "var/lib/apt")
CONTEXT = ("cpt", "data_tools", "launch", "docker", "pyproject.toml", "README.md", "LICENSE", ".dockerignore")
SIZE_BAR, REBUILD_BAR = 1.2, 60.0
LAB, TEST_SECONDS = "CPT_IMAGE_LAB", 3600
USER = 10001
HOSTNAMES = ("container", "node0", "node1")
# Arguments: root, folder for /data, hosts file, user, host name, then what is run. Devices are bound one by one.
ENTER = """
root=$1 data=$2 hosts=$3 user=$4 name=$5; shift 5
hostname "$name"
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777,size=4g tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in null zero full random urandom; do
    touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir "$root/dev/shm"; mount -t tmpfs -o mode=1777,size=2g tmpfs "$root/dev/shm"
ln -s /proc/self/fd "$root/dev/fd"
mount --bind "$data" "$root/data"
mount --bind "$hosts" "$root/etc/hosts"
mount -o remount,ro,bind "$root"
exec chroot --userspec="$user:$user" --groups="$user" "$root" "$@"
"""


class ImageLab:
    """A folder with buildah's storage, a base, a build context and a network namespace of the folder's name; all of it
    goes at the end of the one that entered it.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.context = folder / "context"
        self.namespace = folder.name

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        _run(["ip", "netns", "add", self.namespace])
        _run([*self._isolated(), "ip", "link", "set", "lo", "up"])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pid in _run(["ip", "netns", "pids", self.namespace], check=False).split():
            _run(["kill", "-9", pid], check=False)
        self.buildah("rm", "--all", check=False)
        _run(["ip", "netns", "delete", self.namespace], check=False)
        storage = str(self.root / "storage" / "overlay")
        _run(["umount", "-l", storage], check=False)  # buildah makes its storage a mount point of its own
        shutil.rmtree(self.root)

    def buildah(self, *arguments: str, check: bool = True, timeout: float = 120, prefix: Sequence[str] = ()) -> str:
        storage = ["--root", str(self.root / "storage"), "--runroot", str(self.root / "run")]
        return _run(
            [*prefix, "buildah", *storage, "--storage-driver", "overlay", *arguments], check=check, timeout=timeout
        )

    def make_base(self) -> float:
        """``localhost/base``: what debian:bookworm-slim holds, and Debian's Python. Returns its bytes."""
        tree = self.root / "base"
        _run(["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, str(tree), MIRROR], timeout=900)
        for name in NOT_IN_A_BASE:
            shutil.rmtree(tree / name)
            (tree / name).mkdir()
        archive = self.root / "base.tar"
        _run(["tar", "-C", str(tree), "--numeric-owner", "-cf", str(archive), "."], timeout=300)
        shutil.rmtree(tree)
        (self.root / "Base").write_text(f"FROM scratch\nADD {archive.name} /\n")
        self.buildah(
            "bud", "--isolation", "chroot", "-t", "localhost/base", "-f", str(self.root / "Base"), str(self.root)
        )
        archive.unlink()
        return self.image_bytes("localhost/base")

    def fetch_wheels(self) -> None:
        """Copy what an image is built from, and fetch the wheels of the locks by their hashes."""
        self.context.mkdir()
        for name in CONTEXT:
            source, target = ROOT / name, self.context / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "wheels"))
            else:
                shutil.copy2(source, target)
        wheels = self.context / "docker" / "wheels"
        for lock in ("build", "cpu"):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"]
            command += ["-r", str(ROOT / "docker" / f"requirements-{lock}.txt"), "-d", str(wheels)]
            _run(command, timeout=1200)

    def build(self) -> float:
        """Build ``localhost/cpt:cpu``; returns the seconds it took."""
        started = time.monotonic()
        arguments = ["--isolation", "chroot", "--format", "docker", "--layers"]
        arguments += ["--build-arg", "BASE=localhost/base", "--build-arg", "VARIANT=cpu"]
        arguments += ["-t", "localhost/cpt:cpu", "-f", str(self.context / "docker" / "Dockerfile"), str(self.context)]
        self.buildah("bud", *arguments, timeout=1800, prefix=self._isolated())
        return time.monotonic() - started

    def settings(self) -> dict[str, Any]:
        """What the image says about running it: Docker's ``Config``."""
        inspected = json.loads(self.buildah("inspect", "--type", "image", "localhost/cpt:cpu"))
        return dict(inspected["Docker"]["config"])

    def image_bytes(self, image: str) -> int:
        """Of all its layers, unpacked: what a host must store."""
        storage = self.root / "storage"
        images = json.loads((storage / "overlay-images" / "images.json").read_text())
        layers = {each["id"]: each for each in json.loads((storage / "overlay-layers" / "layers.json").read_text())}
        layer = next(each["layer"] for each in images if {image, f"{image}:latest"} & set(each.get("names") or ()))
        total = 0
        while layer:
            total += layers[layer].get("diff-size", 0)
            layer = layers[layer].get("parent", "")
        return total

    def tree(self) -> Path:
        """The image's files, mounted."""
        noted = self.root / "tree"
        if not noted.exists():
            container = self.buildah("from", "localhost/cpt:cpu").strip()
            noted.write_text(self.buildah("mount", container).strip())
        return Path(noted.read_text())

    def command(
        self,
        data: Path,
        arguments: Sequence[str],
        *,
        entrypoint: Sequence[str] | None = None,
        environment: Sequence[str] = (),
        hostname: str = "container",
    ) -> list[str]:
        """The command that runs a container in the foreground; ``data`` is its /data, ``NAME=VALUE`` its environment
        beyond the image's.
        """
        settings = self.settings()
        hosts = self.root / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {' '.join(HOSTNAMES)}\n")
        os.chown(data, USER, USER)
        user = settings["User"].split(":")[0]
        start = settings["Entrypoint"] if entrypoint is None else list(entrypoint)
        inside = ["env", "-i", "-C", settings["WorkingDir"], *settings["Env"], *environment, *start, *arguments]
        namespaces = ["--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--propagation", "private"]
        fixed = [str(self.tree()), str(data), str(hosts), user, hostname]
        return [*self._isolated(), "unshare", *namespaces, "sh", "-euc", ENTER, "sh", *fixed, *inside]

    def _isolated(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace]


def missing_parts() -> str:
    """Why no image can be built here; empty where one can."""
    if os.geteuid():
        return "needs root"
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    return f"needs the packages {', '.join(missing)}: make image installs them" if missing else ""


def installed_bytes(tree: Path) -> tuple[int, int]:
    """Bytes of the files that wheels brought into an image, and of the bytecode compiled from them."""
    brought = compiled = 0
    for folder in (tree / "opt/venv/lib").glob("python3.*/site-packages"):
        for record in folder.glob("*.dist-info/RECORD"):
            for name, *_ in csv.reader(record.read_text().splitlines()):
                file = folder / name
                if file.is_file():
                    compiled += file.stat().st_size * (file.suffix == ".pyc")
                    brought += file.stat().st_size * (file.suffix != ".pyc")
    return brought, compiled


def measure(lab: ImageLab) -> dict[str, Any]:
    """Make everything; returns the figures."""
    base = lab.make_base()
    lab.fetch_wheels()
    build = lab.build()
    changed = lab.context / "cpt" / "problems.py"
    changed.write_text(changed.read_text() + "\n# A change of the code.\n")
    rebuild = lab.build()
    size, (brought, compiled) = lab.image_bytes("localhost/cpt:cpu"), installed_bytes(lab.tree())
    return {
        "base_bytes": base,
        "image_bytes": size,
        "wheels_bytes": brought,
        "bytecode_bytes": compiled,
        "size_ratio": round(size / (brought + compiled), 3),
        "size_ratio_without_bytecode": round(size / brought, 3),
        "build_seconds": round(build, 1),
        "rebuild_seconds": round(rebuild, 1),
        "bars": {"size_ratio": SIZE_BAR, "rebuild_seconds": REBUILD_BAR},
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "buildah": _run(["buildah", "--version"]).strip(),
    }


def _run(command: Sequence[str], *, check: bool = True, timeout: float = 60) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd="/")
    if check and done.returncode:
        told = (done.stdout + done.stderr)[-6000:]
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{told}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="then run tests/image on what was built")
    options = parser.parse_args()
    if why := missing_parts():
        raise SystemExit(why)
    with ImageLab(Path(tempfile.mkdtemp(prefix="cpt-image-"))) as lab:
        found = measure(lab)
        if options.test:
            tests = [sys.executable, "-m", "pytest", "-v", "tests/image"]
            subprocess.run(tests, cwd=ROOT, env={**os.environ, LAB: str(lab.root)}, check=True, timeout=TEST_SECONDS)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
