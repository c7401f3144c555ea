"""What must hold of the hosts of a job, and between them: one function per rule, from their facts to a check.

Pure: everything that is looked at comes with ``launch.preflight.facts`` and ``Asked``. A new rule is a function and its
entry in ``RULES``. Values are told by host only where they differ or are wrong.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launch.cluster import HostsCluster
from launch.hostfile import Host
from launch.preflight.checks import Check, Status

MUST_AGREE = ("torch", "cuda", "nccl", "deepspeed", "transformers")
GIGA, GIBI, MIBI = 1e9, 1 << 30, 1 << 20
RUN_BYTES_LEAST, RUN_BYTES_DOUBTFUL, STORE_BYTES_DOUBTFUL = 1e9, 20e9, 1e9
SKEW_DOUBTFUL, SKEW_MOST = 2.0, 300.0  # seconds
HOT_CELSIUS = 90
FILES_DOUBTFUL = 4096
MEMORY_PER_RANK = 2 << 30
SHORT_HASH = 12
UNLIMITED = 1 << 62

Facts = Mapping[str, Any]
ByHost = Mapping[str, Facts]


@dataclass(frozen=True)
class Asked:
    """What the launching machine knows: the job's hosts, its own code and config, the programs it has. ``interface``:
    that ranks talk over, as stated, else the one that the names of all hosts lead to.
    """

    cluster: HostsCluster
    hosts: tuple[Host, ...]
    code: str
    config: str
    programs: frozenset[str]
    interface: str | None = None


Rule = Callable[[Asked, ByHost], Check]


def judge(asked: Asked, facts: ByHost) -> list[Check]:
    """Every rule's check, in the order of the table; ``facts`` of the hosts that answered. What a host with other code
    says may mean something else: of that one only its code is judged.
    """
    alike = same_code(asked.code, facts)
    known = ((rule, facts if rule in (launcher, code) else alike) for rule in RULES)
    return [rule(asked, its) for rule, its in known if its]


def same_code(own: str, facts: ByHost) -> ByHost:
    """Of the hosts that have the launching machine's code."""
    return {host: its for host, its in facts.items() if its["code"] == own}


def launcher(asked: Asked, facts: ByHost) -> Check:
    needed = {"pdsh": ("pdsh", "ssh"), "ssh": ("ssh",), "no_ssh": ()}[asked.cluster.launcher]
    missing = [name for name in needed if name not in asked.programs]
    if not missing:
        return Check("launcher", "pass", asked.cluster.launcher)
    fix = f"apt-get install {' '.join('openssh-client' if name == 'ssh' else name for name in missing)}"
    fix += ", or set launcher: ssh" if missing == ["pdsh"] else ""
    return Check("launcher", "fail", f"this machine has no {' and no '.join(missing)}", fix)


def code(asked: Asked, facts: ByHost) -> Check:
    values = {host: str(its["code"])[:SHORT_HASH] for host, its in facts.items()}
    fix = "install the same version there, or start it from storage that all hosts share"
    return _equal("code", values, fix, expected=asked.code[:SHORT_HASH], fault="user")


def config(asked: Asked, facts: ByHost) -> Check:
    values = {host: _hash(its["config"]) for host, its in facts.items()}
    fix = "the run file must be the same on every host: put it on shared storage, or copy it"
    return _equal("config", values, fix, expected=asked.config[:SHORT_HASH], fault="user")


def versions(asked: Asked, facts: ByHost) -> Check:
    """Of Python the second number counts; numpy and what comes after that may differ with a warning."""
    first = next(iter(facts.values()))
    usual = {name: _most({host: _version(its, name) for host, its in facts.items()}) for name in _versioned(first)}
    shown = ", ".join(f"{name} {value}" for name, value in usual.items() if value != "None" and name != "cpt")
    missing = [name for name in ("torch", "deepspeed") if usual[name] == "None"]
    if missing:
        return Check("versions", "fail", f"not installed: {', '.join(missing)}", "pip install cpt there", fault="user")
    others: dict[str, str] = {}
    grave = False
    for host, its in facts.items():
        found = {name: value for name in usual if (value := _version(its, name)) != usual[name]}
        grave |= any(_grave(name, value, usual[name]) for name, value in found.items())
        if found:
            others[host] = ", ".join(f"{name} {value}" for name, value in found.items())
    status: Status = "fail" if grave else "warn" if others else "pass"
    fix = "install the same versions on every host: constraints.txt pins them" if others else ""
    return Check("versions", status, shown, fix, others, "user")


