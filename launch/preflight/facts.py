"""What this host is, as one JSON object: ``python -m launch.preflight.facts [--shared FILE] -- RUN.yaml [a.b=c ...]``.

Preflight runs it on every host and compares. Owns what is looked at and how; imports no torch, whose version is read
from its files, so that an answer takes a second. Refuses to judge (``launch.preflight.rules`` does) and to fail as a
whole: what could not be found out is an ``error`` in its place. No environment variable is told.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cpt.problems import ConfigError
from cpt.rundir import DataError, RunDir
from launch.hosts.answer import addresses

if TYPE_CHECKING:
    from cpt.config import RunConfig

CODE = ("cpt", "data_tools", "launch")
PACKAGES = ("cpt", "torch", "deepspeed", "transformers", "numpy")
PROGRAMS = ("ssh", "pdsh", "nvidia-smi")
GPU_QUERY = {
    "index": int,
    "name": str,
    "uuid": str,
    "memory.total": int,  # MiB, as all memory of nvidia-smi
    "memory.used": int,
    "temperature.gpu": int,
    "ecc.errors.uncorrected.volatile.total": int,
    "driver_version": str,
}
SMI_SECONDS = 20.0
LIMIT_SECONDS = 60  # of all of it: a file system that hangs must not keep this process for ever
UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63

Facts = dict[str, Any]


def collect(arguments: Sequence[str], *, shared: Path | None = None, port: int | None = None) -> Facts:
    """All facts, for a job with these trainer's arguments (none: no job). ``shared``: the file that the launching host
    left beside the run folder, which holds its own name; ``port``: to be listened at by rank 0, on its host alone.
    """
    return {
        "host": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": versions(),
        "code": code_hash(),
        **job_facts(arguments),
        "shared": None if shared is None else sees(shared),
        **gpu_facts(),
        **memory_facts(),
        "limits": limits(),
        "programs": {name: shutil.which(name) for name in PROGRAMS},
        "addresses": addresses(),
        "own_address": own_address(),
        "port": None if port is None else port_facts(port),
    }


# --- code, packages, job ----------------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Of what ranks must agree on; ``cuda``: that torch was built for."""
    found = {name: _version(name) for name in PACKAGES}
    nccl = next(filter(None, (_version(f"nvidia-nccl-cu{major}") for major in (13, 12, 11))), None)
    return {**found, "cuda": torch_cuda(), "nccl": nccl}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torch_cuda() -> str | None:
    """What CUDA torch was built for, from its file: importing it takes seconds. None: a CPU build, or no torch."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if file is None or not file.is_file():
        return None
    found = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", file.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else None


def code_hash() -> str:
    """sha256 over the names and contents of this project's files, as they would be imported here."""
    digest = hashlib.sha256()
    for package in CODE:
        spec = find_spec(package)
        for root in spec.submodule_search_locations or () if spec else ():
            for file in sorted(path for path in Path(root).rglob("*") if path.suffix in (".py", ".html", ".j2")):
                digest.update(f"{package}/{file.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def job_facts(arguments: Sequence[str]) -> Facts:
    """Of the run: the hash of its resolved config, its stores, model and folder, as this host sees them."""
    if not arguments:
        return {}
    try:
        config = read_config(arguments)
    except ConfigError as error:
        return {"config": {"error": "; ".join(map(str, error.problems))}}
    resolved = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    folders = {config.run_dir, *config.data.stores.values()}
    return {
        "config": {"hash": hashlib.sha256(resolved.encode()).hexdigest()},
        "stores": {name: store_facts(path) for name, path in config.data.stores.items()},
        "model": model_facts(config.model.init_from),
        "run_dir": {"path": str(config.run_dir), "error": write_error(config.run_dir)},
        "free_bytes": {str(folder): free for folder in sorted(folders) if (free := free_bytes(folder)) is not None},
    }


def read_config(arguments: Sequence[str]) -> "RunConfig":
    """The run's config, as every rank will read it from the trainer's arguments.

    Raises:
        ConfigError: with every problem found.
    """
    from cpt.config import apply_override, load_config, read_mapping, validate  # a fifth of a second

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--profile")
    known, words = parser.parse_known_args(list(arguments))
    if known.resume is None:
        return load_config(Path(words[0]), words[1:])
    raw, folder = read_mapping(RunDir(known.resume).config), known.resume.absolute()
    if isinstance(raw.get("run"), dict):  # a run folder may have been moved
        raw["run"] |= {"dir": str(folder.parent), "name": folder.name}
    for override in words:
        apply_override(raw, override)
    return validate(raw)


def store_facts(folder: Path) -> Facts:
    """Content hashes of both splits from their manifests, after the size of every file was compared."""
    from cpt.data.store_selection import open_split

    try:
        return {split: open_split(folder / split).manifest.content_hash for split in ("train", "heldout")}
    except (DataError, OSError) as error:
        return {"error": str(error)}


def model_facts(origin: str | None) -> Facts | None:
    """Of a local folder of weights: a hash over names and sizes of its files and what its JSON files say."""
    if origin is None:
        return None  # fresh
    folder = Path(origin)
    try:
        if not (folder.is_absolute() or folder.exists()):
            return None  # a name of the hub
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        told = [(path.name, path.stat().st_size, _digest(path)) for path in files]
    except OSError as error:
        return {"error": str(error)}
    return {"hash": hashlib.sha256(repr(told).encode()).hexdigest()} if told else {"error": f"{folder} is not there"}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".json" else ""


def standing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def write_error(folder: Path) -> str | None:
    """Why nothing can be written where the folder is or will be; None: it can."""
    try:
        with tempfile.TemporaryFile(dir=standing(folder)) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def free_bytes(folder: Path) -> int | None:
    """Where the folder is or will be; None where that cannot be found out, which ``write_error`` explains."""
    try:
        return shutil.disk_usage(standing(folder)).free
    except OSError:
        return None


def sees(path: Path) -> bool:
    try:
        return path.read_text(encoding="utf-8") == path.name
    except OSError:
        return False


# --- machine ----------------------------------------------------------------------------------------------------------


def gpu_facts() -> Facts:
    """``gpus``: one mapping each, keys as nvidia-smi calls them; ``gpu_error``: why they could not be asked."""
    if shutil.which("nvidia-smi") is None:
        return {"gpus": [], "gpu_error": None}
    try:
        gpus = read_gpus(_smi(f"--query-gpu={','.join(GPU_QUERY)}"))
        busy = read_processes(_smi("--query-compute-apps=gpu_uuid,pid,used_memory"))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stdout", "") or getattr(error, "stderr", "") or str(error)
        return {"gpus": [], "gpu_error": " ".join(str(said).split())[:300]}
    return {"gpus": [{**gpu, "processes": busy.get(gpu["uuid"], [])} for gpu in gpus], "gpu_error": None}


def _smi(query: str) -> str:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout


def read_gpus(table: str) -> list[Facts]:
    """Lines of ``nvidia-smi --query-gpu``; a number that the GPU does not have ([N/A]) is None."""
    gpus = []
    for line in filter(None, table.splitlines()):
        values = [value.strip() for value in line.split(",")]
        gpus.append(
            {
                key: kind(value) if kind is str or value.isdecimal() else None
                for (key, kind), value in zip(GPU_QUERY.items(), values, strict=True)
            }
        )
    return gpus


def read_processes(table: str) -> dict[str, list[int]]:
    """Process ids by the GPU's uuid."""
    found: dict[str, list[int]] = {}
    for line in filter(None, table.splitlines()):
        uuid, pid, *_ = (value.strip() for value in line.split(","))
        if pid.isdecimal():
            found.setdefault(uuid, []).append(int(pid))
    return found


def memory_facts() -> Facts:
    """Bytes: memory that is there, that is free now, that the container may use (None: no limit); /dev/shm."""
    memory = psutil.virtual_memory()
    shm = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "memory": {"total": memory.total, "available": memory.available, "limit": container_limit()},
        "shm_bytes": shm.f_blocks * shm.f_frsize if shm else 0,
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
    }


