"""A sweep in storage, beside the runs of its trials.

    sweep.json            the file as last run, and the names of its trials
    trials/<name>/        one run per trial; the name ends with the digest of recipe, data and code
    shared/<name>/        runs that several trials start from
    planned/<name>.json   a trial's facts, before it starts
    outcomes/<name>.json  how it ended: done with its scores, or stopped early; written once, never again
    failures/<name>.json  why it failed last; it is tried again by the next job
    leaderboard.*  best.yaml  record.json  logs/

All that a continued sweep needs is here. Ray Tune's own state is thrown away: it cannot be extended, and it is pickle.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from reid_dist.config import RecipeError, to_mapping
from reid_dist.errors import UserError
from reid_dist.runs.redact import redact
from reid_dist.storage import AlreadyExists, Store, open_store
from tuning.expand import Trial
from tuning.sweep import Sweep, build_sweep

logger = logging.getLogger(__name__)

DONE, STOPPED = "done", "stopped"


class SweepState:
    """Reads and writes the sweep's objects. Raises UserError for a sweep that cannot be read."""

    def __init__(self, uri: str) -> None:
        self.store: Store = open_store(uri)
        self.uri = self.store.uri

    @classmethod
    def read(cls, uri: str) -> SweepState:
        """An existing sweep. Raises UserError when there is none, or it cannot be read."""
        state = cls(uri)
        state.index()
        state.outcomes()
        return state

    def index(self) -> dict[str, Any]:
        """sweep.json: {"format", "sweep", "trials", "created"}. Raises UserError."""
        try:
            content: dict[str, Any] = json.loads(self.store.read("sweep.json"))
            build_sweep(content["sweep"])
            content["trials"] = [str(name) for name in content["trials"]]
        except FileNotFoundError:
            raise UserError(f"{self.uri}: there is no sweep (no sweep.json); python -m jobs.tune makes one") from None
        except (ValueError, KeyError, TypeError, RecipeError) as error:
            raise UserError(f"{self.uri}/sweep.json cannot be read ({error}): choose another name") from None
        return content

    @property
    def exists(self) -> bool:
        return self.store.exists("sweep.json")

    def write_index(self, sweep: Sweep, names: Iterable[str], **facts: Any) -> None:
        """Store the file as it runs now."""
        content = {"format": 1, "written": time.time(), "sweep": to_mapping(sweep), "trials": list(names), **facts}
        self.store.write("sweep.json", _json(content))

    def plan(self, trial: Trial) -> None:
        """Note a trial that will run."""
        self.store.write(f"planned/{trial.name}.json", _json(trial.facts()))

    def planned(self) -> dict[str, dict[str, Any]]:
        """Facts of all trials that were ever planned, by name. Raises UserError."""
        return self._all("planned")

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """How trials ended, by name. Raises UserError."""
        return self._all("outcomes")

    def failures(self) -> dict[str, dict[str, Any]]:
        """The last failure of trials that have no outcome, by name. Raises UserError."""
        return self._all("failures")

    def _all(self, folder: str) -> dict[str, dict[str, Any]]:
        found = {}
        for entry in self.store.list(f"{folder}/"):
            try:
                content = json.loads(self.store.read(entry.key))
                found[str(content["name"])] = content
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.uri}/{entry.key} cannot be read ({type(error).__name__}): remove it, then the trial runs again"
                ) from None
        return found

    def end(self, name: str, status: str, **facts: Any) -> bool:
        """Store a trial's outcome, once: False when it has one already, which stays."""
        content = {"name": name, "status": status, "time": time.time(), **facts}
        try:
            self.store.write(f"outcomes/{name}.json", _json(content), if_absent=True)
        except AlreadyExists:
            return False
        self.store.delete(f"failures/{name}.json")
        return True

    def fail(self, name: str, reason: str) -> None:
        """Store why a trial failed; it has no outcome."""
        self.store.write(f"failures/{name}.json", _json({"name": name, "time": time.time(), "reason": reason}))

    def write_record(self, record: Mapping[str, Any]) -> None:
        """The job's record."""
        self.store.write("record.json", _json(dict(record)))


def _json(content: Any) -> bytes:
    return (json.dumps(redact(content), indent=1, default=str) + "\n").encode()
