"""`python -m jobs.postmortem RUN`

What happened to a run, from storage alone, when the cluster is gone: one time line of its attempts, restarts, checkpoints,
requests to stop and every other note, with the warnings and errors of the driver's and the ranks' logs, and the rank that
failed first. Exit 0 when the story could be told, however it ended.
"""

from __future__ import annotations

import calendar
import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from jobs._job import refuse_unknown_flags, run_job, split_words
from reid_dist.errors import UserError
from reid_dist.runs import Run
from reid_dist.runs.failures import collateral
from reid_dist.storage import Entry

logger = logging.getLogger("reid_dist.jobs")
USAGE = __doc__ or ""

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3})Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) (\S+): (.*)")
_LOG = re.compile(r"logs/attempt-(\d{4,})/(driver|rank-(\d+))(?:\.(\d+))?\.log")
_ENDED = "ended by "
_STACKS = re.compile(r"logs/attempt-\d{4,}/stacks-rank-\d+\.\d+\.txt")
_FROM_OUTSIDE = ("SystemExit", "KeyboardInterrupt", "Terminated", "Stopped")
SKEW_S = 5.0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. `time`: seconds since the epoch by the clock of `who`'s host."""

    time: float
    attempt: int
    who: str  # "driver", "rank 1", "run"
    what: str


@dataclass(slots=True)
class Log:
    """One process's log: `lines` are (time, level, text with its traceback)."""

    attempt: int
    who: str
    rank: int | None
    number: int  # which start of this process within the attempt
    stored: float
    lines: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def end(self) -> tuple[float, str] | None:
        """(time, cause) of the error that ended it; None for a process that finished, or fell silent."""
        for moment, level, text in self.lines:
            if level == "ERROR" and text.startswith(_ENDED):
                return moment, text.splitlines()[-1].strip()
        return None

    @property
    def own_fault(self) -> bool:
        """Whether it ended by an error of its own: not of another rank's death, not because somebody ended it."""
        ends = [text for _, level, text in self.lines if level == "ERROR" and text.startswith(_ENDED)]
        kind = ends[0].splitlines()[0].removeprefix(_ENDED).strip() if ends else ""
        return bool(ends) and kind not in _FROM_OUTSIDE and not collateral(ends[0].splitlines()[-1])


def main(argv: list[str]) -> dict[str, Any]:
    """The job. Raises UserError, RunError."""
    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, set(), USAGE)
    if values or len(words) != 1:
        raise UserError(f"name one run: python -m jobs.postmortem RUN, got {' '.join(words + values) or 'nothing'}")
    return postmortem(Run.read(words[0]))


def postmortem(run: Run) -> dict[str, Any]:
    """{"run", "status", "first_failing", "failures", "timeline", "notices"}; the time line is logged too, one event per line."""
    logs, notices = read_logs(run)
    attempts = read_attempts(run)
    events = sorted([*attempt_events(attempts), *note_events(run), *log_events(logs)], key=lambda event: event.time)
    failures = [failure for failure in map(first_failing, failed_starts(run, logs, attempts)) if failure]
    failures = sorted(failures + untold(run, failures), key=lambda failure: (failure["attempt"], failure["start"]))
    for event in events:
        logger.info("%s  attempt %d  %-8s %s", stamp(event.time), event.attempt, event.who, event.what)
    for failure in failures:
        logger.warning(
            "attempt %d, start %d: first failing: %s: %s", *(failure[k] for k in ("attempt", "start", "who", "cause"))
        )
    for notice in notices:
        logger.warning("%s", notice)
    last = attempts[max(attempts)].get("end") if attempts else None
    status = "done" if run.finished else last["reason"] if last else "no end was recorded: running, or killed"
    logger.info("%s: %s; %d attempts", run.uri, status, len(attempts))
    return {
        "run": run.uri,
        "status": status,
        "first_failing": failures[-1] if failures else None,
        "failures": failures,
        "timeline": [{**asdict(event), "utc": stamp(event.time)} for event in events],
        "notices": notices,
    }


