"""Finds a rank that stopped answering, saves the stacks of all ranks, and ends them so that the run can start again.

Every rank has a small companion process. The loop tells it of every step (a line through a pipe); when no line comes for
`training.hang_timeout_s`, the companion

1. makes the rank write the stacks of its threads (SIGUSR1 to faulthandler, which needs no lock of the interpreter, so a rank
   stuck in compiled code answers too; a stopped process is continued for it),
2. stores them in the run as logs/attempt-0001/stacks-rank-1.1.txt, with a note that says where the rank stands,
3. kills the rank after GRACE_S, which Ray takes for a dead worker.

One silent rank keeps the others waiting in a collective, so all companions strike at once and the stacks of all ranks are
saved; the grace leaves each the time to store its own. From the first step on; a start is bounded by the timeouts of the
collectives and of Ray's worker group.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reid_dist.runs.scratch import Scratch

if TYPE_CHECKING:
    from reid_dist.runs import Run

GRACE_S = 10.0
DUMP_S = 5.0  # within which a rank writes its stacks
_FRAME = re.compile(r'  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>.*)')
_WAITING = ("torch/distributed/", "ray/train/")  # frames of a rank that waits for the others
_TOP = 8  # frames among which such a one is looked for


@contextlib.contextmanager
def watched(run: Run, rank: int, start: int, limit_s: float) -> Iterator[Callable[[int], None]]:
    """A `beat(step)` for the loop; a rank that is silent for `limit_s` seconds after its first beat is ended. 0: never.

    `start`: which start of the workers within the attempt this is, from 1.
    """
    if limit_s <= 0:
        yield lambda step: None
        return
    with Scratch("stacks") as folder:
        path = folder / "stacks"
        with path.open("wb") as stacks:
            faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True, chain=False)
            words = [str(os.getpid()), str(path), run.uri, str(run.attempt), str(rank), str(start), str(limit_s)]
            companion = subprocess.Popen(
                [sys.executable, "-m", "reid_dist.training.watchdog", *words],
                stdin=subprocess.PIPE, start_new_session=True, cwd=Path(__file__).resolve().parents[2],
            )  # fmt: skip
            assert companion.stdin is not None
            pipe = companion.stdin.fileno()
            os.set_blocking(pipe, False)

            def beat(step: int) -> None:
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    os.write(pipe, f"{step}\n".encode())

            try:
                yield beat
            finally:
                faulthandler.unregister(signal.SIGUSR1)
                companion.stdin.close()
                companion.wait(timeout=30)


def guard(pid: int, path: Path, run_uri: str, attempt: int, rank: int, start: int, limit_s: float) -> None:
    """The companion's life: returns when the rank ends by itself, else after it has killed it."""
    step = _await_silence(sys.stdin.fileno(), limit_s)
    if step is None:
        return
    began = time.monotonic()
    text = _stacks(pid, path)
    waiting, where = standing(text)
    from reid_dist.errors import RunError
    from reid_dist.runs import Run

    run = Run.attach(run_uri, attempt)
    key = f"logs/attempt-{attempt:04d}/stacks-rank-{rank}.{start}.txt"
    facts: dict[str, Any] = {"rank": rank, "start": start, "step": step, "seconds": limit_s, "stacks": key}
    try:
        run.store.write(key, text.encode())
        run.note("hang", waiting=waiting, where=where, **facts)
    except RunError as error:
        sys.stderr.write(f"rank {rank} hangs and its stacks could not be stored ({error}):\n{text}\n")
    time.sleep(max(0.0, began + GRACE_S - time.monotonic()))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _await_silence(pipe: int, limit_s: float) -> int | None:
    """The last step told before `limit_s` seconds of silence; None when the pipe was closed. Waits for ever for the first."""
    step: int | None = None
    while True:
        ready, _, _ = select.select([pipe], [], [], None if step is None else limit_s)
        if not ready:
            return step
        data = os.read(pipe, 65536)
        if not data:
            return None
        told = data.split(b"\n")
        step = int(told[-2]) if len(told) > 1 and told[-2] else step


def _stacks(pid: int, path: Path) -> str:
    """The stacks that the process writes when asked, after a line about its state."""
    state = _state(pid)
    text = f"process {pid}, state {state}\n"
    try:
        os.kill(pid, signal.SIGUSR1)
        if state.startswith("T"):
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return text + "it is gone\n"
    deadline, size = time.monotonic() + DUMP_S, -1
    try:
        while time.monotonic() < deadline and (size <= 0 or path.stat().st_size != size):
            size = path.stat().st_size
            time.sleep(0.2)
        return text + (path.read_text(errors="replace") or f"no stack was written within {DUMP_S:.0f} s\n")
    except FileNotFoundError:  # it died meanwhile, and another process removed its folder
        return text + "it is gone\n"


def _state(pid: int) -> str:
    """ "S (sleeping)" and the like, from /proc."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.partition(":")[2].strip()
    return "unknown"


def standing(text: str) -> tuple[bool, str]:
    """(whether the rank waits for the others, "in FUNCTION (FILE:LINE)") of the thread that trains, from faulthandler's text."""
    if ", state T" in text.partition("\n")[0]:
        return False, "because its process was stopped"
    for block in re.split(r"\n(?=Thread |Current thread )", text):
        frames = [match for match in map(_FRAME.fullmatch, block.splitlines()) if match]
        ours = [f["file"].endswith("reid_dist/training/launch.py") and f["name"] == "_worker" for f in frames]
        if not any(ours):
            continue
        inner = frames[: min(ours.index(True), _TOP)]  # what called us is Ray's, in every rank
        waiting = any(part in frame["file"] for frame in inner for part in _WAITING)
        top = frames[0]
        return waiting, f"in {top['name']} ({Path(top['file']).name}:{top['line']})"
    return False, text.partition("\n")[0]


if __name__ == "__main__":
    process, stacks_at, run_at, attempt_of, rank_of, start_of, limit = sys.argv[1:]
    guard(int(process), Path(stacks_at), run_at, int(attempt_of), int(rank_of), int(start_of), float(limit))
