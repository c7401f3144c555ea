"""This machine, looked at before anything is started on it: `cpt doctor`.

Owns what one machine needs, each row with its fix; what several must agree on is ``launch.preflight.rules``', whose
rules for one host are used here too. Imports no torch: versions and builds are read from the files of packages, so that
the answer comes in a second. Refuses to decide on attention back-ends, which is the model's: it is told.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from launch.cluster import HostsCluster
from launch.hostfile import Host
from launch.preflight import rules
from launch.preflight.checks import Check, Report
from launch.preflight.facts import collect, read_config, standing, write_error
from launch.preflight.rules import Asked, Facts

if TYPE_CHECKING:
    from cpt.config import RunConfig

PYTHON = (3, 11)
DRIVER_FOR = {"11": 450, "12": 525, "13": 580}  # the first that runs programs of this CUDA
HERE = "this machine"
HEART = ("torch", "deepspeed", "transformers")
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Values that cost nothing are left out.
HURTFUL: Mapping[str, tuple[tuple[str, ...], str]] = {
    "CUDA_LAUNCH_BLOCKING": (("1",), "every kernel is waited for"),
    "NCCL_P2P_DISABLE": (("1",), "GPUs talk through the host's memory"),
    "NCCL_SHM_DISABLE": (("1",), "ranks of one host talk through the network"),
    "NCCL_IB_DISABLE": (("1",), "InfiniBand is not used"),
    "NCCL_DEBUG": (("INFO", "TRACE"), "floods the output"),
    "TORCH_DISTRIBUTED_DEBUG": (("DETAIL",), "checks every collective call, slowly"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (("1",), "every tensor is allocated by the driver"),
    "TORCH_COMPILE_DISABLE": (("1",), "train.compile does nothing"),
}
ONE_HOST_RULES = (rules.gpu_health, rules.memory, rules.limits)
JOB_RULES = (rules.run_folder, rules.disk, rules.stores, rules.model)


def examine(arguments: Sequence[str] = (), *, attention: Callable[[bool], Check] | None = None) -> Report:
    """Everything about this machine, for a run where ``arguments`` name one (RUN.yaml a.b=c ...).

    ``attention``: told whether there are GPUs, says which back-end ``auto`` is.

    Raises:
        ConfigError: the run file is wrong.
    """
    config = read_config(arguments) if arguments else None
    wanted = stated_requirements()
    facts = {**collect(arguments), "skew_seconds": 0.0}
    asked = Asked(HostsCluster(), (Host(HERE, (0,)),), code="", config="", programs=frozenset())
    checks = [
        python_check(sys.version_info[:3]),
        packages_check(wanted),
        torch_check(facts),
        gpu_check(facts),
        *([attention(bool(facts["gpus"]))] if attention else []),
        extras_check(wanted, has_gpus=bool(facts["gpus"])),
        compiler_check(missing_to_compile(), wanted=config is not None and config.deepspeed.offload == "nvme"),
        *(rule(asked, {HERE: facts}) for rule in ONE_HOST_RULES),
        *_folder_checks(asked, facts, config),
        launchers_check(facts["programs"]),
        environment_check(os.environ, num_gpus=len(facts["gpus"]), cpus=facts["cpus"]),
    ]
    return Report([_without_host(check) for check in checks], {"facts": facts})


def _folder_checks(asked: Asked, facts: Facts, config: "RunConfig | None") -> list[Check]:
    if config is None:
        return [runs_check(Path("runs"))]
    return [rule(asked, {HERE: facts}) for rule in JOB_RULES]


def _without_host(check: Check) -> Check:
    """There is one host: what is told of it is what was found."""
    if HERE not in check.hosts:
        return check
    return Check(check.name, check.status, f"{check.found}: {check.hosts[HERE]}", check.fix, fault=check.fault)


# --- software ---------------------------------------------------------------------------------------------------------


def python_check(found: Sequence[int]) -> Check:
    shown = f"{'.'.join(map(str, found))}, {sys.executable}"
    if tuple(found[:2]) >= PYTHON:
        return Check("Python", "pass", shown)
    return Check("Python", "fail", shown, f"make a virtual environment of Python {'.'.join(map(str, PYTHON))} or later")


def stated_requirements(name: str = "cpt") -> list[str]:
    """What the installed distribution asks for; the packages at its heart where it is not installed but in the path."""
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return list(HEART)


def packages_check(wanted: Iterable[str]) -> Check:
    """What cpt cannot do without, against the ranges that it states."""
    required = [one for one in map(Requirement, wanted) if one.marker is None]
    wrong = [f"{one.name} {found or 'is missing'}" for one in required if not _fits(one, found := installed(one.name))]
    names = [f"{name} {installed(name)}" for name in HEART]
    if not wrong:
        return Check("packages", "pass", f"{', '.join(names)}, and {max(0, len(required) - len(HEART))} more")
    asked = " ".join(f"'{one}'" for one in required if not _fits(one, installed(one.name)))
    return Check("packages", "fail", ", ".join(wrong), f"pip install {asked}")


def _fits(required: Requirement, found: str | None) -> bool:
    return found is not None and required.specifier.contains(found, prereleases=True)


def installed(name: str) -> str | None:
    """The version of a distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def extras_check(wanted: Iterable[str], *, has_gpus: bool) -> Check:
    """Optional packages, by the extra that brings them; on a GPU those that make it fast are missed."""
    by_extra: dict[str, list[str]] = {"flash": [], "data": [], "eval": []}
    for one in map(Requirement, wanted):
        for extra, missing in by_extra.items():
            optional = one.marker is not None and not one.marker.evaluate({"extra": ""})
            if optional and one.marker.evaluate({"extra": extra}) and installed(one.name) is None:  # type: ignore[union-attr]
                missing.append(one.name)
    lacking = {extra: missing for extra, missing in by_extra.items() if missing}
    found = "; ".join(f"{extra}: {', '.join(missing)}" for extra, missing in lacking.items())
    fix = "; ".join(f"pip install 'cpt[{extra}]'" for extra in lacking if extra != "flash" or has_gpus)
    missed = has_gpus and bool(by_extra["flash"])
    return Check("optional packages", "warn" if missed else "pass", f"without {found}" if found else "all there", fix)