def stamp(moment: float) -> str:
    """UTC to the millisecond, as in the logs."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment)) + f".{int(moment % 1 * 1000):03d}"


# --- what is stored


def read_attempts(run: Run) -> dict[int, dict[str, dict[str, Any]]]:
    """{attempt: {"start" | "end" | "stop": content}}; content that cannot be read is left out."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for entry in run.store.list("attempts/"):
        match = re.fullmatch(r"attempts/(\d{4,})(?:-(end|stop))?\.json", entry.key)
        if match:
            content = _json(run, entry.key)
            if content is not None:
                found.setdefault(int(match[1]), {})[match[2] or "start"] = content
    return found


def _json(run: Run, key: str) -> dict[str, Any] | None:
    try:
        content = json.loads(run.store.read(key))
    except (ValueError, FileNotFoundError) as error:
        logger.warning("%s cannot be read: %s", key, error)
        return None
    return content if isinstance(content, dict) and "time" in content else None


def read_logs(run: Run) -> tuple[list[Log], list[str]]:
    """(the stored logs, notices about them)."""
    logs, notices = [], []
    for entry in run.store.list("logs/"):
        match = _LOG.fullmatch(entry.key)
        if match is None and _STACKS.fullmatch(entry.key):
            continue  # its note is on the time line
        if match is None:
            notices.append(f"{entry.key} lies beside the logs ({entry.size} bytes)")
            continue
        rank = int(match[3]) if match[3] else None
        log = Log(int(match[1]), "driver" if rank is None else f"rank {rank}", rank, int(match[4] or 1), entry.modified)
        log.lines = list(parse(run.store.read(entry.key).decode(errors="replace")))
        logs.append(log)
        notices += _skewed(log, entry)
    return logs, notices


def parse(text: str) -> Iterator[tuple[float, str, str]]:
    """(time, level, text) of each record; lines that begin no record belong to the one before."""
    current: tuple[float, str, str] | None = None
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            if current is not None:
                current = (*current[:2], f"{current[2]}\n{line}")
            continue
        if current is not None:
            yield current
        moment = calendar.timegm(time.strptime(match[1], "%Y-%m-%d %H:%M:%S")) + int(match[2]) / 1000
        current = (moment, match[3], match[5])
    if current is not None:
        yield current


def _skewed(log: Log, entry: Entry) -> list[str]:
    """A line cannot be younger than its object, so a host whose clock is ahead gives itself away."""
    ahead = log.lines[-1][0] - entry.modified if log.lines else 0.0
    if ahead < SKEW_S:
        return []
    return [
        f"the clock of {log.who} (attempt {log.attempt}) is at least {ahead:.0f} s ahead of the storage's: order is uncertain"
    ]


# --- events


def attempt_events(attempts: dict[int, dict[str, dict[str, Any]]]) -> Iterator[Event]:
    """Begin, request to stop and end of every attempt."""
    for number, parts in attempts.items():
        for part, content in parts.items():
            text = {
                "start": f"attempt begins on {content.get('host')}, process {content.get('pid')}",
                "stop": f"asked to stop: {content.get('reason')}",
                "end": f"attempt ends with exit code {content.get('exit_code')}: {content.get('reason')}",
            }[part]
            yield Event(float(content["time"]), number, "run", _short(text))


def note_events(run: Run) -> Iterator[Event]:
    """Checkpoints, restarts and whatever else was noted (drains, resizes), facts for the card left out."""
    for note in run.notes():
        if note["kind"] == "facts":
            continue
        if note["kind"] == "checkpoint":
            text = f"checkpoint of step {note['step']} committed, {note['size'] / 1e6:.1f} MB"
        elif note["kind"] == "restart":
            text = f"restart from step {note['step']}: {note['reason']}"
        elif note["kind"] == "hang":
            told = "waits for the others" if note["waiting"] else "stands"
            text = f"rank {note['rank']} hangs after step {note['step']}: {told} {note['where']}; {note['stacks']}"
        elif note["kind"] == "failure":
            text = f"rank {note['rank']} failed at step {note['step']}: {note['error']}"
        else:
            facts = {key: value for key, value in note.items() if key not in ("kind", "attempt", "time")}
            text = f"{note['kind']} {json.dumps(facts, default=str)}"
        yield Event(float(note["time"]), int(note["attempt"]), "run", _short(text))


