"""One run on a cluster of several nodes, on object storage, struck by one fault after another.

The method that is trained waits at a gate while the fault is prepared, so every fault strikes at a step known beforehand.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from reid_dist.runs import Run
from tests.chaos.struck import Row, gate, left_behind, rows_of, same_weights, uninterrupted, words
from tests.e2e.cluster import BIN, Head, Node, head
from tests.e2e.job import Job
from tests.faultproxy import FaultProxy, between
from tests.injection import Faults, wait_until
from tests.s3server import serve

RECIPE = "comoe/tiny"
LENGTH = ("training.max_steps={steps}", "training.epochs=40", "training.max_failures=8")


class Chain:
    """The faults are methods; each is called with a step, later than the one before."""

    def __init__(self, another: Callable[[], Head], proxy: FaultProxy, faults: Faults, command: list[str]) -> None:
        self.another, self.proxy, self.faults, self.command = another, proxy, faults, command
        self.cluster = another()
        where = dict(word.split("=", 1) for word in command if "=" in word)
        self.uri = f"{where['output']}/{where['name']}"
        self.names: list[str] = []
        self.strikes: dict[str, float] = {}
        self.notes: dict[str, str] = {}
        self.jobs: list[Job] = []
        self.start()

    def start(self) -> Job:
        """The command, once more."""
        self.jobs.append(Job(*self.command, environment=self.cluster.client))
        return self.jobs[-1]

    def struck(self, name: str) -> None:
        self.names.append(name)
        self.strikes[name] = time.time()

    def node_of(self, rank: int) -> Node:
        pid = self.faults.starts(rank)[-1].pid
        return next(node for node in self.cluster.nodes if pid in node.pids())

    # --- faults

    def node_killed(self, step: int) -> None:
        """The machine of rank 1 goes, with all that ran on it; another joins."""
        gate(self.faults, "node", step, self.jobs[-1])
        self.node_of(1).kill()
        self.struck("node killed")
        self.cluster.add(2)
        self.faults.open("node")

    def drained(self, step: int) -> None:
        """A node is announced to be taken away: a checkpoint just in time, and no failure is counted."""
        gate(self.faults, "drain", step, self.jobs[-1])
        before = len(self.run.card()["restarts"])
        self.cluster.drain(self.node_of(1), 15)
        self.struck("announced preemption (ray drain-node)")
        self.faults.add("slowly", "step", step, "pace", onwards=True)  # until the watcher has told the ranks
        self.faults.open("drain")
        self._await_new_start()
        self.faults.open("slowly")
        drains = [note for note in self.run.notes() if note["kind"] == "drain"]
        assert len(drains) == 1, drains
        assert len(self.run.card()["restarts"]) == before, "a preemption used the budget of failures"
        self.notes[self.names[-1]] = f"checkpoint of step {drains[0]['step']} just in time, budget unused"

    def driver_killed_in_mid_upload(self, step: int) -> None:
        """kill -9 of the driver while a checkpoint is half uploaded; the same command continues from storage alone."""
        held = self.proxy.hold("PUT", f"step-{step:08d}")
        wait_until(held.reached.is_set, f"the upload of step {step}", 400, self.jobs[-1].ended)
        self.proxy.on("cut-request", "PUT", f"step-{step:08d}", times=2)
        self.jobs[-1].kill()
        self.struck("driver killed, upload torn")
        held.open()
        self.start()
        self._await_new_start()

    def second_attempt(self, step: int) -> None:
        """Two attempts at once: the newer one has the run, the other stops with a sentence."""
        first = self.jobs[-1]
        gate(self.faults, "fence", step, first)
        attempt = Run.read(self.uri).attempt
        self.start()
        wait_until(lambda: Run.read(self.uri).attempt > attempt, "the second attempt", 200, self.jobs[-1].ended)
        self.struck("two attempts at once")
        self.faults.open("fence")
        _, record, _ = first.finish(600)
        assert record["exit_code"] == 1, record
        assert "was replaced by a newer one and stops" in record["error"], record
        self.notes[self.names[-1]] = (
            f'the other: "{record["error"].split(" of ")[0]} ... replaced by a newer one and stops"'
        )

    def interrupted(self, step: int) -> None:
        """Ctrl-C ends with a checkpoint. The command that continues is given to `ray job submit`."""
        job = self.jobs[-1]
        gate(self.faults, "interrupt", step, job)
        job.process.send_signal(signal.SIGINT)
        self._stopped("Ctrl-C", "interrupt", step)
        _, record, _ = job.finish(600)
        assert (record["exit_code"], "the same command continues" in record["error"]) == (1, True), record
        submit = [str(BIN / "ray"), "job", "submit", "--address", self.cluster.dashboard, "--submission-id", "struck",
                  "--working-dir", ".", "--"]  # fmt: skip
        self.jobs.append(Job(*self.command, environment=self.cluster.environment, before=submit))
        self._await_new_start()

    def job_stopped(self, step: int) -> None:
        """`ray job stop` of the submitted job ends with a checkpoint."""
        gate(self.faults, "stop", step, self.jobs[-1])
        stopping = [str(BIN / "ray"), "job", "stop", "--address", self.cluster.dashboard, "--no-wait", "struck"]
        subprocess.run(stopping, env=self.cluster.environment, check=True, capture_output=True)
        self._stopped("ray job stop", "stop", step)
        attempt = self.run.card()["attempts"][-1]
        assert (attempt["exit_code"], "the same command continues" in attempt["reason"]) == (1, True), attempt
        self.start()
        self._await_new_start()

    def _stopped(self, name: str, gate_name: str, step: int) -> None:
        """Opens the gate when the workers were asked to stop, a step a second until they have seen it."""
        self.struck(name)
        wait_until(self.run.stop_requested, "the request to stop", 60)
        self.faults.add(f"{gate_name}-pace", "step", step, "pace", onwards=True)
        self.faults.open(gate_name)
        wait_until(lambda: bool(self.jobs[-1].ended()), "the end of the job", 120)
        self.faults.open(f"{gate_name}-pace")

    def head_killed(self, step: int) -> None:
        """The whole cluster goes; the same command on another one continues from storage alone."""
        gate(self.faults, "head", step, self.jobs[-1])
        for node in [*self.cluster.nodes, self.cluster.node]:
            node.kill()
        self.struck("head and all nodes killed, new cluster")
        self.jobs[-1].kill()
        self.faults.open("head")
        self.cluster = self.another()
        self.start()
        self._await_new_start()

    # --- end

    @property
    def run(self) -> Run:
        return Run.read(self.uri)

    def _await_new_start(self, timeout: float = 400) -> None:
        count = len(self.names)
        wait_until(
            lambda: len(self.faults.starts()) > count, f"the start after {self.names[-1]}", timeout, self.jobs[-1].ended
        )

    def finish(self, weights: dict) -> list[Row]:
        """Waits for the end; the rows of all faults."""
        _, record, _ = self.jobs[-1].finish(600)
        assert record["exit_code"] == 0, record
        rows = rows_of(self.faults, self.names, self.strikes)
        equal, left = same_weights(self.run, weights), left_behind(self.run)
        for row in rows:
            row.weights_equal, row.left_behind, row.note = equal, len(left), self.notes.get(row.fault, "")
        assert not left, left
        return rows


@contextmanager
def chain(
    folder: Path, tables: Path, steps: int, nodes: int = 2, dashboard: bool = False
) -> Iterator[tuple[Chain, dict]]:
    """(the run, begun; the weights that it must end with). `nodes` beside a head that does no work; 0: the head does it."""
    length = [word.format(steps=steps) for word in LENGTH]
    faults = Faults(folder / "faults")
    with serve() as s3, between(s3.endpoint) as proxy:
        command = words(RECIPE, tables, f"{s3.uri}/runs", "struck", *length)
        timing = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
        with ExitStack() as clusters:

            def another() -> Head:
                cluster = clusters.enter_context(
                    head(0 if nodes else 2, dashboard, OMP_NUM_THREADS="1", **timing, **faults.environment)
                )
                for _ in range(nodes):
                    cluster.add(2)
                return cluster

            running = Chain(another, proxy, faults, command)
            try:
                yield running, uninterrupted(RECIPE, tables, *length)
            finally:
                for job in running.jobs:
                    if not job.ended():
                        job.kill()


def cluster(folder: Path, tables: Path) -> list[Row]:
    """What the end-to-end test does too: a node, a preemption, the driver, a second attempt."""
    with chain(folder, tables, steps=40) as (run, weights):
        run.node_killed(5)
        run.drained(11)
        run.driver_killed_in_mid_upload(28)
        run.second_attempt(33)
        return run.finish(weights)


def stops(folder: Path, tables: Path) -> list[Row]:
    """Ctrl-C, `ray job stop`, and the loss of the whole cluster.

    Of one node: several on one machine would share the place of the working directory, which each cleans when it is done.
    """
    with chain(folder, tables, steps=40, nodes=0, dashboard=True) as (run, weights):
        run.interrupted(5)
        run.job_stopped(14)
        run.head_killed(25)
        return run.finish(weights)