def missing_to_compile() -> list[str]:
    """What DeepSpeed's async_io extension, the one that cpt may need built, is built with and is not here."""
    missing = [tool for tool in ("g++",) if shutil.which(tool) is None]
    missing += [] if shutil.which("ninja") or find_spec("ninja") else ["ninja"]
    missing += [] if Path(sysconfig.get_path("include"), "Python.h").is_file() else ["Python.h (python3-dev)"]
    folders = (Path("/usr/include"), Path("/usr/local/include"), Path(sys.prefix, "include"))
    missing += [] if any((folder / "libaio.h").is_file() for folder in folders) else ["libaio.h (libaio-dev)"]
    return missing


def compiler_check(missing: Sequence[str], *, wanted: bool) -> Check:
    use = "deepspeed.offload=nvme (async_io)"
    if not missing:
        return Check("DeepSpeed ops", "pass", f"what {use} compiles can be built")
    found = f"{use} cannot be built: no {', '.join(missing)}"
    fix = "apt-get install g++ ninja-build python3-dev libaio-dev, or deepspeed.offload=cpu"
    return Check("DeepSpeed ops", "fail" if wanted else "pass", found, fix if wanted else "")


# --- GPUs -------------------------------------------------------------------------------------------------------------


def torch_check(facts: Facts) -> Check:
    """The build of torch against the driver: a GPU that torch cannot use is the commonest fault of a new machine."""
    cuda, nccl, gpus = facts["versions"]["cuda"], facts["versions"]["nccl"], facts["gpus"]
    if facts["versions"]["torch"] is None:
        return Check("torch", "fail", "not installed", "pip install torch")
    if cuda is None:
        found = f"{facts['versions']['torch']}, built for CPUs"
        fix = "install torch built for the driver's CUDA; a CPU build trains on CPUs only"
        return Check("torch", "fail", f"{found}, and there are GPUs", fix) if gpus else Check("torch", "pass", found)
    found = f"{facts['versions']['torch']} for CUDA {cuda}" + (f", NCCL {nccl}" if nccl else "")
    if not gpus:
        return Check("torch", "pass", found)
    driver, least = str(gpus[0]["driver_version"]), DRIVER_FOR.get(cuda.partition(".")[0], 0)
    major = driver.partition(".")[0]
    if major.isdecimal() and int(major) < least:  # nvidia-smi may say [N/A]
        fix = f"install driver {least} or later, or torch built for an older CUDA"
        return Check("torch", "fail", f"{found}, driver {driver}", fix)
    return Check("torch", "pass", f"{found}, driver {driver}")


