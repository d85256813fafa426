"""A rank that stops answering, in a process of its own: its stacks are stored and it is ended, whatever holds it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from reid_dist.runs import Run
from tests.unit.test_faulty_store import start

WAYS = {
    "sleeping": "time.sleep(600)",
    "holding": "re.match(r'(a+)+$', 'a' * 60 + 'b')",  # in compiled code that holds the interpreter's lock
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(600)",
    "finished": "pass",
    "waiting": "time.sleep(3)",  # before its first beat: a start may take long
}
PROGRAM = """
import os, re, signal, sys, time
from reid_dist.runs import Run
from reid_dist.training.watchdog import watched
def stuck():
    {way}
with watched(Run.attach(sys.argv[1], 1), int(sys.argv[2]), 1, 1.5) as beat:
    for step in range(1, 4):
        if {beats}: beat(step)
        time.sleep(0.1)
    stuck()
print("done")
"""


def test_a_silent_rank_is_ended_with_its_stacks_saved_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    run = start(tmp_path)
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(way=way, beats=name != "waiting"), run.uri, str(rank)],
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
        )
        for rank, (name, way) in enumerate(WAYS.items())
    }  # fmt: skip
    out = {name: process.communicate(timeout=120)[0].strip() for name, process in processes.items()}
    codes = {name: process.returncode for name, process in processes.items()}
    killed = -signal.SIGKILL
    assert codes == {"sleeping": killed, "holding": killed, "stopped": killed, "finished": 0, "waiting": 0}
    assert out == {"sleeping": "", "holding": "", "stopped": "", "finished": "done", "waiting": "done"}
    notes = {note["rank"]: note for note in Run.read(run.uri).notes() if note["kind"] == "hang"}
    assert sorted(notes) == [0, 1, 2]
    for rank, note in notes.items():
        text = run.store.read(f"logs/attempt-0001/stacks-rank-{rank}.1.txt").decode()
        assert "in stuck" in text, text
        assert (note["step"], note["seconds"], note["start"]) == (3, 1.5, 1)
    assert "stopped" in notes[2]["where"]
