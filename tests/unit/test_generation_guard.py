"""Children of a killed process end; those of a living one, and strangers, do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.generation.guard import Guard, children, start_time, watch

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import subprocess, sys, time
from reid_dist.generation.guard import Guard
earlier = subprocess.Popen(["sleep", "60"])
guard = Guard()
child = subprocess.Popen(["sh", "-c", "sleep 60 & wait"])
time.sleep(1.2)
if sys.argv[1] == "settled":
    guard.settle()
later = subprocess.Popen(["sleep", "60"]) if sys.argv[1] == "settled" else earlier
print(child.pid, guard.process.pid, earlier.pid, later.pid, flush=True)
time.sleep(60)
"""


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("when", ["loading", "settled"])
def test_children_do_not_outlive_a_killed_parent(when: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, when], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    child, guard, *others = (int(word) for word in parent.stdout.readline().split())
    grandchild = next(iter(children(child)))
    try:
        time.sleep(0.7)
        assert all(start_time(pid) for pid in (child, grandchild, guard)), "nothing is ended while the parent lives"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert until(lambda: not start_time(child) and not start_time(grandchild))
        assert until(lambda: not start_time(guard)), "the guard ends itself"
        assert all(start_time(other) for other in others), "what is not the engine's is left alone"
    finally:
        for pid in (child, grandchild, guard, *others):
            if start_time(pid):
                os.kill(pid, signal.SIGKILL)


def test_closing_waits_and_kills_what_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reid_dist.generation.guard.GRACE_S", 0.3)
    guard = Guard()
    child = subprocess.Popen(["sleep", "60"])
    guard.settle()
    assert [pid for pid, _ in guard.wards] == [child.pid]
    guard.close()
    assert child.wait(5) == -signal.SIGKILL
    assert not start_time(guard.process.pid)


def test_a_number_given_out_anew_is_not_touched() -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        watch((2**22 + 1, "1"), set(), [(stranger.pid, "1")])
        assert stranger.poll() is None
        watch((2**22 + 1, "1"), set(), [(stranger.pid, start_time(stranger.pid))])
        assert stranger.wait(5) == -signal.SIGKILL
    finally:
        stranger.kill()
        stranger.wait()
