"""A job in a process of its own, as a user or `ray job submit` starts it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from tests.e2e.cluster import ROOT
from tests.worlds import read_record


class Job:
    """`python -m <words>`; with its own private Ray, or the cluster that `environment` names (Head.client). `before`: the words
    of a command that submits it."""

    def __init__(self, *words: str, environment: Mapping[str, str] | None = None, before: Sequence[str] = ()) -> None:
        if environment is None:
            environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        # Files: a pipe that nobody reads would block the job.
        self.out, self.log = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", *words],
            cwd=ROOT, env=environment, stdout=self.out, stderr=self.log, text=True,
        )  # fmt: skip

    def finish(self, timeout: float = 300) -> tuple[int, dict[str, Any], str]:
        """(exit code, record, stderr)."""
        code = self.process.wait(timeout=timeout)
        out = _text(self.out)
        assert out.strip(), self.said()
        return code, read_record(out), self.said()

    def said(self) -> str:
        """What stands on stderr so far."""
        return _text(self.log)

    def ended(self) -> str:
        """Why it ended; empty while it runs."""
        code = self.process.poll()
        return "" if code is None else f"the job ended with {code}: {_text(self.out)[-2500:]}{self.said()[-2500:]}"

    def wait_for(self, condition: Callable[[], bool], timeout: float = 200, period: float = 0.3) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.said()[-3000:]
            assert time.monotonic() < deadline, f"the job did not get there in time: {self.said()[-3000:]}"
            time.sleep(period)

    def kill(self) -> None:
        """SIGKILL, and no sooner back than it is gone."""
        self.process.kill()
        self.process.wait()

    def workers(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in found if "RayTrainWorker" in " ".join(cmdline(child))]


def _text(file: IO[str]) -> str:
    """What the job wrote so far; it writes at the file's own place, which is left where it is."""
    descriptor = file.fileno()
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")


def cmdline(process: psutil.Process) -> list[str]:
    """Words of a process, none when it is gone."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, by its path there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