def _versioned(facts: Facts) -> tuple[str, ...]:
    return ("python", *facts["versions"])


def _version(facts: Facts, name: str) -> str:
    return str(facts["python"] if name == "python" else facts["versions"][name])


def _grave(name: str, value: str, usual: str) -> bool:
    if name == "python":
        return value.split(".")[:2] != usual.split(".")[:2]
    return name in MUST_AGREE


def gpus(asked: Asked, facts: ByHost) -> Check:
    ill = {host: its["gpu_error"] for host, its in facts.items() if its["gpu_error"]}
    if ill:
        return Check("GPUs", "fail", "nvidia-smi fails", "look at `nvidia-smi` and `dmesg` there; restart it", ill)
    counts = {host: len(its["gpus"]) for host, its in facts.items()}
    if not any(counts.values()):
        built = any(its["versions"]["cuda"] for its in facts.values())
        fix = "install the driver, or the CPU build of torch" if built else ""
        return Check("GPUs", "warn" if built else "pass", "none: ranks run on CPUs", fix)
    kinds = {host: kinds_of(its) for host, its in facts.items()}
    needed = {host.name: max(host.slots) + 1 for host in asked.hosts}
    short = {host: f"{kinds[host]}, slots need {needed[host]}" for host in counts if counts[host] < needed[host]}
    if short:
        fix = "correct slots= in the hostfile (processes_per_host), or restart a host that has lost a GPU"
        return Check("GPUs", "fail", "fewer than slots", fix, short, "user")
    no_cuda = {host: "torch is built for CPUs" for host, its in facts.items() if not its["versions"]["cuda"]}
    if no_cuda:
        return Check("GPUs", "fail", "torch cannot use them", "install torch built for CUDA", no_cuda, "user")
    alike = len(set(kinds.values())) == 1
    found, fix = (next(iter(kinds.values())), "") if alike else ("of several kinds", "the slowest sets the pace of all")
    return Check("GPUs", "pass" if alike else "warn", found, fix, {} if alike else kinds)


def kinds_of(facts: Facts) -> str:
    counted = Counter(f"{gpu['name']} {(gpu['memory.total'] or 0) / 1024:.0f} GiB" for gpu in facts["gpus"])
    return ", ".join(f"{number} x {name}" for name, number in counted.items()) or "none"


def gpu_health(asked: Asked, facts: ByHost) -> Check:
    ill, doubtful = {}, {}
    for host, its in facts.items():
        errors = [gpu["index"] for gpu in its["gpus"] if gpu["ecc.errors.uncorrected.volatile.total"]]
        hot = [f"GPU {g['index']} {g['temperature.gpu']} C" for g in its["gpus"] if _is_hot(g)]
        busy = [f"GPU {gpu['index']} process {pid}" for gpu in its["gpus"] for pid in gpu["processes"]]
        if errors:
            ill[host] = f"GPU {', '.join(map(str, errors))}: uncorrected memory errors"
        if hot or busy:
            doubtful[host] = ", ".join((*hot, *busy))
    if ill:
        return Check("GPU health", "fail", "memory errors", "reset the GPU (nvidia-smi -r) or leave the host out", ill)
    if doubtful:
        fix = "end processes in the way; a hot GPU slows down: look at its cooling"
        return Check("GPU health", "warn", "hot, or in use", fix, doubtful)
    return Check("GPU health", "pass", "no memory errors, cool, free" if any(_gpus(facts)) else "no GPUs")


def _is_hot(gpu: Facts) -> bool:
    return (gpu["temperature.gpu"] or 0) >= HOT_CELSIUS


def _gpus(facts: ByHost) -> list[Facts]:
    return [gpu for its in facts.values() for gpu in its["gpus"]]


def driver(asked: Asked, facts: ByHost) -> Check:
    values = {host: str(its["gpus"][0]["driver_version"]) for host, its in facts.items() if its["gpus"]}
    if not values:
        return Check("driver", "pass", "no GPUs")
    return _equal("driver", values, "install the same driver on every host", status="warn")


