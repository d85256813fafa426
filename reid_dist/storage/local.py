"""A folder as a store. Atomic by temporary file, fsync and rename; conditional by hard link, which also NFS does
atomically.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from reid_dist.storage.base import TEMPORARY, AlreadyExists, Entry, Names, StorageError, check_key, is_temporary

_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a parent is a file, not a folder",
    errno.EISDIR: "is a folder, not a file",
}


@contextlib.contextmanager
def explained(where: str | Path) -> Iterator[None]:
    """Turn an OSError into one readable StorageError; a missing file stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError as error:
        if error.filename is None:  # explained already, nearer to its cause
            raise
        raise FileNotFoundError(f"{where} does not exist") from None
    except OSError as error:
        cause = _CAUSES.get(error.errno or 0, error.strerror or type(error).__name__)
        raise StorageError(f"{where}: {cause}") from error


def replace_file(path: Path, source: Path) -> None:
    """Move a complete temporary file into place, on disk before it is visible."""
    with open(source, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(source, path)


class LocalStore:
    """A folder; it need not exist yet."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextlib.contextmanager
    def _temporary(self, path: Path) -> Iterator[Path]:
        """A fresh name beside `path`; whatever still bears it afterwards is removed."""
        temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    def read(self, key: str) -> bytes:
        path = self._path(key)
        with explained(path):
            return path.read_bytes()

    def write(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        path = self._path(key)
        with self._temporary(path) as temporary:
            temporary.write_bytes(data)
            if not if_absent:
                replace_file(path, temporary)
                return
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise AlreadyExists(f"{path} exists already") from None

    def upload(self, key: str, path: str) -> None:
        target = self._path(key)
        with self._temporary(target) as temporary:
            shutil.copyfile(path, temporary)
            replace_file(target, temporary)

    def download(self, key: str, path: str) -> None:
        source, target = self._path(key), Path(path)
        with self._temporary(target) as temporary:
            with explained(source):
                shutil.copyfile(source, temporary)
            replace_file(target, temporary)

    def list(self, prefix: str = "") -> list[Entry]:
        top = self.root / prefix.rpartition("/")[0] if "/" in prefix else self.root
        if prefix.rstrip("/"):
            check_key(prefix.rstrip("/"))
        found = []
        for path in _files(top):
            key = path.relative_to(self.root).as_posix()
            if not key.startswith(prefix) or is_temporary(key):
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted while we list
                found.append(_entry(key, path))
        return sorted(found, key=lambda entry: os.fsencode(entry.key))

    def stat(self, key: str) -> Entry:
        path = self._path(key)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        return _entry(key, path)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError), explained(key):
            self._path(key).unlink()

    def delete_tree(self, prefix: str) -> None:
        path = self._path(prefix.rstrip("/"))
        with explained(path):
            if path.is_symlink():  # a link is removed, never what it leads to
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)

    def sub(self, folder: str) -> LocalStore:
        return LocalStore(self._path(folder.rstrip("/")))

    def sweep(self, older_than_s: float, *, plan: bool = False) -> Names:
        limit = time.time() - older_than_s
        old = [path for path in _files(self.root) if is_temporary(path.name) and path.stat().st_mtime < limit]
        for path in old if not plan else []:
            path.unlink(missing_ok=True)
        return [path.relative_to(self.root).as_posix() for path in old]


def _entry(key: str, path: Path) -> Entry:
    facts = path.stat()
    return Entry(key, facts.st_size, facts.st_mtime, f"{facts.st_mtime_ns}")


def _files(top: Path) -> Iterator[Path]:
    """Files below `top`. Folders that are links are followed (datasets are often linked in), each real folder once."""
    seen = set()
    if not top.is_dir():
        return
    for folder, names, files in os.walk(top, followlinks=True, onerror=_refuse):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            names.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        yield from (Path(folder, name) for name in files)


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed is an error (os.walk would pass over it); one deleted meanwhile is not."""
    if not isinstance(error, FileNotFoundError):
        raise StorageError(f"{error.filename}: cannot be listed: {error.strerror}")
