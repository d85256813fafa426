"""A run in storage.

    run.json                 identity, resolved recipe, command: written once, by a conditional put
    attempts/0001.json       who started; taken by a conditional put: the fence
    attempts/0001-end.json   when and why it ended
    attempts/0001-stop.json  somebody asked it to stop
    notes/                   checkpoints, restarts and facts, one small object each, so that nobody overwrites anybody
    checkpoints/             see training/checkpoint.py and storage/publish.py
    metrics/ logs/ tensorboard/
    record.json              the job's record with its exit code
    card.json                everything above on one page (runs/card.py)

Fencing: an attempt owns the run as long as no higher number is taken. Whoever commits asks first (`check_fence`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

from reid_dist.config import Recipe, to_mapping
from reid_dist.errors import RunError, UserError
from reid_dist.runs.card import compose
from reid_dist.runs.identity import Identity, code_version, differences, library_versions
from reid_dist.runs.metrics import MetricsWriter, read_metrics
from reid_dist.runs.redact import redact
from reid_dist.storage import AlreadyExists, Store, check_name, open_store
from reid_dist.storage.publish import committed

logger = logging.getLogger(__name__)

_ATTEMPT = re.compile(r"attempts/(\d{4,})\.json")


class FencedOut(RunError):
    """A newer attempt of the same run has started; this one must stop and write nothing more."""

    retryable = False


class Run:
    """One attempt of a run. Make it with `open` (the driver), `attach` (its workers) or `read` (looking only)."""

    def __init__(self, store: Store, attempt: int) -> None:
        self.store, self.attempt = store, attempt
        self.uri = store.uri
        self._metrics = MetricsWriter(store, attempt)
        self._notes: dict[str, dict[str, Any]] = {}

    # --- beginning

    @classmethod
    def open(cls, uri: str, identity: Identity, recipe: Recipe, command: str = "") -> Run:
        """Create the run or continue it. Where it is finished already (`finished`), no attempt is taken (attempt 0).

        `command` (default: this process's own) reproduces the run. Raises UserError when another run lives there,
        naming the differences; FencedOut when another attempt starts at the same moment; StorageError.
        """
        check_name(uri.rstrip("/").rpartition("/")[2], "run name")
        store = open_store(uri)
        facts = redact(
            {
                "format": 1,
                "created": time.time(),
                "digest": identity.digest,
                "identity": identity.tree(),
                "recipe": to_mapping(recipe),
                "command": command or _own_command(),
                "code": code_version(),
                "libraries": library_versions(),
            }
        )
        try:
            store.write("run.json", _json(facts), if_absent=True)
        except AlreadyExists:
            _refuse_other(store, identity)
        run = cls(store, 0)
        if run.finished is None:
            run.attempt = _take_attempt(store)
            run._metrics = MetricsWriter(store, run.attempt)
            run.write_card()
        return run

    @classmethod
    def attach(cls, uri: str, attempt: int) -> Run:
        """The run as one of its workers sees it."""
        return cls(open_store(uri), attempt)

    @classmethod
    def read(cls, uri: str) -> Run:
        """An existing run, to look at. Raises UserError when there is none."""
        store = open_store(uri)
        if not store.exists("run.json"):
            raise UserError(f"{uri}: there is no run (no run.json); `python -m jobs.runs ls` lists them")
        return cls(store, max(_attempts(store), default=0))

    # --- fence and stop

    def check_fence(self) -> None:
        """Raises FencedOut when a newer attempt has taken the run."""
        if self.store.exists(f"attempts/{self.attempt + 1:04d}.json"):
            raise FencedOut(f"attempt {self.attempt} of {self.uri} was replaced by a newer one and stops")

    def request_stop(self, reason: str) -> None:
        """Ask the attempt's workers to end with a checkpoint."""
        self.store.write(
            f"attempts/{self.attempt:04d}-stop.json", _json(redact({"time": time.time(), "reason": reason}))
        )

    def stop_requested(self) -> bool:
        """Whether somebody asked this attempt to stop."""
        return self.store.exists(f"attempts/{self.attempt:04d}-stop.json")

    # --- what happened

    def note(self, kind: str, **facts: Any) -> None:
        """Record something that happened, for the card. Each note is an object of its own."""
        content = redact({"kind": kind, "attempt": self.attempt, "time": time.time(), **facts})
        self.store.write(f"notes/{self.attempt:04d}-{check_name(kind)}-{uuid.uuid4().hex[:10]}.json", _json(content))

    def note_checkpoint(self, name: str, step: int, metrics: Mapping[str, float], size: int) -> None:
        """A checkpoint (key `name`, `size` bytes) was committed at `step`."""
        self.note("checkpoint", name=name, step=step, metrics=dict(metrics), size=size)

    def note_restart(self, reason: str, step: int) -> None:
        """The workers failed and start again from `step`."""
        self.note("restart", reason=reason, step=step)
        self.write_card()

    def describe(self, **facts: Any) -> None:
        """Facts for the card, for example hosts=2; a later one replaces an earlier one of the same name."""
        self.note("facts", **facts)

    def notes(self) -> list[dict[str, Any]]:
        """All notes by time. Notes never change, so each is read once per process."""
        for entry in self.store.list("notes/"):
            if entry.key not in self._notes:
                self._notes[entry.key] = json.loads(self.store.read(entry.key))
        return sorted(self._notes.values(), key=lambda note: (note["attempt"], note["time"]))

    def checkpoints(self) -> list[dict[str, Any]]:
        """[{"name", "step", "metrics", "size", "attempt", "time", "kept"}] by step; of a step saved twice the last."""
        kept = set(committed(self.store, "checkpoints"))
        latest = {note["name"]: note for note in self.notes() if note["kind"] == "checkpoint"}
        found = [{k: v for k, v in note.items() if k != "kind"} | {"kept": n in kept} for n, note in latest.items()]
        return sorted(found, key=lambda checkpoint: checkpoint["step"])

    def latest_step(self) -> int:
        """Step of the newest committed checkpoint; 0 when there is none."""
        names = committed(self.store, "checkpoints")
        return int(names[0].rpartition("-")[2]) if names else 0

    # --- metrics

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        """Keep one record {"kind", "step", ...}; see runs/metrics.py."""
        self._metrics.write(record)

    def flush_metrics(self) -> None:
        """Store the records kept so far. Raises StorageError."""
        self._metrics.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """All stored records by step, the latest attempt's of each (kind, step)."""
        return read_metrics(self.store)

    # --- end

    @property
    def facts(self) -> dict[str, Any]:
        """run.json."""
        content: dict[str, Any] = json.loads(self.store.read("run.json"))
        return content

    @property
    def finished(self) -> dict[str, Any] | None:
        """The stored record of a run that is done (exit code 0), else None."""
        try:
            record: dict[str, Any] = json.loads(self.store.read("record.json"))
        except FileNotFoundError:
            return None
        return record if record.get("exit_code") == 0 else None

    def write_record(self, record: Mapping[str, Any]) -> None:
        """End of the attempt: store the record, the end and the card. A fenced-out attempt stores its end alone."""
        self.flush_metrics()
        end = {"time": time.time(), "exit_code": record.get("exit_code"), "reason": record.get("error", "done")}
        self.store.write(f"attempts/{self.attempt:04d}-end.json", _json(redact(end)))
        try:
            self.check_fence()
        except FencedOut as error:
            logger.warning("%s; its record is not stored as the run's", error)
            return
        self.store.write("record.json", _json(redact(dict(record))))
        self.write_card()

    def card(self) -> dict[str, Any]:
        """The run card, composed from what is stored."""
        found = [entry.key for entry in self.store.list("attempts/")]
        attempts = {key: json.loads(self.store.read(key)) for key in found}
        return compose(self.uri, self.facts, attempts, self.notes(), self.checkpoints(), self.finished)

    def write_card(self) -> None:
        """Store card.json."""
        self.store.write("card.json", _json(redact(self.card())))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, default=str) + "\n").encode()


