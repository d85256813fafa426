"""A guard for an engine's child processes: when the process that started them is killed, they are ended too.

vLLM's core lives in a child that does not notice when its parent is killed with SIGKILL (out of memory, `kill -9`, a lost
Ray actor) and would keep the GPU. The guard is a process of its own that watches the parent. While a model loads it follows
every child that appears; once it is told which belong to the engine, those alone. Processes are known by number and start
time, so a number that was given out anew is never touched.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

PERIOD_S = 0.5
GRACE_S = 10.0
Known = tuple[int, str]  # process number, start time


def start_time(pid: int) -> str:
    """The kernel's start time of a process; "" when there is none (or it is a zombie)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
            fields = stream.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def children(pid: int) -> set[int]:
    """All descendants of a process."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as stream:
                    parents[int(name)] = int(stream.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
    found: set[int] = set()
    fresh = {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


def _shared(pid: int) -> bool:
    """Python's resource tracker serves all of its parent's children and ends with the parent by itself."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            return b"resource_tracker" in stream.read()
    except OSError:
        return True


def new_children(pid: int, before: set[int]) -> list[Known]:
    """Descendants that were not there before."""
    fresh = sorted(children(pid) - before)
    return [(one, began) for one in fresh if not _shared(one) and (began := start_time(one))]


def end(wards: Iterable[Known]) -> None:
    """SIGKILL to those that are still there."""
    for pid, began in wards:
        if start_time(pid) == began:
            os.kill(pid, signal.SIGKILL)


class Guard:
    """A guard of the children that this process starts from now on."""

    def __init__(self) -> None:
        self._before = children(os.getpid())
        self.wards: list[Known] = []
        known = [(pid, start_time(pid)) for pid in (os.getpid(), *self._before)]
        self.process = subprocess.Popen(
            [sys.executable, "-S", __file__, *(_word(one) for one in known)],
            start_new_session=True, stdin=subprocess.PIPE,
        )  # fmt: skip
        self._before.add(self.process.pid)

    def settle(self) -> None:
        """All children are there: these are the wards."""
        self.wards = new_children(os.getpid(), self._before)
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(_word(ward) for ward in self.wards).encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """The wards were asked to end: wait for them, kill what has not ended in time, and end the guard."""
        wards = self.wards or new_children(os.getpid(), self._before)
        deadline = time.monotonic() + GRACE_S
        while any(start_time(pid) == began for pid, began in wards) and time.monotonic() < deadline:
            time.sleep(0.05)
        end(wards)
        self.process.kill()
        self.process.communicate()


def watch(parent: Known, before: set[int], wards: list[Known] | None = None) -> None:
    """Wait until the parent is gone, then end the wards that are still there. Without wards, they are the parent's new
    children until stdin names them.
    """
    settled, found = wards is not None, list(wards or [])
    while start_time(parent[0]) == parent[1]:
        if settled:
            if not any(start_time(pid) == began for pid, began in found):
                return
            time.sleep(PERIOD_S)
        elif select.select([sys.stdin], [], [], PERIOD_S)[0]:
            line = sys.stdin.readline()
            if not line:
                break  # the pipe's other end is gone, and with it the parent
            found, settled = [_known(word) for word in line.split()], True
        else:
            found = new_children(parent[0], before | {os.getpid()})
    end(found)


def _word(known: Known) -> str:
    return f"{known[0]}:{known[1]}"


def _known(word: str) -> Known:
    pid, _, began = word.partition(":")
    return int(pid), began


if __name__ == "__main__":
    watch(_known(sys.argv[1]), {_known(word)[0] for word in sys.argv[2:]})
