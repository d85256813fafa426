"""The run card: one JSON page that says where a run's numbers come from and what became of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


def compose(
    uri: str,
    facts: Mapping[str, Any],
    attempts: Mapping[str, Mapping[str, Any]],
    notes: Sequence[Mapping[str, Any]],
    checkpoints: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Join what a run stored: run.json, the objects of attempts/ by key, notes, checkpoints, the final record if there
    is one.

    Times are seconds since the epoch, sizes bytes.
    """
    described: dict[str, Any] = {}
    for note in notes:
        if note["kind"] == "facts":
            described |= {key: value for key, value in note.items() if key not in ("kind", "attempt", "time")}
    listed = _attempts(attempts, notes)
    recipe = facts["recipe"]
    return {
        "uri": uri,
        "status": "done" if record else listed[-1]["reason"] if listed else "new",
        "identity": facts["digest"],
        "recipe_digest": hashlib.sha256(json.dumps(facts["identity"]["recipe"], sort_keys=True).encode()).hexdigest(),
        "recipe": recipe,
        "command": facts["command"],
        "data": facts["identity"]["data"],
        "code": facts["code"],
        "libraries": facts["libraries"],
        "seeds": {"seed": recipe["seed"]},
        "created": facts["created"],
        "attempts": listed,
        "seconds": round(sum(attempt["seconds"] for attempt in listed), 1),
        "restarts": [_without(note, "kind") for note in notes if note["kind"] == "restart"],
        "checkpoints": list(checkpoints),
        "metrics": dict(checkpoints[-1]["metrics"]) if checkpoints else {},
        **described,
    }


def _attempts(stored: Mapping[str, Mapping[str, Any]], notes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """[{"number", "start", "end", "seconds", "reason", "exit_code", "host", "pid"}] by number."""
    numbers = sorted(int(key[9:-5]) for key in stored if key[9:-5].isdigit())
    listed = []
    for number in numbers:
        began, end = stored[f"attempts/{number:04d}.json"], stored.get(f"attempts/{number:04d}-end.json")
        last_seen = max((n["time"] for n in notes if n["attempt"] == number), default=began["time"])
        unknown = "replaced by a newer attempt; no end was recorded" if number != numbers[-1] else "running, or killed"
        listed.append(
            {
                "number": number,
                "start": began["time"],
                "end": end["time"] if end else None,
                "seconds": round((end["time"] if end else last_seen) - began["time"], 1),
                "reason": end["reason"] if end else unknown,
                "exit_code": end["exit_code"] if end else None,
                "host": began["host"],
                "pid": began["pid"],
            }
        )
    return listed


def _without(note: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in note.items() if name != key}
