"""Elastic workers: 4 -> 2 -> 3 within one attempt of one run, as a node is announced to go and another one comes."""

from __future__ import annotations

from pathlib import Path

from reid_dist.runs import Run
from tests.chaos.struck import Row, gate, left_behind, quiet, rows_of, words
from tests.e2e.cluster import head
from tests.e2e.job import Job
from tests.injection import Faults, wait_until

STEPS = 24
LENGTH = ("training.epochs=400", f"training.max_steps={STEPS}")
ELASTIC = ("training.num_workers=4", "training.min_workers=2", "training.resize_every_s=20")
TOLERANCE = 1e-4  # of the law, relative, over some 20 steps


def _counts(run: Path) -> list[int]:
    """Sizes of the worker groups so far."""
    notes = Run.read(str(run)).notes() if (run / "run.json").exists() else []
    return [int(note["count"]) for note in notes if note["kind"] == "workers"]


def _kinds(run: Path) -> set[str]:
    return {note["kind"] for note in Run.read(str(run)).notes()}


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(note["step"], note["loss"]) for note in Run.read(str(run)).metrics() if note["kind"] == "step"]


def four_two_three(folder: Path, tables: Path) -> list[Row]:
    """A node of two workers is announced to go; a node for one more comes. No failure is counted, no loss differs."""
    uninterrupted = [(int(record["step"]), record["loss"]) for record in quiet("comoe/tiny", tables, *LENGTH)["losses"]]
    faults, run = Faults(folder / "faults"), folder / "elastic"
    timing = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
    with head(0, False, OMP_NUM_THREADS="1", **timing, **faults.environment) as cluster:
        cluster.add(2)
        going = cluster.add(2)
        command = words("comoe/tiny", tables, str(folder), "elastic", *LENGTH, *ELASTIC)
        job = Job(*command, environment=cluster.client)
        try:
            gate(faults, "four", 5, job)
            faults.add("few", "step", 10, "wait")
            cluster.drain(going, 10)
            faults.open("four")
            wait_until(lambda: "drain" in _kinds(run), "the checkpoint before the node goes", 60, job.ended)
            going.end()
            wait_until(lambda: _counts(run) == [4, 2], "two workers", 400, job.ended)
            faults.add("more", "step", 16, "wait")
            faults.open("few")
            wait_until(lambda: faults.reached("more"), "step 16", 400, job.ended)
            cluster.add(1)
            wait_until(lambda: _counts(run) == [4, 2, 3], "three workers", 400, job.ended)
            faults.open("more")
            code, record, err = job.finish(600)
        finally:
            if not job.ended():
                job.kill()
    assert code == 0, err[-3000:]
    assert (record["steps"], record["num_workers"], record["restarts"]) == (STEPS, 3, 0), record
    ours = _losses(run)
    assert [step for step, _ in ours] == [step for step, _ in uninterrupted] == list(range(1, STEPS + 1))
    worst = max(abs(a / b - 1) for (_, a), (_, b) in zip(ours, uninterrupted, strict=True))
    rows = rows_of(faults, ["4 workers become 2 (node announced to go)", "2 workers become 3 (node came)"], {})
    for row in rows:
        row.survived, row.left_behind = worst < TOLERANCE, len(left_behind(Run.read(str(run))))
        row.note = f"losses of {STEPS} steps within {worst:.0e} of the uninterrupted run's; no failure counted"
    return rows