def run_folder(asked: Asked, facts: ByHost) -> Check:
    known = {host: its["run_dir"] for host, its in facts.items() if "run_dir" in its}
    refused = {host: its["error"] for host, its in known.items() if its["error"]}
    if refused:
        fix = "give the user of the job write access, or set run.dir to a folder it can write to"
        return Check("run folder", "fail", "cannot be written to", fix, refused, "user")
    alone = {host: f"{known[host]['path']} is another folder there" for host in known if facts[host]["shared"] is False}
    if alone:
        fix = "set run.dir to a folder on storage that all hosts share, at the same path"
        return Check("run folder", "fail", "not shared", fix, alone, "user")
    return Check("run folder", "pass", ", ".join(sorted({its["path"] for its in known.values()})) or "not known")


def disk(asked: Asked, facts: ByHost) -> Check:
    """The run folder holds checkpoints; indexes of best_fit packing are written beside the stores."""
    runs = {host: (its["run_dir"]["path"], its["free_bytes"]) for host, its in facts.items() if "run_dir" in its}
    free = {host: by_path[path] for host, (path, by_path) in runs.items() if path in by_path}
    others = {host: min(by_path.values()) for host, (_, by_path) in runs.items() if by_path}
    if not free:
        return Check("disk", "warn", "not known", "correct the config or the run folder first")
    fix = "free some, or set run.dir to another disk; checkpoint.keep_last says how many checkpoints are kept"
    full = {host: f"{size / GIGA:.1f} GB" for host, size in free.items() if size < RUN_BYTES_LEAST}
    if full:
        return Check("disk", "fail", "the run folder's disk is full", fix, full)
    low = {host: f"{size / GIGA:.0f} GB for the run" for host, size in free.items() if size < RUN_BYTES_DOUBTFUL}
    low |= {h: f"{size / GIGA:.1f} GB at a store" for h, size in others.items() if size < STORE_BYTES_DOUBTFUL}
    found = f"{min(free.values()) / GIGA:,.0f} GB free for the run"
    return Check("disk", "warn", found, fix, low) if low else Check("disk", "pass", found)


def stores(asked: Asked, facts: ByHost) -> Check:
    known = {host: its["stores"] for host, its in facts.items() if "stores" in its}
    wrong = {
        host: "; ".join(f"{name}: {store['error']}" for name, store in its.items() if "error" in store)
        for host, its in known.items()
    }
    fix = "mount the stores' storage at the same path on every host, or copy them and check with cpt data verify"
    if any(wrong.values()):
        return Check("stores", "fail", "cannot be read", fix, {h: why for h, why in wrong.items() if why}, "user")
    values = {host: _splits(its) for host, its in known.items()}
    usual = _most(values)
    if len(set(values.values())) > 1:
        return Check("stores", "fail", "differ", fix, {h: v for h, v in values.items() if v != usual}, "user")
    names = sorted({name for its in known.values() for name in its})
    return Check("stores", "pass", f"{', '.join(names) or 'none'}: equal hashes", "")


def _splits(stores: Mapping[str, Facts]) -> str:
    return ", ".join(f"{name} {'/'.join(value[:8] for value in store.values())}" for name, store in stores.items())


def model(asked: Asked, facts: ByHost) -> Check:
    values = {host: _hash(its["model"]) for host, its in facts.items() if its.get("model")}
    if not values:
        return Check("weights", "pass", "none, or by a name of the hub")
    return _equal("weights", values, "put model.init_from on shared storage, or copy it to every host", fault="user")


def clock(asked: Asked, facts: ByHost) -> Check:
    skews = {host: float(its["skew_seconds"]) for host, its in facts.items()}
    worst = max(skews.values(), key=abs)
    off = {host: f"{skew:+.1f} s" for host, skew in skews.items() if abs(skew) > SKEW_DOUBTFUL}
    if not off:
        return Check("clock", "pass", f"{worst:+.2f} s from this machine's at most")
    status: Status = "fail" if abs(worst) > SKEW_MOST else "warn"
    return Check("clock", status, "differs from this machine's", "start chrony or systemd-timesyncd there", off)


def port(asked: Asked, facts: ByHost) -> Check:
    found = next((its["port"] for its in facts.values() if its["port"]), None)
    if found is None:
        return Check("port", "warn", "not known: the first host did not answer, or with other code")
    if "error" not in found:
        return Check("port", "pass", f"{found['number']} is free on {asked.hosts[0].name}")
    fix = "set master_port to another one, or end what listens there: ss -ltnp"
    return Check("port", "fail", f"{found['number']} on {asked.hosts[0].name}: {found['error']}", fix, fault="user")


