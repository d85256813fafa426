"""What every storage place can do: the interface behind which file:// and s3:// look alike."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from reid_dist.errors import RunError, UserError

TEMPORARY = ".tmp-"  # names that begin so are never listed; `sweep` removes the old ones
Names = list[str]  # (a store's method is called list)
MANY = 8  # parallel transfers of one process and place


class StorageError(RunError):
    """Storage that could not be read or written after bounded retries; the message names the URI and the cause."""


class CorruptionError(StorageError):
    """Bytes that are not the ones that were written (size or checksum differ)."""


class AlreadyExists(StorageError):
    """A write with `if_absent=True` found the key taken."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored object."""

    key: str  # relative to the store's URI, POSIX separators
    size: int  # bytes
    modified: float  # seconds since the epoch, by the place's clock
    tag: str = ""  # changes when the content does (ETag; modification time of a local file)


class Store(Protocol):
    """A folder or bucket prefix. Keys are relative POSIX paths; `..`, absolute paths and empty parts are refused."""

    uri: str

    def read(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError, StorageError."""
        ...

    def write(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Publish atomically: readers see the old object or the new one, never a part. Raises AlreadyExists,
        StorageError.
        """
        ...

    def upload(self, key: str, path: str) -> None:
        """Publish a local file atomically (multipart in parallel where the place has it)."""
        ...

    def download(self, key: str, path: str) -> None:
        """Copy one object to a local file (written beside it and renamed)."""
        ...

    def list(self, prefix: str = "") -> list[Entry]:
        """All objects whose key starts with `prefix`, recursively, sorted bytewise by key. Hidden temporaries are left
        out.
        """
        ...

    def stat(self, key: str) -> Entry:
        """Size and tag of one object. Raises FileNotFoundError, StorageError."""
        ...

    def exists(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Remove one object; no error when it is absent."""
        ...

    def delete_tree(self, prefix: str) -> None:
        """Remove everything below the folder `prefix`."""
        ...

    def sub(self, folder: str) -> Store:
        """The store of a folder below this one."""
        ...

    def sweep(self, older_than_s: float, *, plan: bool = False) -> Names:
        """Remove (with `plan`: only name) temporaries and unfinished uploads that killed processes left behind."""
        ...


def check_key(key: str) -> str:
    """`key`, or UserError when it could leave its store or cannot be a key (traversal, absolute, empty parts, control
    signs).
    """
    parts = key.split("/")
    bad = not key or any(part in ("", ".", "..") for part in parts) or "\\" in key or len(os.fsencode(key)) > 900
    if bad or any(ord(char) < 32 or ord(char) == 127 for char in key):
        raise UserError(
            f"{key!r} is not a storage key: use a relative path without '..', empty parts, backslash or control signs"
        )
    return key


def check_name(name: str, what: str = "name") -> str:
    """`name`, or UserError unless it is one plain folder name: letters, digits, '.', '_', '-', '+', '='; no leading
    dot.
    """
    plain = name.replace("_", "").replace("-", "").replace(".", "").replace("+", "").replace("=", "")
    if not name or len(name) > 200 or name.startswith(".") or not (plain.isascii() and plain.isalnum()):
        raise UserError(
            f"{what} {name[:80]!r}: use letters, digits and . _ - + =, not starting with a dot, at most 200 long"
        )
    return name


def is_temporary(key: str) -> bool:
    """Whether a key is a half-written object of ours."""
    return key.rsplit("/", 1)[-1].startswith(TEMPORARY)


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a local file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
