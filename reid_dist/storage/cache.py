"""The node's cache of remote files and folders: downloaded once per node, verified, evicted by size.

An entry's name is a digest of the URI and of what the place says about the content (sizes, ETags), so changed content
is another entry. `entry.json` records size, SHA-256 and modification time of every file; it is written last, so its
presence says that the entry is whole. A hit compares size and time; where the time differs the bytes are hashed again,
and an entry that does not verify is fetched anew.

A process holds a shared lock (flock, released by the kernel even after kill -9) on every entry it uses until it ends,
so eviction never takes a file away from a running job.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from reid_dist.storage.base import MANY, Entry, StorageError, Store, check_key, file_sha256
from reid_dist.storage.local import explained

logger = logging.getLogger(__name__)

DEFAULT_GB = 50.0
_in_use: dict[str, int] = {}  # entry folder -> open descriptor that holds its shared lock
_in_use_lock = threading.Lock()


class NodeCache:
    """A folder on the node's own disk. `folder` defaults to $REID_CACHE, else ~/.cache/reid-dist."""

    def __init__(self, folder: str | Path = "", max_gb: float = DEFAULT_GB) -> None:
        chosen = folder or os.environ.get("REID_CACHE") or "~/.cache/reid-dist"
        self.folder = Path(chosen).expanduser().absolute()
        self.max_bytes = int(max_gb * 1e9)

    def file(self, uri: str) -> str:
        """A local path with the content of `uri`. Raises UserError when there is no such file."""
        from reid_dist.storage import is_remote, open_store

        if not is_remote(uri):
            store = open_store(uri)
            if not os.path.isfile(store.uri):
                raise UserError(f"{store.uri} is not a file")
            return store.uri
        place, _, name = uri.rpartition("/")
        store = open_store(place)
        try:
            entry = store.stat(name)
        except FileNotFoundError:
            raise UserError(f"{uri} does not exist") from None
        return str(self._entry(store, uri, [entry]) / name)

    def tree(self, store: Store) -> str:
        """A local folder with everything below a remote `store`. Raises UserError when there is nothing."""
        entries = store.list()
        if not entries:
            raise UserError(f"{store.uri} does not exist or is empty")
        return str(self._entry(store, store.uri, entries))

    def _entry(self, store: Store, uri: str, entries: list[Entry]) -> Path:
        facts = json.dumps([uri, *([entry.key, entry.size, entry.tag] for entry in entries)])
        folder = self.folder / hashlib.sha256(facts.encode()).hexdigest()[:32]
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _hold(folder)
            if self._intact(folder):
                os.utime(folder / "entry.json")
            else:
                self._fetch(store, uri, entries, folder)
        return folder / "data"

    def _intact(self, folder: Path) -> bool:
        """Whether the entry is whole; times of files that were touched but are unchanged are brought up to date."""
        try:
            record = json.loads((folder / "entry.json").read_text())
            for key, fact in record["files"].items():
                path = folder / "data" / key
                facts = path.stat()
                if facts.st_size != fact["size"]:
                    raise ValueError(f"{key} has {facts.st_size} bytes instead of {fact['size']}")
                if facts.st_mtime_ns != fact["mtime_ns"]:
                    if file_sha256(path) != fact["sha256"]:
                        raise ValueError(f"{key} was changed")
                    os.utime(path, ns=(fact["mtime_ns"], fact["mtime_ns"]))
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, OSError) as error:
            logger.warning("cache entry %s is corrupted and fetched again: %s", folder.name, error)
            return False
        return True

    def _fetch(self, store: Store, uri: str, entries: list[Entry], folder: Path) -> None:
        size = sum(entry.size for entry in entries)
        self._make_room(size, uri)
        started = time.monotonic()
        with explained(folder):
            shutil.rmtree(folder, ignore_errors=True)

        def one(entry: Entry) -> tuple[str, dict[str, Any]]:
            path = folder / "data" / check_key(entry.key)
            store.download(entry.key, str(path))
            facts = path.stat()
            if facts.st_size != entry.size:
                raise StorageError(f"{uri}: {entry.key} changed while it was fetched; try again")
            return entry.key, {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "sha256": file_sha256(path)}

        try:
            with ThreadPoolExecutor(max_workers=MANY, thread_name_prefix="cache") as pool:
                files = dict(pool.map(one, entries))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        record = {"uri": uri, "size": size, "files": files}
        with explained(folder):
            temporary = folder / "entry.json.part"
            temporary.write_text(json.dumps(record))
            os.replace(temporary, folder / "entry.json")
        logger.info("%s is in the node cache (%.1f MB in %.1f s)", uri, size / 1e6, time.monotonic() - started)

    def _make_room(self, size: int, uri: str) -> None:
        if size > self.max_bytes:
            raise UserError(
                f"{uri} has {size / 1e9:.2f} GB, the node cache {self.folder} holds {self.max_bytes / 1e9:.2f} GB: "
                "raise data.cache_gb"
            )
        self.evict(self.max_bytes - size)
        free = shutil.disk_usage(self.folder).free
        if free < size:
            self.evict(0, until_free=size)
            free = shutil.disk_usage(self.folder).free
        if free < size:
            raise StorageError(
                f"{self.folder}: the disk is full: {uri} needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            )

    def evict(self, keep_bytes: int | None = None, *, until_free: int = 0, plan: bool = False) -> list[str]:
        """Remove least recently used entries until `keep_bytes` (default: the cache's size) remain, and what was left
        half-fetched.

        Entries that a running process uses stay. With `until_free`, stop as soon as the disk has that many bytes free.
        Returns the URIs removed (with `plan`: those that would be).
        """
        limit = self.max_bytes if keep_bytes is None else keep_bytes
        found = self.entries()
        total = sum(entry["size"] for entry in found)
        removed = []
        for entry in found:
            half = entry["used"] == 0.0
            if not half and (total <= limit or (until_free and shutil.disk_usage(self.folder).free >= until_free)):
                continue
            if plan or _remove(self.folder / entry["name"]):
                total -= entry["size"]
                removed.append(entry["uri"])
        return removed

    def entries(self) -> list[dict[str, Any]]:
        """[{"name", "uri", "size" (bytes), "used" (seconds since the epoch; 0: half-fetched)}], least recently used
        first.
        """
        found = []
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            if not folder.is_dir():
                continue
            try:
                record = json.loads((folder / "entry.json").read_text())
                used = (folder / "entry.json").stat().st_mtime
                found.append({"name": folder.name, "uri": record["uri"], "size": record["size"], "used": used})
            except (OSError, ValueError, KeyError):
                found.append({"name": folder.name, "uri": f"half-fetched {folder.name}", "size": 0, "used": 0.0})
        return sorted(found, key=lambda entry: (entry["used"], entry["name"]))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process and thread at a time fetches or checks an entry."""
    from filelock import FileLock

    with FileLock(f"{folder}.lock"):
        yield


def _hold(folder: Path) -> None:
    """Keep the entry from eviction until this process ends."""
    with _in_use_lock:
        if str(folder) not in _in_use:
            descriptor = os.open(f"{folder}.use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            _in_use[str(folder)] = descriptor


def _remove(folder: Path) -> bool:
    """Remove an entry unless a process uses it (or is fetching it)."""
    with _in_use_lock:
        if str(folder) in _in_use:
            return False
    descriptor = os.open(f"{folder}.use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
