"""What a Kubernetes cluster file must fulfil beyond the type of each field: names that the API takes, mounts that do
not cover one another, memory that holds what it must.

Owns the rules. Tells all problems, not the first.
"""

import re
from collections.abc import Iterable, Mapping

from cpt.problems import Problem
from launch.cluster import KubernetesCluster, exported
from launch.kube.text import LABEL, LABEL_VALUE, QUALIFIED, SUBDOMAIN

OWN = ("/tmp", "/dev/shm", "/etc/cpt", "/etc/cpt-ssh")  # what the pods mount themselves
DECIMAL = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
TOLERATION = ("key", "operator", "value", "effect")
MAX_NODES = 100_000  # of an Indexed Job with a pod failure policy


def problems_of(cluster: KubernetesCluster, shell: Mapping[str, str]) -> list[Problem]:
    """Everything that Kubernetes would refuse, or that would end every pod. ``shell``: this shell's variables."""
    found = [*_names(cluster), *_mounts(cluster), *_variables({**exported(cluster, shell), **cluster.env})]
    if amount(cluster.shared_memory) >= amount(cluster.memory):
        rule = f"must be less than memory ({cluster.memory}), which it is part of"
        found.append(Problem("shared_memory", cluster.shared_memory, rule))
    if cluster.nodes > MAX_NODES:
        found.append(Problem("nodes", cluster.nodes, f"must be {MAX_NODES:,} at most"))
    return found


def amount(quantity: str) -> float:
    """``8Gi`` -> 8589934592.0"""
    number = quantity.rstrip("mkKMGTi")
    return float(number) * {**DECIMAL, **BINARY}[quantity.removeprefix(number)]


def _names(cluster: KubernetesCluster) -> Iterable[Problem]:
    word = "small letters, digits and -, 63 at most, with a letter or digit at both ends"
    if not LABEL.fullmatch(cluster.namespace) or len(cluster.namespace) > 63:
        yield Problem("namespace", cluster.namespace, f"must be {word}")
    if not re.fullmatch(r"[^\s\x00-\x1f]+", cluster.image):
        yield Problem("image", cluster.image, "must be the name of an image, without spaces")
    for number, mount in enumerate(cluster.mounts):
        if not SUBDOMAIN.fullmatch(mount.source) or len(mount.source) > 253:
            rule = "must be the name of a PersistentVolumeClaim: small letters, digits, - and ."
            yield Problem(f"mounts.{number}.source", mount.source, rule)
    for key, value in cluster.node_selector.items():
        if not (QUALIFIED.fullmatch(key) and LABEL_VALUE.fullmatch(value)):
            yield Problem(f"node_selector.{key}", value, "must be a label of a node: NAME or DOMAIN/NAME, and a value")
    for number, toleration in enumerate(cluster.tolerations):
        for key, value in toleration.items():
            if key not in TOLERATION or not re.fullmatch(r"[-A-Za-z0-9_./]*", value):
                yield Problem(f"tolerations.{number}.{key}", value, f"known are {', '.join(TOLERATION)}")


def _mounts(cluster: KubernetesCluster) -> Iterable[Problem]:
    targets = [_plain(mount.target) for mount in cluster.mounts]
    for number, (mount, target) in enumerate(zip(cluster.mounts, targets, strict=True)):
        field = f"mounts.{number}.target"
        if ":" in target or ".." in target.split("/") or target == "/" or not target.isprintable():
            yield Problem(field, mount.target, "must be a folder of the container, without .. and :, and not /")
        if any(_covers(own, target) or _covers(target, own) for own in OWN):
            yield Problem(field, mount.target, f"is taken: the pods mount {', '.join(OWN)} themselves")
        if target in targets[:number]:
            yield Problem(field, mount.target, "is the target of another mount")


def _plain(folder: str) -> str:
    """``//data/./x/`` -> ``/data/x``"""
    return "/" + "/".join(part for part in folder.split("/") if part not in ("", "."))


def _covers(folder: str, other: str) -> bool:
    return other == folder or other.startswith(f"{folder}/")


def _variables(found: Mapping[str, str]) -> Iterable[Problem]:
    for name, value in found.items():
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            yield Problem(f"env.{name}", value, "holds a character that no variable can: NUL or half of a pair")
