"""The ledger: every answer that a model gave, kept under what it was given for. A record exists <=> the work is done.

    attempts/0001.json                        who writes; taken by a conditional put: the fence
    <stage>/a0001-<shard>.jsonl.gz            records, one JSON object per line
    <stage>/a0001-<shard>.manifest.json       rows, size and SHA-256 of the file; written last: readers trust nothing else

The key of a record is a digest of stage, prompt version, model revision, adapter, sampling and the *content* of the inputs,
so a second run finds everything, another model or prompt finds nothing, and no path or row number matters. Shards are
written once (create-only); generation is not bit-exact over batch compositions, so whoever comes second to the same shard
throws his own answers away and reads the first ones. A killed job loses the shards that it had not published.

One attempt writes at a time: a newer one fences the older ones out before their next shard. Where two shards hold one key,
an answer wins over an error, else the lower shard name: what was read once is read ever after.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import socket
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from reid_dist.errors import RunError
from reid_dist.generation.messages import Outcome
from reid_dist.storage import AlreadyExists, CorruptionError, Store, check_name

logger = logging.getLogger(__name__)
READERS = 8  # shards read at once


class FencedOut(RunError):
    """A newer attempt writes this ledger; this one must stop."""

    retryable = False


@dataclass(frozen=True, slots=True)
class Maker:
    """Who answers: what every key of a job has in common."""

    model: str  # digest of the model folder, or name@revision
    adapter: str = ""  # digest of a LoRA adapter
    settings: Mapping[str, Any] = field(default_factory=dict)  # pixel budget, number format

    def key(self, stage: str, version: str, inputs: Mapping[str, Any]) -> str:
        """Content key, hex SHA-256."""
        return digest([stage, version, self.model, self.adapter, dict(self.settings), dict(inputs)])


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work of a stage. `inputs`: digests or texts that make the key; `payload`: what the work needs besides
    (row numbers, file names), which never enters the key.
    """

    key: str
    inputs: Mapping[str, Any]
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One answer as it is stored."""

    key: str
    status: str  # ok, partial, fallback, error
    value: Any
    reason: str
    facts: Mapping[str, Any]  # inputs, replies with token counts, worker, time, prompt version, model

    @property
    def usable(self) -> bool:
        """Whether `value` may be used; error rows may not."""
        return self.status != "error"

    def line(self) -> str:
        """One line of a shard."""
        fields = {"key": self.key, "status": self.status, "value": self.value, "reason": self.reason, **self.facts}
        return json.dumps(fields, sort_keys=True, ensure_ascii=True)

    @classmethod
    def parse(cls, line: str) -> Record:
        """The record of one line."""
        fields = json.loads(line)
        key, status, value, reason = (fields.pop(name) for name in ("key", "status", "value", "reason"))
        return cls(key, status, value, reason, fields)


def make_record(unit: Unit, outcome: Outcome, stage: str, version: str, maker: Maker) -> Record:
    """What is kept of an outcome: texts, counts and times; pictures never."""
    replies = [
        {"text": r.text, "finish": r.finish, "prompt_tokens": r.prompt_tokens,
         "completion_tokens": r.completion_tokens, "seconds": round(r.seconds, 4)}
        for r in outcome.replies
    ]  # fmt: skip
    facts = {
        "stage": stage, "prompt": version, "model": maker.model, "adapter": maker.adapter, "inputs": dict(unit.inputs),
        "replies": replies, "worker": socket.gethostname(), "created": round(time.time(), 3),
    }  # fmt: skip
    return Record(unit.key, outcome.status, outcome.value, outcome.reason, facts)


class Ledger:
    """A place of answers. `Ledger(store)` reads; `take()` makes this process's job its writer."""

    def __init__(self, store: Store, attempt: int = 0) -> None:
        self.store, self.attempt = store, attempt

    def take(self) -> Ledger:
        """The ledger with the next attempt number taken. Raises FencedOut when another took it at the same moment."""
        numbers = [int(e.key[len("attempts/") : -len(".json")]) for e in self.store.list("attempts/")]
        attempt = max(numbers, default=0) + 1
        facts = json.dumps({"host": socket.gethostname(), "time": time.time()}).encode()
        try:
            self.store.write(f"attempts/{attempt:04d}.json", facts, if_absent=True)
        except AlreadyExists:
            raise FencedOut(f"another job took the ledger {self.store.uri} at this moment: let it finish") from None
        return Ledger(self.store, attempt)

    def check_fence(self) -> None:
        """Raises FencedOut when a newer attempt has taken the ledger."""
        if self.store.exists(f"attempts/{self.attempt + 1:04d}.json"):
            raise FencedOut(f"attempt {self.attempt} of {self.store.uri} was replaced by a newer one and stops")

    def shard_name(self, stage: str, keys: Iterable[str]) -> str:
        """Where this attempt publishes records of these keys."""
        return f"{check_name(stage, 'stage')}/a{self.attempt:04d}-{digest(sorted(keys))[:16]}"

    def published(self, stage: str, keys: Sequence[str]) -> list[Record] | None:
        """The records of a shard of exactly these keys by this attempt, if it is published."""
        name = self.shard_name(stage, keys)
        return self._read_shard(name) if self.store.exists(f"{name}.manifest.json") else None

    def publish(self, stage: str, records: Sequence[Record]) -> list[Record]:
        """Publish a shard; returns what is published under its name, which is the other's if another was first.

        Raises FencedOut, StorageError; then the shard does not exist.
        """
        if not self.attempt:
            raise ValueError("this ledger was opened to read: take() it before publishing")
        name = self.shard_name(stage, [record.key for record in records])
        data = gzip.compress("".join(record.line() + "\n" for record in records).encode(), mtime=0)
        # The file's name holds its content, so a writer that comes second never changes what a manifest describes.
        sha256 = hashlib.sha256(data).hexdigest()
        file = f"{name}-{sha256[:12]}.jsonl.gz"
        self.store.write(file, data)
        self.check_fence()
        manifest = {"file": file, "rows": len(records), "bytes": len(data), "sha256": sha256}
        try:
            self.store.write(f"{name}.manifest.json", json.dumps(manifest).encode(), if_absent=True)
        except AlreadyExists:
            logger.info("shard %s was published by another worker; its answers stand", name)
            return self._read_shard(name)
        return list(records)

    def shards(self, stage: str) -> list[str]:
        """Names of the published shards of a stage, sorted."""
        end = ".manifest.json"
        return [e.key[: -len(end)] for e in self.store.list(f"{check_name(stage, 'stage')}/") if e.key.endswith(end)]

    def read(self, stage: str, keys: Container[str] | None = None) -> dict[str, Record]:
        """Records of a stage by key, all or those of `keys`. Raises CorruptionError for a shard that is not what its
        manifest says.
        """
        found: dict[str, Record] = {}
        with ThreadPoolExecutor(max_workers=READERS) as pool:
            for records in pool.map(self._read_shard, self.shards(stage)):
                for record in records:
                    if keys is not None and record.key not in keys:
                        continue
                    before = found.get(record.key)
                    if before is None or (record.usable and not before.usable):
                        found[record.key] = record
        return found

    def _read_shard(self, name: str) -> list[Record]:
        manifest = json.loads(self.store.read(f"{name}.manifest.json"))
        try:
            data = self.store.read(manifest["file"])
        except FileNotFoundError:
            raise CorruptionError(f"{self.store.uri}/{name}: its records are gone") from None
        if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
            raise CorruptionError(f"{self.store.uri}/{name}: the records are not the ones that were published")
        return [Record.parse(line) for line in gzip.decompress(data).decode().splitlines()]