def log_events(logs: list[Log]) -> Iterator[Event]:
    """First line, warnings, errors and the last line of every log."""
    for log in logs:
        for position, (moment, level, text) in enumerate(log.lines):
            if level in ("WARNING", "ERROR", "CRITICAL"):
                yield Event(moment, log.attempt, log.who, f"{level.lower()}: {_short(text)}")
            elif position == 0:
                yield Event(moment, log.attempt, log.who, f"log begins: {_short(text)}")
            elif position == len(log.lines) - 1:
                yield Event(moment, log.attempt, log.who, f"last line: {_short(text)}")


def _short(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    joined = lines[0] if len(lines) < 2 else f"{lines[0]} ... {lines[-1]}"
    return joined[:400]


# --- who was first


def failed_starts(run: Run, logs: list[Log], attempts: dict[int, dict[str, dict[str, Any]]]) -> list[list[Log]]:
    """The rank logs of every start of the workers that failed: a restart followed, or the attempt ended badly or not at all."""
    restarts: dict[int, int] = {}
    for note in run.notes():
        restarts[note["attempt"]] = restarts.get(note["attempt"], 0) + (note["kind"] == "restart")
    newest = max(attempts, default=0)
    starts: dict[tuple[int, int], list[Log]] = {}
    for log in logs:
        if log.rank is not None:
            starts.setdefault((log.attempt, log.number), []).append(log)
    failed = []
    for (attempt, number), ranks in sorted(starts.items()):
        end = attempts.get(attempt, {}).get("end")
        asked = "stop" in attempts.get(attempt, {})
        bad_end = attempt != newest if end is None else end.get("exit_code") != 0 and not asked
        if number <= restarts.get(attempt, 0) or bad_end or any(log.own_fault for log in ranks):
            failed.append(ranks)
    return failed


def first_failing(ranks: list[Log]) -> dict[str, Any] | None:
    """{"attempt", "start", "rank", "who", "time", "utc", "cause", "certain"} of the rank that failed first in one start.

    First the earliest error of a rank's own; without one, a rank that fell silent while others died of its absence
    (killed, or its node lost); without one, the earliest of the errors. None when all ranks fell silent together.
    """
    ended = sorted(((log.end, log) for log in ranks if log.end), key=lambda pair: pair[0][0])
    own = [pair for pair in ended if pair[1].own_fault]
    silent = sorted((log for log in ranks if log.end is None and log.lines), key=lambda log: log.lines[-1][0])
    if own or (ended and not silent):
        (moment, cause), log = (own or ended)[0]
        certain = bool(own)
    elif ended:
        log, certain = silent[0], len(silent) == 1
        moment, cause = (
            log.lines[-1][0],
            f"fell silent (killed, or its node was lost) after: {_short(log.lines[-1][2])}",
        )
    else:
        return None
    facts = {"attempt": log.attempt, "start": log.number, "rank": log.rank, "who": log.who, "time": moment}
    return {**facts, "utc": stamp(moment), "cause": cause, "certain": certain}


def untold(run: Run, told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The restarts after which no log names a rank, because all of that start fell silent: the rank that the watchdog found
    hanging, or what the driver noted."""
    counted: dict[int, int] = {}
    missing = []
    for note in run.notes():
        if note["kind"] != "restart":
            continue
        attempt = note["attempt"]
        counted[attempt] = counted.get(attempt, 0) + 1
        if any((failure["attempt"], failure["start"]) == (attempt, counted[attempt]) for failure in told):
            continue
        hung = _hung(run, attempt, counted[attempt])
        facts = {"attempt": attempt, "start": counted[attempt], "rank": None, "who": "a rank that left no word"}
        if hung:
            facts |= {"rank": hung["rank"], "who": f"rank {hung['rank']}"}
        cause = {"time": note["time"], "utc": stamp(note["time"]), "cause": note["reason"], "certain": bool(hung)}
        missing.append({**facts, **cause})
    return missing


def _hung(run: Run, attempt: int, start: int) -> dict[str, Any] | None:
    """The watchdog's note about the rank for which the others waited."""
    for note in run.notes():
        if note["kind"] == "hang" and (note["attempt"], note["start"]) == (attempt, start) and not note["waiting"]:
            return note
    return None


if __name__ == "__main__":
    run_job("postmortem", main)
