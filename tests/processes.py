"""Processes of a job under test, found by a mark in their environment, which every child inherits."""

from __future__ import annotations

import os
import time
import uuid

import psutil

MARK = "REID_TEST_MARK"


def new_mark() -> str:
    """A value of MARK that nobody else has."""
    return uuid.uuid4().hex


def marked(mark: str, word: str = "") -> list[psutil.Process]:
    """Living processes (this one left out) with the mark, whose command line contains `word`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == mark and word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_all_ended(mark: str, seconds: float = 30) -> None:
    """No marked process is left after at most so long."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, [" ".join(process.cmdline())[:200] for process in left]