def container_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that this process' control group may use; None: as many as there are."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = root / name
        if file.is_file():
            text = file.read_text(encoding="utf-8").strip()
            return int(text) if text.isdecimal() and int(text) < UNLIMITED else None
    return None


def limits() -> dict[str, int | None]:
    """Soft limits of a process; None: unlimited."""
    wanted: Mapping[str, int] = {"open_files": resource.RLIMIT_NOFILE, "locked_bytes": resource.RLIMIT_MEMLOCK}
    soft = {name: resource.getrlimit(number)[0] for name, number in wanted.items()}
    return {name: None if limit == resource.RLIM_INFINITY else limit for name, limit in soft.items()}


# --- network ----------------------------------------------------------------------------------------------------------


def own_address() -> str | None:
    """What this host's own name means to itself: the address at which gloo and NCCL listen where none is stated."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def port_facts(port: int) -> Facts:
    """Whether rank 0 can listen here; where it cannot, who does."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            return {"number": port, "error": f"{error.strerror}{_holder(port)}"}
    return {"number": port}


def _holder(port: int) -> str:
    try:
        found = [entry.pid for entry in psutil.net_connections("tcp") if entry.laddr and entry.laddr.port == port]
    except psutil.Error:  # not ours to look at
        return ""
    return next((f" by process {pid}" for pid in found if pid), "")


def main(arguments: Sequence[str] | None = None) -> None:
    """The clock comes last and is printed at once: what lies between it and its arrival is the way alone."""
    signal.alarm(LIMIT_SECONDS)
    what = "What this host is, as one JSON object."
    parser = argparse.ArgumentParser(prog="launch.preflight.facts", description=what)
    parser.add_argument("--shared", type=Path, help="file that the launching host left, holding its own name")
    parser.add_argument("--port", type=int, help="port of rank 0, on its host")
    parser.add_argument("job", nargs=argparse.REMAINDER, help="-- and the trainer's arguments")
    options = parser.parse_args(arguments)
    job = options.job[1:] if options.job[:1] == ["--"] else options.job
    facts = collect(job, shared=options.shared, port=options.port)
    print(json.dumps({**facts, "clock": time.time()}), flush=True)


if __name__ == "__main__":
    main()