def gpu_check(facts: Facts) -> Check:
    if facts["gpu_error"]:
        return Check("GPUs", "fail", f"nvidia-smi: {facts['gpu_error']}", "look at `dmesg`; restart the machine")
    if facts["gpus"]:
        return Check("GPUs", "pass", rules.kinds_of(facts))
    if facts["versions"]["cuda"]:
        return Check(
            "GPUs", "warn", "none, and torch is built for them", "install the driver; in a container: --gpus all"
        )
    return Check("GPUs", "pass", "none: ranks run on CPUs")


# --- surroundings -----------------------------------------------------------------------------------------------------


def runs_check(folder: Path) -> Check:
    """Where run folders go by default: writable, with room."""
    if error := write_error(folder):
        return Check("disk", "fail", f"{folder.absolute()}: {error}", "work in a folder you own, or set run.dir")
    free = shutil.disk_usage(standing(folder.absolute())).free
    found = f"{folder.absolute()}: {free / rules.GIGA:,.0f} GB free"
    if free >= rules.RUN_BYTES_DOUBTFUL:
        return Check("disk", "pass", found)
    status: Any = "fail" if free < rules.RUN_BYTES_LEAST else "warn"
    return Check("disk", status, found, "free some, or set run.dir to another disk")


def launchers_check(programs: Mapping[str, str | None]) -> Check:
    """For several machines; one needs none of them."""
    there = [name for name in ("ssh", "pdsh", "sbatch", "kubectl") if programs.get(name) or shutil.which(name)]
    kinds = {
        "several hosts": {"ssh"} <= set(there),
        "Slurm": "sbatch" in there,
        "Kubernetes": "kubectl" in there,
    }
    able = ", ".join(name for name, works in kinds.items() if works)
    found = f"{', '.join(there) or 'none'}" + (f": can start jobs on {able}" if able else "")
    if "ssh" in there and "pdsh" not in there:
        return Check("launchers", "warn", found, "for several hosts: apt-get install pdsh, or launcher: ssh")
    fix = "" if able else "only for several hosts: apt-get install openssh-client pdsh"
    return Check("launchers", "pass" if able else "warn", found, fix)


def environment_check(environment: Mapping[str, str], *, num_gpus: int, cpus: int) -> Check:
    """Variables that slow a run down or lead it astray. Threads per rank need none: launchers state them."""
    told = {name: why for name, (values, why) in HURTFUL.items() if environment.get(name, "").upper() in values}
    if all(name in environment for name in PLACES[:3]):
        told["RANK"] = "cpt train would wait for the other ranks of a job"
    if num_gpus and environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        told["CUDA_VISIBLE_DEVICES"] = "hides the GPUs"
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > cpus:
        told["OMP_NUM_THREADS"] = f"more threads than the {cpus} CPUs there are, in every rank"
    if not told:
        return Check("environment", "pass", "no variable that hurts")
    names = [*told, *(PLACES[1:] if "RANK" in told else ())]
    found = "; ".join(f"{name}: {why}" for name, why in told.items())
    return Check("environment", "warn", found, f"unset {' '.join(names)}")
