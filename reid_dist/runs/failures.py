"""What a failure says: whether a rank failed by itself or of another one's death, and whether two failures are the same."""

from __future__ import annotations

import hashlib
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# How a healthy rank dies of another one's death.
COLLATERAL = re.compile(
    r"connection (closed|reset|refused)|closed by peer|broken pipe|socket|timed? ?out|gloo|nccl|heartbeat|preempt"
    r"|Actor(Died|Unavailable)|actor (died|is unavailable)|NodeDied|WorkerCrashed",
    re.IGNORECASE,
)


def collateral(text: str) -> bool:
    """Whether an error's text tells of another process's death, or of a kill from outside, and not of a fault of the code."""
    return bool(COLLATERAL.search(text))


def signature(error: BaseException) -> str:
    """The same for the same traceback: type and frames of the error and of what caused it. 16 hex digits."""
    parts = []
    seen: BaseException | None = error
    while seen is not None:
        frames = traceback.extract_tb(seen.__traceback__)
        parts += [type(seen).__qualname__, *(f"{Path(f.filename).name}:{f.lineno}:{f.name}" for f in frames)]
        seen = seen.__cause__
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def without_digits(text: str) -> str:
    """What is compared where there is no traceback: the text without what differs by chance (pids, addresses, ports)."""
    return re.sub(r"\b[0-9a-f]{8,}\b|\d", "#", text)[-2000:]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the workers of one start ended. `step`: optimizer steps done; None where nobody could tell."""

    text: str
    step: int | None
    trace: str  # empty: nothing of the code's own, so it may happen again without being a bug

    def repeats(self, other: Failure | None) -> bool:
        """Whether it is the same traceback at the same step."""
        return bool(self.trace) and other is not None and (self.trace, self.step) == (other.trace, other.step)


def explain(notes: list[dict[str, Any]], text: str, latest_step: int) -> Failure:
    """The failure of one start of the workers.

    `notes`: what its ranks noted ("failure", "hang"); `text`: what Ray says; `latest_step`: of the newest checkpoint.
    """
    hangs = [note for note in notes if note["kind"] == "hang"]
    if hangs:
        hangs.sort(key=lambda note: (note["waiting"], note["rank"]))
        first = hangs[0]
        stuck = f"rank {first['rank']} stopped answering {first['where']}" if not first["waiting"] else "all ranks wait"
        return Failure(
            f"{stuck}: no progress for {first['seconds']:.0f} s after step {first['step']}; stacks of ranks "
            f"{', '.join(str(n) for n in sorted({note['rank'] for note in hangs}))} are in {first['stacks']} and beside "
            "it (a step that may take longer needs a larger training.hang_timeout_s)",
            int(first["step"]),
            "",
        )
    own = [note for note in notes if note["kind"] == "failure" and not collateral(note["error"])]
    if own:
        first = min(own, key=lambda note: note["time"])
        return Failure(f"rank {first['rank']} at step {first['step']}: {first['error']}", first["step"], first["trace"])
    return Failure(text, latest_step, "" if collateral(text) else without_digits(text))
