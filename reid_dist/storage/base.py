"""What every storage place can do: the interface behind which file:// and s3:// look alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from reid_dist.errors import RunError


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
    modified: float  # seconds since the epoch


class Store(Protocol):
    """A folder or bucket prefix. Keys are relative POSIX paths; `..`, absolute paths and empty parts are refused."""

    uri: str

    def read(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError, StorageError."""
        ...

    def write(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Publish atomically: readers see the old object or the new one, never a part. Raises AlreadyExists, StorageError."""
        ...

    def upload(self, key: str, path: str) -> None:
        """Publish a local file atomically (multipart in parallel where the place has it)."""
        ...

    def download(self, key: str, path: str) -> None:
        """Copy one object to a local file (written beside it and renamed)."""
        ...

    def list(self, prefix: str = "") -> list[Entry]:
        """All objects whose key starts with `prefix`, recursively, sorted bytewise by key. Hidden temporaries are left out."""
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