def _own_command() -> str:
    return shlex.join(["python", *sys.orig_argv[1:]])


def _refuse_other(store: Store, identity: Identity) -> None:
    """Raises UserError unless the run that lives in `store` is the same."""
    try:
        stored = json.loads(store.read("run.json"))
        there, digest = stored["identity"], stored["digest"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{store.uri}/run.json cannot be read: choose another name= or remove that folder") from None
    if digest == identity.digest:
        return
    found = differences(there, redact(identity.tree()))
    more = f" and {len(found) - 12} more" if len(found) > 12 else ""
    raise UserError(
        f"{store.uri} holds another run; it differs in {'; '.join(found[:12]) or 'secrets only'}{more}. "
        "Give this one another name=, or go back to that recipe, data and code to continue it"
    )


def _attempts(store: Store) -> list[int]:
    matches = (_ATTEMPT.fullmatch(entry.key) for entry in store.list("attempts/"))
    return [int(match[1]) for match in matches if match]


def _take_attempt(store: Store) -> int:
    """The next attempt's number, ours alone. Raises FencedOut when another process took it at the same moment."""
    number = max(_attempts(store), default=0) + 1
    who = {"time": time.time(), "host": os.uname().nodename, "pid": os.getpid(), "nonce": uuid.uuid4().hex}
    try:
        store.write(f"attempts/{number:04d}.json", _json(who), if_absent=True)
    except AlreadyExists:
        raise FencedOut(
            f"another process started attempt {number} of {store.uri} at the same moment; it has the run"
        ) from None
    return number
