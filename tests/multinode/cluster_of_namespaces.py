"""Hosts out of namespaces: each has its own network, hostname, processes and mounts, and an sshd with throw-away keys.

    with namespaces(folder, num_hosts=2) as cluster:      # root, iproute2, util-linux, openssh-server; about a second
        cluster.login.run(["ssh", "-F", cluster.ssh_config, "n1", "hostname"])
        cluster.hosts[1].cut()                            # its cable is pulled

Hosts are called n1, n2, ...; their interface is eth0, with 10.99.0.1, 10.99.0.2, ... ``login`` is one more machine on the
same bridge, without sshd, where commands are typed; its processes are this machine's own, so that they can be sent
signals. All share this machine's files, as over a network file system. Nothing of it is in the network of this machine,
and nothing leaves it: the bridge lies in a namespace too. A namespace lives as long as its first process, and the
kernel kills that one when the process that made the cluster ends, however it ends, and with it all of the host. Of what
was typed on ``login`` the kernel ends the command itself; what that has started there is ended by ``close``.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INTERFACE, SUBNET, LOGIN_NUMBER = "eth0", "10.99.0", 200
NEEDED = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "setpriv": "util-linux"}
NEEDED |= {"ssh": "openssh-client", "sshd": "openssh-server", "pdsh": "pdsh"}
LIMIT = 20.0  # seconds for anything that builds or changes the cluster
SLOW_LINK = Path(__file__).with_name("slow_link.py")
# Variables of this shell that would reach the ranks, or tell DeepSpeed something else than the test does.
UNWANTED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
    "SSH_AUTH_SOCK",
)


def missing() -> str | None:
    """Why no cluster can be made here; None: it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need root on Linux"
    absent = sorted({package for command, package in NEEDED.items() if not _which(command)})
    if absent:
        return f"apt-get install {' '.join(absent)}, or run `make test-multinode`"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"


