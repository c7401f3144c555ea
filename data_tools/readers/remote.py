"""Files behind URLs (s3://, gs://, hdfs://, memory://, ...) through fsspec; ``file://`` is the local path it names.

Drivers raise exceptions of their own kinds (botocore's are no OSError), so every call into one goes through
``driver_errors``, which says what could not be reached and what to check.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from cpt.rundir import DataError
from data_tools.readers.records import HUB_PREFIX

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def is_url(name: str) -> bool:
    return bool(_URL.match(name)) and not name.startswith((HUB_PREFIX, "file://"))


def local_name(name: str) -> str:
    return name.removeprefix("file://")


@contextlib.contextmanager
def driver_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (DataError, RuntimeError):
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; fix: check the bucket and the path") from None
    except Exception as error:  # each driver has a hierarchy of its own
        problem = f"{type(error).__name__}: {str(error)[:200]}"
        raise RuntimeError(f"{name}: cannot be reached ({problem}); fix: check network, credentials, path") from error


def filesystem_of(name: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it).

    Raises:
        DataError: a protocol that fsspec does not know.
        RuntimeError: the protocol's driver is not installed; says which package to install.
    """
    import fsspec

    protocol = name.split("://", 1)[0]
    if protocol not in fsspec.available_protocols():
        raise DataError(f"{name}: unknown protocol {protocol}://; fix: s3://, gs://, hdfs://, ... or a local path")
    try:
        with driver_errors(name):
            filesystem, path = fsspec.url_to_fs(name)
    except RuntimeError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        package = _PACKAGES.get(protocol)
        fix = f"pip install {package}" if package else str(error.__cause__)
        raise RuntimeError(f"{name}: the driver for {protocol}:// is missing; fix: {fix}") from error
    return filesystem, path


def expand_url(pattern: str) -> list[str]:
    """URLs that match, sorted; a pattern without magic is itself."""
    if not re.search(r"[*?[]", pattern):
        return [pattern]
    filesystem, path = filesystem_of(pattern)
    with driver_errors(pattern):
        return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))


def url_size(name: str) -> int:
    filesystem, path = filesystem_of(name)
    with driver_errors(name):
        facts = filesystem.info(path)
    if facts.get("type") == "directory":
        raise DataError(f"{name}: a folder; fix: name its files, e.g. {name.rstrip('/')}/*.jsonl.zst")
    return int(facts.get("size") or 0)


def open_url(name: str) -> BinaryIO:
    filesystem, path = filesystem_of(name)
    with driver_errors(name):
        return cast(BinaryIO, filesystem.open(path, "rb"))
