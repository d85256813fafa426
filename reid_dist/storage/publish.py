"""Folders published whole: readers see a complete one or none.

    <prefix>/<tag>/...              the files; <tag> is new for every publish, so two writers never mix
    <prefix>/<tag>/manifest.json    sizes and SHA-256 of the files, and the writer's facts
    <prefix>/COMMITTED              names the tag and the manifest's SHA-256; one atomic write, last

Publishing the same prefix again switches COMMITTED to the new files and then removes the old ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reid_dist.storage.base import CorruptionError, StorageError, Store, check_key, file_sha256

logger = logging.getLogger(__name__)

MARKER = "COMMITTED"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a published folder holds. `files`: name -> (bytes, hex SHA-256); `folder`: the key under which they lie."""

    folder: str
    files: Mapping[str, tuple[int, str]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())


def publish_folder(
    store: Store,
    prefix: str,
    folder: str | Path,
    *,
    facts: Mapping[str, Any] | None = None,
    guard: Callable[[], None] | None = None,
) -> Manifest:
    """Publish the files of a local folder as `<store>/<prefix>`. `guard` is asked last before the commit and may raise.

    Raises StorageError; then nothing is published, and what was uploaded is removed (or, unreachable, left to
    `jobs.runs gc`).
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    place = f"{check_key(prefix)}/{uuid.uuid4().hex[:12]}"
    try:
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="publish") as pool:
            uploads = [
                pool.submit(store.upload, f"{place}/{name}", str(path)) for name, path in zip(names, paths, strict=True)
            ]
            files = {name: (path.stat().st_size, file_sha256(path)) for name, path in zip(names, paths, strict=True)}
            for upload in uploads:
                upload.result()
        manifest = Manifest(place, files, dict(facts or {}))
        text = json.dumps({"files": manifest.files, "facts": manifest.facts}, indent=1, sort_keys=True).encode()
        store.write(f"{place}/manifest.json", text)
        before = _marker(store, prefix)
        if guard:
            guard()
    except BaseException:
        with contextlib.suppress(StorageError):
            store.delete_tree(place)
        raise
    # From here on nothing of ours is removed on failure: the answer may be lost although the marker is written.
    marker = {"folder": place.rpartition("/")[2], "manifest_sha256": hashlib.sha256(text).hexdigest()}
    store.write(f"{prefix}/{MARKER}", json.dumps(marker).encode())
    if before:
        store.delete_tree(f"{prefix}/{before['folder']}")
    return manifest


def _marker(store: Store, prefix: str) -> dict[str, str] | None:
    try:
        marker = json.loads(store.read(f"{prefix}/{MARKER}"))
        check_key(marker["folder"])
        return {"folder": str(marker["folder"]), "manifest_sha256": str(marker["manifest_sha256"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise CorruptionError(f"{store.uri}/{prefix}: its {MARKER} marker cannot be read") from None


def read_manifest(store: Store, prefix: str) -> Manifest:
    """The manifest of a committed folder. Raises CorruptionError when it is not committed or damaged."""
    marker = _marker(store, prefix)
    if marker is None:
        raise CorruptionError(f"{store.uri}/{prefix} was never committed")
    place = f"{prefix}/{marker['folder']}"
    try:
        text = store.read(f"{place}/manifest.json")
    except FileNotFoundError:
        raise CorruptionError(f"{store.uri}/{place} has lost its manifest") from None
    if hashlib.sha256(text).hexdigest() != marker["manifest_sha256"]:
        raise CorruptionError(f"{store.uri}/{place}: the manifest is not the one that was committed")
    content = json.loads(text)
    files = {check_key(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
    return Manifest(place, files, content["facts"])


def fetch(store: Store, prefix: str, folder: str | Path) -> Manifest:
    """Copy a committed folder into the local `folder`, every byte verified. Raises CorruptionError, StorageError."""
    manifest = read_manifest(store, prefix)

    def one(name: str) -> None:
        size, digest = manifest.files[name]
        target = Path(folder) / name
        try:
            store.download(f"{manifest.folder}/{name}", str(target))
        except FileNotFoundError:
            raise CorruptionError(f"{store.uri}/{manifest.folder}/{name} is missing") from None
        if target.stat().st_size != size or file_sha256(target) != digest:
            target.unlink()
            raise CorruptionError(f"{store.uri}/{manifest.folder}/{name}: size or checksum differ from the manifest")

    with ThreadPoolExecutor(max_workers=4, thread_name_prefix="fetch") as pool:
        list(pool.map(one, manifest.files))
    return manifest


def verify(store: Store, prefix: str) -> Manifest:
    """Read a committed folder and check every byte. Raises CorruptionError, StorageError."""
    with tempfile.TemporaryDirectory(prefix="reid-verify-") as folder:
        return fetch(store, prefix, folder)


def committed(store: Store, parent: str) -> list[str]:
    """Keys of the committed folders directly below `parent`, newest first. Their names must sort by age
    (step-00000120).
    """
    names = {
        entry.key.rpartition("/")[0]
        for entry in store.list(f"{check_key(parent)}/")
        if entry.key.count("/") == parent.count("/") + 2 and entry.key.endswith(f"/{MARKER}")
    }
    return sorted(names, reverse=True)


def unpublish(store: Store, prefix: str) -> None:
    """Remove a published folder: its marker first, so that a process killed in between leaves an orphan, never a torn folder."""
    store.delete(f"{check_key(prefix)}/{MARKER}")
    store.delete_tree(prefix)


def orphans(store: Store, parent: str, older_than: float) -> list[str]:
    """Keys of folders below `parent` that no marker names and whose newest object is older than `older_than` (epoch
    seconds).
    """
    newest: dict[str, float] = {}
    depth = check_key(parent).count("/") + 2
    for entry in store.list(f"{parent}/"):
        parts = entry.key.split("/")
        if len(parts) > depth + 1:
            place = "/".join(parts[: depth + 1])
            newest[place] = max(newest.get(place, 0.0), entry.modified)
    found = []
    for place, modified in sorted(newest.items()):
        prefix, _, tag = place.rpartition("/")
        marker = _marker(store, prefix)
        if modified < older_than and (marker is None or marker["folder"] != tag):
            found.append(place)
    return found
