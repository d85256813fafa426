"""A guard for an engine's child processes: when the process that started them is killed, they are ended too.

vLLM's core lives in a child that does not notice when its parent is killed with SIGKILL (out of memory, `kill -9`, a lost
Ray actor) and would keep the GPU. The guard is a process of its own, told which process to watch and which to end; it
knows them by number and start time, so a number that was given out anew is never touched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

PERIOD_S = 0.5
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


def guard(pids: Iterable[int]) -> subprocess.Popen[bytes]:
    """Start a guard of this process's `pids`. End it (`terminate`) when they were ended in order."""
    known = [(pid, start_time(pid)) for pid in (os.getpid(), *pids)]
    words = [f"{pid}:{began}" for pid, began in known if began]
    return subprocess.Popen([sys.executable, "-S", __file__, *words], start_new_session=True, stdin=subprocess.DEVNULL)


def watch(parent: Known, wards: list[Known]) -> None:
    """Wait until the parent is gone, then end the wards that are still there."""
    while start_time(parent[0]) == parent[1]:
        if not any(start_time(pid) == began for pid, began in wards):
            return
        time.sleep(PERIOD_S)
    for pid, began in wards:
        if start_time(pid) == began:
            os.kill(pid, signal.SIGKILL)


def _known(word: str) -> Known:
    pid, _, began = word.partition(":")
    return int(pid), began


if __name__ == "__main__":
    watch(_known(sys.argv[1]), [_known(word) for word in sys.argv[2:]])
