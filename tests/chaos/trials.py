"""A worker and a node, killed inside running trials of a sweep on two nodes; the lost node is not replaced.

Two of three trials run at a time, one on each node. Both wait at a gate while the training process of one is killed. When a trial
is done and the third has begun, what runs waits again, and the whole node of the third trial goes: raylet, workers and, where it
ran there, the trial's driver. The node that is left has room for one trial at a time.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reid_dist.runs import Run
from tests.chaos.struck import Row, left_behind, same_weights, warm
from tests.dist.cells import train_recipe
from tests.e2e.cluster import Head, Node, head
from tests.e2e.job import Job, digests
from tests.injection import Faults, Start, wait_until
from tuning.state import SweepState

logger = logging.getLogger(__name__)

STEPS, GATE = 16, 5
RATES = [1e-3, 3e-4, 1e-4]


def sweep_file(folder: Path, tables: Path) -> Path:
    """Three rates; one trial fills a node of one CPU, the driver of another may stand beside it."""
    training = {"epochs": 8, "max_steps": STEPS, "eval_every": 1, "checkpoint_every_steps": 2, "log_every": 1}
    path = folder / "struck.yaml"
    path.write_text(yaml.safe_dump({
        "name": "struck", "base": "comoe/tiny", "output": str(folder / "sweeps"),
        "set": {"data": {"root": str(tables)}, "training": training},
        "axes": {"optim.lr": RATES}, "metric": "mAP",
        "resources": {"num_workers": 1, "cpus_per_worker": 0.7, "driver": {"CPU": 0.1}},
    }))  # fmt: skip
    return path


@dataclass
class Struck:
    """A sweep whose trials are struck. Their processes are told apart by pid: each is rank 0 of its own trial."""

    cluster: Head
    faults: Faults
    job: Job
    state: SweepState

    def starts(self) -> list[Start]:
        return self.faults.starts()

    def run_of(self, name: str) -> Run:
        return Run.read(self.state.planned()[name]["uri"])

    def node_of(self, pid: int) -> Node:
        return next(node for node in self.cluster.nodes if pid in node.pids())

    def wait(self, condition: Any, what: str, timeout: float = 400) -> None:
        wait_until(condition, what, timeout, self.job.ended)

    def restarts(self) -> dict[str, int]:
        """Failures that every trial survived, by name: restarts within an attempt, and attempts after the first."""
        runs = {name: self.run_of(name) for name in self.state.planned() if self._began(name)}
        return {name: len(run.card()["restarts"]) + run.attempt - 1 for name, run in runs.items()}

    def _began(self, name: str) -> bool:
        return (Path(self.state.planned()[name]["uri"]) / "run.json").exists()

    def after(self, struck: Start) -> Start:
        """The process that went on for a struck one: the first later one that did not begin at step 0."""
        return next(start for start in self.starts() if start.first_time > struck.last_time and start.first)


def worker_killed(sweep: Struck) -> Start:
    """kill -9 of the training process of one of two trials that stand at the gate; the other one then ends."""
    sweep.faults.add("worker", "step", GATE, "wait")
    standing = lambda: [start for start in sweep.starts() if start.last == GATE]  # noqa: E731
    sweep.wait(lambda: len(standing()) == 2, "two trials at the gate")
    struck = standing()[0]
    os.kill(struck.pid, signal.SIGKILL)
    sweep.faults.open("worker")
    sweep.wait(lambda: bool(sweep.state.outcomes()), "the end of the trial that was not struck")
    return struck


def node_killed(sweep: Struck) -> tuple[Start, bool]:
    """All processes of the node on which the third trial trains; (its process, whether its driver stood there too)."""
    sweep.faults.add("node", "step", GATE, "wait", onwards=True)
    third = lambda: [start for start in sweep.starts() if not start.first][2:]  # noqa: E731
    sweep.wait(lambda: bool(third()) and third()[0].last >= GATE, "the third trial at the gate")
    struck = third()[0]
    before = sweep.restarts()
    node = sweep.node_of(struck.pid)
    node.kill()
    sweep.faults.open("node")
    sweep.wait(lambda: sum(sweep.restarts().values()) > sum(before.values()), "the third trial to begin again")
    attempts = {name: sweep.run_of(name).attempt for name in sweep.restarts()}
    return struck, max(attempts.values()) > 1


def trials(folder: Path, tables: Path) -> list[Row]:
    """The whole story; two rows."""
    faults, began = Faults(folder / "faults"), time.monotonic()
    with head(0, OMP_NUM_THREADS="1", **faults.environment) as cluster:
        for _ in range(2):
            cluster.add(1)
        job = Job("jobs.tune", str(sweep_file(folder, tables)), environment=cluster.client)
        try:
            sweep = Struck(cluster, faults, job, SweepState(str(folder / "sweeps/struck")))
            first = worker_killed(sweep)
            ended = sweep.state.outcomes()
            contents = {name: digests(Path(outcome["uri"])) for name, outcome in ended.items()}
            second, driver_too = node_killed(sweep)
            code, record, said = job.finish(600)
            assert (code, record.get("done")) == (0, len(RATES)), said[-4000:]
            assert record["concurrent_trials"] == 2, record
            assert record["started_now"] == len(RATES), record
            outcomes = sweep.state.outcomes()
            for name, outcome in ended.items():
                assert outcomes[name] == outcome, f"{name} ended twice"
                assert digests(Path(outcome["uri"])) == contents[name], f"{name} was touched after its end"
            gone = cluster.left()
            assert not any(gone.values()), gone
        finally:
            if not job.ended():
                job.kill()
    rows = [row_of(sweep, first, "worker of a trial killed (-9)", ""),
            row_of(sweep, second, "node of a trial killed (-9), not replaced",
                   "the trial's driver died with it, " if driver_too else "its driver stood elsewhere, ")]  # fmt: skip
    return judged(rows, sweep, f"{len(ended)} trial done before, untouched; {time.monotonic() - began:.0f} s in all")


def row_of(sweep: Struck, struck: Start, fault: str, note: str) -> Row:
    after = sweep.after(struck)
    lost = max(0, struck.last - after.first)
    return Row(fault, True, lost, round(after.first_time - struck.last_time, 1), note=note)


def judged(rows: list[Row], sweep: Struck, note: str) -> list[Row]:
    """What became of all three: the weights against a training that nothing struck, without Ray, and the places."""
    equal, left = True, []
    outcomes = sweep.state.outcomes()
    for name, facts in sweep.state.planned().items():
        run = sweep.run_of(name)
        assert run.card()["status"] == "done", name
        quiet = warm().run(train_recipe, 1, facts["recipe"])[0]
        equal = equal and same_weights(run, quiet["weights"])
        stored = [score["stored"].removeprefix(f"{run.uri}/") for score in outcomes[name]["scores"]]
        left += left_behind(run, *stored)
        logger.info("%s: attempts %d, restarts %d", name, run.attempt, len(run.card()["restarts"]))
    if (Path(sweep.state.uri) / "ray").exists():
        left.append("ray")
    for row in rows:
        row.weights_equal, row.left_behind, row.note = equal, len(left), row.note + note
    return rows
