"""`cpt launch` on hosts that are namespaces: the files it is given, and what it leaves. For tests and benchmarks."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster_of_namespaces import INTERFACE, Cluster, Host

from launch.run_folder import newest_step

Workshop = Any  # of tests/conftest.py
STEPS = 30
FIELDS = {
    "train.tokens": STEPS * 2048,
    "train.global_batch_tokens": 2048,
    "train.micro_batch_size": 8,
    "checkpoint.every_steps": 5,
    "checkpoint.keep_last": 3,
    "guard.hang_seconds": 6.0,
}
ON_THE_RANKS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
LIMIT = 150.0


@dataclass
class Site:
    """A cluster, and a workshop whose folder all of its hosts see."""

    shop: Workshop
    cluster: Cluster

    def cluster_file(self, *slots: int, **fields: Any) -> Path:
        """Over the first hosts, with so many slots each."""
        raw = {
            "kind": "hosts",
            "hostfile": str(self.cluster.hostfile(*slots)),
            "interface": INTERFACE,
            "ssh_options": ["-F", str(self.cluster.ssh_config)],
            "env": ON_THE_RANKS,
            **fields,
        }
        path = self.shop.root / "cluster.yaml"
        path.write_text(json.dumps(raw, indent=1), encoding="utf-8")  # JSON is YAML
        return path

    def run_file(self, name: str, **fields: Any) -> Path:
        return Path(self.shop.run_file(name, {**FIELDS, **fields}))

    def start(self, *arguments: object, host: Host | None = None) -> "subprocess.Popen[str]":
        """`cpt ARGUMENTS`, typed on the login machine or on a host."""
        return (host or self.cluster.login).start([sys.executable, "-m", "cpt.cli", *arguments])

    def cpt(self, *arguments: object, seconds: float = LIMIT) -> tuple[int, str]:
        """The same to its end: exit code and output."""
        return self.end_of(self.start(*arguments), seconds)

    def end_of(self, process: "subprocess.Popen[str]", seconds: float = LIMIT) -> tuple[int, str]:
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for host in self.cluster.everyone:
                host.kill_all()
            raise AssertionError(f"not ended within {seconds:.0f} s:\n{process.communicate()[0]}") from None
        return process.returncode, out

    def hosts_of_ranks(self, name: str) -> list[str]:
        """By rank, as the ranks themselves say."""
        beats = sorted((self.shop.run_dir(name) / "heartbeats").glob("rank_*.json"))
        return [json.loads(path.read_text())["host"] for path in beats]

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.shop.events(name) if event["event"] == kind]

    def newest_complete(self, name: str) -> int:
        return newest_step(self.shop.run_dir(name)) or 0
