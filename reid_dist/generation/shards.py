"""From units of work to published shards: what one worker does, and what the driver makes of it.

A worker takes a shard of units, asks for all of them at once within a bound (no list of fixed size is awaited), and
publishes the shard. A row that cannot be asked about becomes an error row; an engine that fails ends the shard, which is
then not published and done again by whoever takes it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reid_dist.errors import RunError
from reid_dist.generation.ledger import Ledger, Maker, Record, Unit, make_record
from reid_dist.generation.messages import BadInput, Outcome

logger = logging.getLogger(__name__)
SHARD = 256  # units
Work = Callable[[Unit], Awaitable[Outcome]]


class TooManyRejects(RunError):
    """The circuit breaker: answers are refused or malformed so often that going on would only cost money."""

    retryable = False


@dataclass(frozen=True)
class Stage:
    """One stage of a job: its name, the version of its prompt, who answers."""

    name: str
    version: str
    maker: Maker


async def work_shard(ledger: Ledger, stage: Stage, units: Sequence[Unit], work: Work, parallel: int) -> list[Record]:
    """Records of a shard, published. Already published by this attempt: read, nothing is asked.

    `parallel`: units under way at a time. Raises what the engine raises (not BadInput), FencedOut, StorageError.
    """
    keys = [unit.key for unit in units]
    before = await asyncio.to_thread(ledger.published, stage.name, keys)
    if before is not None:
        return before
    room = asyncio.Semaphore(parallel)

    async def one(unit: Unit) -> Record:
        async with room:
            try:
                outcome = await work(unit)
            except BadInput as error:
                outcome = Outcome(None, "error", " ".join(str(error).split())[:500])
            return make_record(unit, outcome, stage.name, stage.version, stage.maker)

    tasks = [asyncio.ensure_future(one(unit)) for unit in units]
    try:
        records = list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:  # after a failure nothing goes on asking behind our back
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return await asyncio.to_thread(ledger.publish, stage.name, records)


def cut_shards(units: Sequence[Unit], size: int = SHARD) -> list[list[Unit]]:
    """Units of different keys in shards of `size`."""
    unique = list({unit.key: unit for unit in units}.values())
    return [unique[start : start + size] for start in range(0, len(unique), size)]


def missing_units(units: Iterable[Unit], known: Mapping[str, Record], retry_errors: bool) -> list[Unit]:
    """Units that nobody has answered yet; with `retry_errors` also those that ended in an error row."""
    return [unit for unit in units if unit.key not in known or (retry_errors and not known[unit.key].usable)]


@dataclass(frozen=True, slots=True)
class Outline:
    """What the driver learns of a record while a stage runs: no texts."""

    status: str
    reason: str
    calls: int
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, record: Record) -> Outline:
        """Of one record."""
        replies = record.facts["replies"]
        sums = (sum(reply[name] for reply in replies) for name in ("prompt_tokens", "completion_tokens"))
        return cls(record.status, record.reason, len(replies), *sums)


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A published shard, as its worker reports it. Times are of the worker's clock, the start of its engine left out."""

    outlines: list[Outline]
    worker: str
    began: float
    ended: float


@dataclass
class Breaker:
    """Trips when more than `share` of the last `window` records of a stage were not "ok"."""

    share: float = 0.05
    window: int = 1000
    _last: deque[bool] = field(default_factory=deque)
    _reason: str = ""  # of the last one that was not

    def note(self, stage: str, status: str, reason: str) -> None:
        """One more record. Raises TooManyRejects."""
        self._last.append(status != "ok")
        if status != "ok":
            self._reason = reason or status
        if len(self._last) > self.window:
            self._last.popleft()
        bad = sum(self._last)
        if len(self._last) == self.window and bad > self.share * self.window:
            raise TooManyRejects(
                f"stage {stage}: {bad} of the last {self.window} answers were not acceptable (last: {self._reason}); "
                f"more than {self.share:.0%} stops the job. Look at the rejects in the ledger, then mend prompt or model"
            )


@dataclass
class Progress:
    """What happened in a stage so far. Rates count from the first request on: loading a model is no work."""

    stage: str
    todo: int
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    workers: set[str] = field(default_factory=set)
    began: float = math.inf
    ended: float = -math.inf

    def note(self, shard: ShardDone) -> None:
        """Count one shard."""
        for outline in shard.outlines:
            self.done += 1
            self.statuses[outline.status] += 1
            if outline.status != "ok":
                self.reasons[outline.reason.split(":")[0][:60]] += 1
            self.calls += outline.calls
            self.prompt_tokens += outline.prompt_tokens
            self.completion_tokens += outline.completion_tokens
        self.workers.add(shard.worker)
        self.began, self.ended = min(self.began, shard.began), max(self.ended, shard.ended)

    @property
    def working(self) -> float:
        """Seconds from the first request to the last answer."""
        return max(self.ended - self.began, 1e-3) if self.done else 0.0

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.done / self.working if self.done else 0.0

    def line(self) -> str:
        """One line of progress with rate and time left."""
        left = f"{(self.todo - self.done) / self.rate:.0f} s left" if self.rate else "time left unknown"
        return f"{self.stage}: {self.done}/{self.todo} rows, {self.rate:.1f} rows/s, {left}"

    def summary(self) -> dict[str, Any]:
        """For the job's record."""
        return {
            "units": self.todo, "calls": self.calls, "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens, "statuses": dict(self.statuses), "rejects": dict(self.reasons),
            "seconds": round(time.monotonic() - self.started, 2), "working_seconds": round(self.working, 3),
            "workers": len(self.workers),
        }  # fmt: skip