def interface(asked: Asked, facts: ByHost) -> Check:
    name = asked.interface
    if name is None:
        loop = {host: f"{host} is {its['own_address']} to itself" for host, its in facts.items() if _loops(its)}
        if loop and len(asked.hosts) > 1:
            fix = "state the interface in the cluster file: `ip -br address` lists them"
            return Check("interface", "warn", "none stated, and by name ranks would not be found", fix, loop, "user")
        return Check("interface", "pass", "none stated: each host's own name decides")
    lacking = {
        host: f"has {', '.join(its['addresses'])}" for host, its in facts.items() if name not in its["addresses"]
    }
    if lacking:
        fix = "state an interface that has an address on every host: `ip -br address` lists them"
        return Check("interface", "fail", f"{name} has no IPv4 address", fix, lacking, "user")
    chosen = "" if asked.cluster.interface else ", to which the hosts' names lead"
    first = facts.get(asked.hosts[0].name, {}).get("addresses", {}).get(name)
    return Check("interface", "pass", f"{name}{chosen}" + (f"; first host {first}" if first else ""))


def _loops(facts: Facts) -> bool:
    return facts["own_address"] is None or facts["own_address"].startswith("127.") or facts["own_address"] == "::1"


def memory(asked: Asked, facts: ByHost) -> Check:
    ranks = {host.name: len(host.slots) for host in asked.hosts}
    low: dict[str, str] = {}
    for host, its in facts.items():
        least = min(its["memory"]["available"], its["memory"]["limit"] or its["memory"]["available"])
        told = []
        if least < MEMORY_PER_RANK * ranks[host]:
            told.append(f"{least / GIBI:.1f} GiB of memory for {ranks[host]} ranks")
        if its["shm_bytes"] < GIBI and ranks[host] > 1:
            told.append(f"/dev/shm of {its['shm_bytes'] / MIBI:.0f} MiB")
        if told:
            low[host] = ", ".join(told)
    least = min(its["memory"]["available"] for its in facts.values())
    shm = min(its["shm_bytes"] for its in facts.values())
    found = f"{least / GIBI:.0f} GiB free at least, /dev/shm of {shm / GIBI:.1f} GiB"
    fix = "containers: --shm-size 8g (or --ipc=host) and a higher --memory" if low else ""
    return Check("memory", "warn" if low else "pass", found, fix, low)


def limits(asked: Asked, facts: ByHost) -> Check:
    """NCCL over InfiniBand locks memory; each rank opens a socket to every other, and every shard's file."""
    low = {}
    for host, its in facts.items():
        files, locked = its["limits"]["open_files"], its["limits"]["locked_bytes"]
        told = [f"{files} open files"] if files is not None and files < FILES_DOUBTFUL else []
        told += [f"{locked / MIBI:.0f} MiB of locked memory"] if its["gpus"] and locked is not None else []
        if told:
            low[host] = ", ".join(told)
    fix = "ulimit -n 65536 (nofile) and, for InfiniBand, -l unlimited (memlock) in /etc/security/limits.conf"
    fewest = min(its["limits"]["open_files"] or UNLIMITED for its in facts.values())
    found = f"{fewest:,} open files" if fewest < UNLIMITED else "open files unlimited"
    return Check("limits", "warn" if low else "pass", found, fix if low else "", low)


RULES: tuple[Rule, ...] = (
    *(launcher, code, config, versions, gpus, gpu_health, driver, run_folder, disk, stores, model),
    *(clock, port, interface, memory, limits),
)


def _hash(facts: Facts) -> str:
    return str(facts["error"] if "error" in facts else facts["hash"][:SHORT_HASH])


def _most(values: Mapping[str, str]) -> str:
    """The commonest value; of equally common ones the first host's."""
    return Counter(values.values()).most_common(1)[0][0]


def _equal(
    name: str,
    values: Mapping[str, str],
    fix: str,
    *,
    expected: str | None = None,
    status: Status = "fail",
    fault: Literal["user", "environment"] = "environment",
) -> Check:
    """Whether all hosts have the value ``expected``: this machine's, or without one the commonest."""
    wanted = _most(values) if expected is None else expected
    others = {host: value for host, value in values.items() if value != wanted}
    whose = "on most hosts" if expected is None else "here"
    return Check(name, status, f"{wanted} {whose}", fix, others, fault) if others else Check(name, "pass", wanted)
