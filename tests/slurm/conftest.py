"""A real Slurm of two virtual nodes on this machine, in a folder of its own, that leaves nothing behind.

munged, slurmctld and one slurmd per node run in the foreground as children of the tests, with ports, keys and state of
their own, so a Slurm that the machine may have is not touched. Nothing listens outside: controller and nodes are bound
to the loopback address. There is no accounting, as on many small clusters.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "setpriv")
NODES = ("n1", "n2")
SECONDS = 300.0  # of each wait: the daemons, the ranks and other tests share two cores

CONFIGURATION = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={n1}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=15
MinJobAge=300
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=4 RealMemory=65536 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=4 RealMemory=65536 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF OverSubscribe=EXCLUSIVE State=UP
"""


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class Slurm:
    """The daemons and how to ask them; ``environment`` makes sbatch and the others find this cluster."""

    root: Path
    environment: Mapping[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=dict(self.environment), capture_output=True, text=True, timeout=60, check=False
        )

    def state(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED`` ...; of an array its tasks' states, comma-separated."""
        words = self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").stdout.split()
        return ",".join(words)

    def wait(self, what: str, true: Callable[[], bool], seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}\n{self.told()}"
            time.sleep(0.2)

    def told(self) -> str:
        shown = [self.ask("squeue", "--states=all").stdout]
        shown += [f"{path.name}: {path.read_text(errors='replace')[-3000:]}" for path in self.root.glob("*.log")]
        return "\n".join(shown)

    def start(self, *command: str) -> None:
        command = ("setpriv", "--pdeathsig", "TERM", *command)  # should the tests themselves be killed
        log = (self.root / f"{command[3]}.out").open("ab")
        with log:
            self.daemons.append(
                subprocess.Popen(command, env=dict(self.environment), stdout=log, stderr=log, start_new_session=True)
            )

    def end(self) -> None:
        """Every job, then every daemon; whatever still runs is killed."""
        with suppress(Exception):
            self.ask("scancel", "--user=root")
            self.wait("no job", lambda: not self.ask("squeue", "--noheader").stdout.strip(), 30.0)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two idle nodes ``n1`` and ``n2``; partitions ``main`` and ``urgent``, whose jobs preempt those of ``main``."""
    if not os.environ.get("CPT_TEST_SLURM"):
        pytest.skip("run by `make test-slurm`, which installs what is needed")
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip(f"needs root and Slurm's packages ({', '.join(missing) or 'there'}): make test-slurm")
    root = tmp_path_factory.mktemp("slurm")
    ports = dict(zip(("controller", *NODES), free_ports(1 + len(NODES)), strict=True))
    host = socket.gethostname().split(".")[0]
    (root / "state").mkdir()
    (root / "slurm.conf").write_text(CONFIGURATION.format(root=root, host=host, **ports))
    (root / "munge.key").write_bytes(secrets.token_bytes(128))
    (root / "munge.key").chmod(0o400)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SQUEUE"))}
    cluster = Slurm(root, {**kept, "SLURM_CONF": str(root / "slurm.conf")})
    try:
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        named = [f"--{option}={root / name}" for option, name in {**names, "seed-file": "munge.seed"}.items()]
        cluster.start("munged", "--foreground", "--force", "--num-threads=2", *named)
        cluster.wait("munged", (root / "munge.socket").exists, 20)
        cluster.start("slurmctld", "-D", "-f", str(root / "slurm.conf"))
        for node in NODES:
            (root / f"spool.{node}").mkdir()
            cluster.start("slurmd", "-D", "-N", node, "-f", str(root / "slurm.conf"))
        cluster.wait(
            "two idle nodes", lambda: cluster.ask("sinfo", "-hN", "-pmain", "-o%t").stdout.split() == ["idle"] * 2, 60
        )
        yield cluster
    finally:
        cluster.end()
