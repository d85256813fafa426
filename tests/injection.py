"""A plan of faults for the processes of a run (tests/inject/sitecustomize.py carries it out), and what became of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

INJECT = Path(__file__).resolve().parent / "inject"


@dataclass(frozen=True)
class Start:
    """One process of a rank: steps done before its first and its last step, with their times (seconds since the epoch)."""

    pid: int
    first: int
    first_time: float
    last: int
    last_time: float


class Faults:
    """Faults by name, each struck once per rank unless `always`. Adding one takes effect at once in running processes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._plan: list[dict[str, Any]] = []
        self._write()

    def add(
        self,
        name: str,
        at: str,
        number: int,
        do: str,
        *,
        rank: int | None = None,
        always: bool = False,
        onwards: bool = False,
    ) -> None:
        """`do`: kill, stop, hang, raise, wait (until `open`), pace (1 s a step, until `open`). `number`: the step or epoch;
        with `onwards` all from it."""
        self._plan.append(
            {"name": name, "at": at, "number": number, "do": do, "rank": rank, "always": always, "onwards": onwards}
        )
        self._write()

    def _write(self) -> None:
        temporary = self.folder / "plan.part"
        temporary.write_text(json.dumps(self._plan))
        temporary.replace(self.folder / "plan.json")

    @property
    def environment(self) -> dict[str, str]:
        """What a process of the run needs to be struck."""
        return {
            "REID_FAULTS": str(self.folder),
            "PYTHONPATH": f"{INJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }

    def reached(self, name: str) -> bool:
        """Whether a rank waits at this one."""
        return (self.folder / f"{name}.reached").exists()

    def struck(self, name: str) -> list[int]:
        """Ranks that it struck."""
        return sorted(int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"{name}-*.struck"))

    def starts(self, rank: int = 0) -> list[Start]:
        """What became of the rank: one entry per process of it that made a step."""
        path = self.folder / f"steps-{rank}"
        found: dict[int, Start] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            moment, step, pid = float(line.split()[0]), *map(int, line.split()[1:])
            first = found.get(pid, Start(pid, step, moment, step, moment))
            found[pid] = replace(first, last=step, last_time=moment)
        return list(found.values())

    def open(self, name: str) -> None:
        """Let the ranks that wait go on."""
        (self.folder / f"{name}.open").touch()


def wait_until(
    condition: Callable[[], bool], what: str, timeout: float = 240, alive: Callable[[], str] | None = None
) -> None:
    """Until `condition()`; AssertionError after `timeout` seconds, or with what `alive` says once it says something."""
    deadline = time.monotonic() + timeout
    while not condition():
        said = alive() if alive else ""
        assert not said, f"{what}: {said}"
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.2)