@dataclass
class Host:
    """A machine of the cluster. ``init``: its first process, as this machine numbers it."""

    name: str
    address: str
    init: int
    cluster: "Cluster"
    shaper: subprocess.Popen[bytes] | None = None

    def command(self, command: Sequence[object]) -> list[str]:
        """``command`` as it is run on this host from outside. On ``login`` the process itself, not a parent of it."""
        kinds = ["-n", "-u", "-m"] if self.name == "login" else ["-n", "-u", "-m", "-i", "-p"]
        folder = f"--wdns={self.cluster.folder}"
        within = ["nsenter", "-t", str(self.init), *kinds, folder, "--"]
        return ["setpriv", "--pdeathsig", "KILL", "--", *within, *map(str, command)]

    def start(self, command: Sequence[object], **options: Any) -> subprocess.Popen[str]:
        """As a process in a session of its own, output in one stream."""
        settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = {**_environment(), **options.pop("env", {})}
        return subprocess.Popen(self.command(command), env=env, start_new_session=True, **{**settings, **options})

    def run(self, command: Sequence[object], *, timeout: float = LIMIT, **options: Any) -> tuple[int, str]:
        """Exit code and output. Raises subprocess.TimeoutExpired; what was started is killed then."""
        process = self.start(command, **options)
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as late:
            self.kill_all()
            late.output, _ = process.communicate()
            raise
        return process.returncode, out

    def do(self, *command: object) -> str:
        """A command that must succeed."""
        code, out = self.run(command)
        if code != 0:
            raise RuntimeError(f"{self.name}: {shlex.join(map(str, command))} ended with {code}: {out}")
        return out

    def cut(self) -> None:
        """Pull the cable: the host keeps its address and sees its carrier go."""
        self.cluster.switch("ip", "link", "set", f"to-{self.name}", "down")

    def mend(self) -> None:
        self.cluster.switch("ip", "link", "set", f"to-{self.name}", "up")

    def slow_down(self, *, milliseconds: int, loss_percent: float) -> str:
        """What it sends arrives so much later, and some of it never. By `tc netem`; where the kernel has none, by a
        process between two taps. Returns which of both.
        """
        netem = ["tc", "qdisc", "replace", "dev", INTERFACE, "root", "netem", "delay", f"{milliseconds}ms"]
        code, _ = self.run([*netem, "loss", f"{loss_percent}%"])
        if code == 0:
            return "netem"
        known = json.loads(self.do("ip", "-j", "link", "show", INTERFACE))[0]["address"]  # by others, for minutes
        self.do("ip", "link", "del", INTERFACE)  # and with it the switch's end
        into = ["nsenter", "-t", str(self.cluster.bridge), "-n", "--"]
        arguments = [f"to-{self.name}", f"{self.name}-new", str(milliseconds), str(loss_percent)]
        self.shaper = _spawn([*into, sys.executable, str(SLOW_LINK), *arguments])
        self.cluster.processes.append(self.shaper)
        _until(lambda: f"{self.name}-new" in self.cluster.switch("ip", "-br", "link"), "the slow link's taps")
        self.cluster.switch("ip", "link", "set", f"to-{self.name}", "master", "bridge", "up")
        self.cluster.switch("ip", "link", "set", f"{self.name}-new", "address", known)
        self.cluster.switch("ip", "link", "set", f"{self.name}-new", "netns", self.init, "name", INTERFACE)
        self.cluster.address(self)
        return "tap"

    def replace_file(self, path: Path, text: str) -> None:
        """Show other content at ``path`` on this host alone."""
        other = self.cluster.folder / f"{self.name}_{path.name}"
        other.write_text(text, encoding="utf-8")
        self.do("mount", "--bind", other, path)

    def processes(self) -> dict[int, str]:
        """What runs on it besides its sshd: number on this machine and command line."""
        network = os.readlink(f"/proc/{self.init}/ns/net")
        found = {}
        for folder in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                if int(folder.name) == self.init or os.readlink(folder / "ns/net") != network:
                    continue
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if words and not words.startswith(("sshd:", "unshare ")):  # a zombie has none
                    found[int(folder.name)] = words
        return found

    def kill_all(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass
class Cluster:
    """The hosts, the machine where commands are typed, and how ssh gets there."""

    folder: Path
    ssh_config: Path
    bridge: int  # process that holds the switch's namespace
    hosts: list[Host] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def login(self) -> Host:
        return self._login

    def switch(self, *command: object) -> str:
        """A command in the switch's network."""
        words = ["nsenter", "-t", str(self.bridge), "-n", "--", *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def address(self, host: Host) -> None:
        for words in (f"addr add {host.address}/24 dev {INTERFACE}", f"link set {INTERFACE} up"):
            host.do("ip", *words.split())

    def hostfile(self, *slots: int) -> Path:
        """``n1 slots=..`` for as many hosts as there are numbers."""
        lines = [f"{host.name} slots={count}\n" for host, count in zip(self.hosts, slots, strict=False)]
        path = self.folder / f"hostfile_{'_'.join(map(str, slots))}"
        path.write_text("".join(lines), encoding="utf-8")
        return path

    def left_over(self, words: str = "") -> dict[str, list[str]]:
        """Command lines that still run on any host, login included."""
        found = {host.name: [each for each in host.processes().values() if words in each] for host in self.everyone}
        return {name: lines for name, lines in found.items() if lines}

    def wait_until_idle(self, seconds: float) -> dict[str, list[str]]:
        """What still runs after so long at most; empty as soon as nothing does."""
        deadline = time.monotonic() + seconds
        while (found := self.left_over()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    @property
    def everyone(self) -> list[Host]:
        return [*self.hosts, self.login]

    def close(self) -> None:
        """Killing a host's first process ends the host, and its interfaces with it."""
        with suppress(AttributeError):
            self.login.kill_all()
        for process in reversed(self.processes):
            process.kill()
        for process in self.processes:
            process.wait(timeout=LIMIT)
        _until(lambda: all(is_gone(host.init) for host in self.hosts), "the hosts' end")


@contextmanager
def namespaces(folder: Path, *, num_hosts: int) -> Iterator[Cluster]:
    """A cluster whose files (keys, ssh's configuration, logs) lie in ``folder``.

    Raises:
        RuntimeError: something of it could not be made; all of it is taken down again.
    """
    names = [f"n{number}" for number in range(1, num_hosts + 1)]
    ssh_config = _write_files(folder, names)
    holder = _spawn(["unshare", "--net", "--", "sleep", "infinity"])
    cluster = Cluster(folder, ssh_config, holder.pid, processes=[holder])
    try:
        _until(lambda: _differs(holder.pid, "net"), "the switch")
        cluster.switch("ip", "link", "add", "bridge", "type", "bridge")
        cluster.switch("ip", "link", "set", "bridge", "up")
        _add_hosts(cluster, names)
        yield cluster
    finally:
        cluster.close()


def _add_hosts(cluster: Cluster, names: Sequence[str]) -> None:
    hosts = dict(enumerate(names, start=1)) | {LOGIN_NUMBER: "login"}
    started = {number: _start_host(cluster, name) for number, name in hosts.items()}
    cluster.processes += started.values()
    for number, name in hosts.items():
        init = _first_process(started[number], private_processes=name != "login")
        host = Host(name, f"{SUBNET}.{number}", init, cluster)
        link = f"add to-{name} mtu 1500 type veth peer name {INTERFACE} netns {init}"
        cluster.switch("ip", "link", *link.split())
        cluster.switch("ip", "link", "set", f"to-{name}", "master", "bridge", "up")
        cluster.address(host)
        if name == "login":
            cluster._login = host  # type: ignore[attr-defined]
        else:
            cluster.hosts.append(host)
    for host in cluster.hosts:
        _until(lambda host=host: _listens(host.init, 22), f"sshd on {host.name}, see {cluster.folder}/{host.name}.log")


def _start_host(cluster: Cluster, name: str) -> subprocess.Popen[bytes]:
    kinds = ["--net", "--uts", "--mount"]
    if name != "login":
        kinds += ["--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
    script = ["sh", str(cluster.folder / "host.sh"), name]
    return _spawn(["unshare", *kinds, "--", *script], log=cluster.folder / f"{name}.log")


def _first_process(process: subprocess.Popen[bytes], *, private_processes: bool) -> int:
    """Once it is in its namespaces: the process itself, or its only child where processes have a namespace too."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if private_processes:
        _until(lambda: children.read_text().split(), "a host's first process")
    pid = int(children.read_text().split()[0]) if private_processes else process.pid
    _until(lambda: _differs(pid, "net") and _differs(pid, "uts") and _differs(pid, "mnt"), "a host's namespaces")
    return pid


HOST_SCRIPT = """\
set -e
hostname "$1"
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
if [ "$1" = login ]; then exec sleep infinity; fi
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec {sshd} -D -e -f {folder}/sshd_config
"""
SSHD_CONFIG = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
AcceptEnv none
PidFile none
MaxStartups 100
"""
SSH_CONFIG = """\
Host *
  User root
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  BatchMode yes
"""


def _write_files(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for key in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "throw-away", "-f", str(folder / key)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=LIMIT)
    host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    addresses = [f"{SUBNET}.{number} {name}" for number, name in enumerate(names, start=1)]
    texts = {
        "hosts": "\n".join(["127.0.0.1 localhost", *addresses, f"{SUBNET}.{LOGIN_NUMBER} login", ""]),
        "known_hosts": "".join(
            f"{name},{address.split()[0]} {host_key}\n" for name, address in zip(names, addresses, strict=True)
        ),
        "host.sh": HOST_SCRIPT.format(folder=shlex.quote(str(folder)), sshd=_which("sshd")),
        "sshd_config": SSHD_CONFIG.format(folder=folder),
        "ssh_config": SSH_CONFIG.format(folder=folder),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "ssh_config"


def _spawn(command: Sequence[str], log: Path | None = None) -> subprocess.Popen[bytes]:
    """Killed by the kernel when this process ends, however it ends."""
    output: Any = log.open("ab") if log else subprocess.DEVNULL
    words = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


def _environment() -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    path = f"{Path(sys.executable).parent}:{kept.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _which(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def is_gone(pid: int) -> bool:
    """There is no such process, or only its entry."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _differs(pid: int, kind: str) -> bool:
    return os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def _listens(pid: int, port: int) -> bool:
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


def _until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not there within {LIMIT:.0f} s")
        time.sleep(0.01)
