"""Children of a killed process end; those of a living one, and strangers, do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from reid_dist.generation.guard import children, start_time, watch

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import subprocess, sys, time
from reid_dist.generation.guard import guard
child = subprocess.Popen(["sleep", "60"])
other = subprocess.Popen(["sleep", "60"])
watcher = guard([child.pid])
print(child.pid, other.pid, watcher.pid, flush=True)
time.sleep(60)
"""


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_children_do_not_outlive_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    child, other, watcher = (int(word) for word in parent.stdout.readline().split())
    try:
        assert {child, other, watcher} <= children(parent.pid)
        time.sleep(1.2)
        assert start_time(child), "nothing is ended while the parent lives"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert until(lambda: not start_time(child))
        assert until(lambda: not start_time(watcher)), "the guard ends itself"
        assert start_time(other), "what was not named is left alone"
    finally:
        for pid in (child, other, watcher):
            if start_time(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_number_given_out_anew_is_not_touched() -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        watch((2**22 + 1, "1"), [(stranger.pid, "1")])
        assert stranger.poll() is None
        watch((2**22 + 1, "1"), [(stranger.pid, start_time(stranger.pid))])
        assert stranger.wait(5) == -signal.SIGKILL
    finally:
        stranger.kill()
        stranger.wait()
