"""URLs of remote storage (fsspec): what is allowed in one, and whether the package behind it is here."""

from __future__ import annotations

import re
from importlib.util import find_spec

from megatron_scratch.util.errors import UserError, nearest

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # protocol -> the extra of this package that brings it
LOST = ("memory", "data")  # what is put there ends with the process


def is_url(word: str) -> bool:
    """`s3://bucket/prefix` and the like; everything else is a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(:|//)", word) is not None


def check_url(key: str, url: str) -> None:
    """Refuse what cannot be a place for checkpoints. Nothing is connected to.

    Args:
        key: what the user wrote it behind, for the message; may be empty.

    Raises:
        UserError: not a URL, with credentials in it, of an unknown protocol, or its package is not installed.
    """
    shown = f"{key}={redacted(url)}" if key else redacted(url)
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*)://(.+)", url)
    if found is None or "::" in url:
        raise UserError(f"{shown} is not a URL; give one such as s3://bucket/prefix, gs://bucket/prefix or file:///folder")
    protocol, rest = found.groups()
    # Anywhere in it: AWS's secret keys have slashes, and the host seems to end at the first one.
    if (protocol != "file" and "@" in rest) or re.search(r"[?&#]", rest):
        raise UserError(f"{shown}: credentials and options do not belong into a URL, which is saved and logged; leave them out and "
                        "give them in the environment or in the provider's own files")  # fmt: skip
    if protocol == "file" and not rest.startswith("/"):
        raise UserError(f"{shown} names a machine, not a folder; file:// takes three slashes: file:///{rest}")
    if any(part in (".", "..") for part in rest.split("/")):
        raise UserError(f"{shown} goes through '.' or '..'; give the whole path")
    _check_package(shown, protocol)


def redacted(url: str) -> str:
    """A URL without what stands before its last `@`, and without its query."""
    return re.sub(r"://.*@", "://***@", re.sub(r"[?#].*", "?***", url))


def _check_package(shown: str, protocol: str) -> None:
    from fsspec.registry import known_implementations, registry  # 0.1 s, for those who asked for it

    if protocol in LOST or (protocol not in known_implementations and protocol not in registry):
        allowed = ", ".join(sorted({*EXTRAS, "file"}))
        hint = nearest(protocol, [*EXTRAS, "file"])
        raise UserError(f"{shown}: {protocol}:// keeps no files that fsspec knows of; allowed: {allowed}, or what a package of "
                        f"yours brings{hint}")  # fmt: skip
    package = known_implementations.get(protocol, {"class": "fsspec."})["class"].partition(".")[0]
    if find_spec(package) is None:
        wanted = f'"megatron-scratch[{EXTRAS[protocol]}]"' if protocol in EXTRAS else package
        raise UserError(f"{shown} needs {package}, which is not installed: pip install {wanted}")
