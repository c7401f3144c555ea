"""How names and values get into manifests: names that Kubernetes takes, values it does not expand, YAML it cannot
misread.

Manifests are dictionaries from end to end, never text with holes, so a value cannot become structure. What is left to
guard is here: ``$(NAME)`` in an argument or a variable, which the kubelet would replace; and plain YAML scalars, which
Kubernetes' reader resolves by other rules than Python's writer (``1e3`` is a number to the one and a word to the
other): every value that is a string is quoted.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import yaml

Manifest = dict[str, Any]
STRING = "tag:yaml.org,2002:str"
WORDS = frozenset({"yes", "off", "true", "false", "null"})  # of more than two letters, which YAML takes for others
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # RFC 1123
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
NAME_CHARS = 52  # of 63: a pod's host name adds "-" and its number, a pod's name five characters more


def object_name(text: str, *, prefix: str = "cpt-") -> str:
    """A name for objects and hosts: ``8B run`` -> ``cpt-8b-run-5a60b8f0``. Other texts give other names: what had to be
    changed ends with a hash of the whole.
    """
    plain = f"{prefix}{text}"
    if LABEL.fullmatch(plain) and len(plain) <= NAME_CHARS:
        return plain
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    words = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[: NAME_CHARS - 9].strip("-")
    return f"{words}-{digest}"


def literal(text: str) -> str:
    """For a container's arguments and variables: the kubelet reads ``$$`` as ``$`` and replaces ``$(NAME)``."""
    return text.replace("$", "$$")


def to_text(manifests: Iterable[Manifest]) -> str:
    """A YAML stream for people and for ``kubectl apply``."""
    return yaml.dump_all(
        manifests, Dumper=_Quoting, sort_keys=False, explicit_start=True, allow_unicode=True, width=10_000
    )


class _Quoting(yaml.SafeDumper):
    """Quotes every string value. Keys are names, checked or our own; a text of many lines stays readable."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        pairs: Mapping[str, object] = mapping
        value = [(self._key(key), self.represent_data(each)) for key, each in pairs.items()]
        return yaml.MappingNode(tag, value, flow_style=False)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = "|" if "\n" in data and _is_plain_text(data) else '"'
        return self.represent_scalar(STRING, data, style=style)

    def _key(self, key: str) -> yaml.ScalarNode:
        style = None if re.fullmatch(r"[A-Za-z][-A-Za-z0-9_./]{2,}", key) and key.lower() not in WORDS else '"'
        return self.represent_scalar(STRING, key, style=style)

    yaml_representers: ClassVar[dict[Any, Any]] = {**yaml.SafeDumper.yaml_representers, str: represent_str}


def _is_plain_text(text: str) -> bool:
    """Lines of printable characters that a block scalar keeps as they are."""
    return all(line.isprintable() and line == line.rstrip() for line in text.split("\n"))
