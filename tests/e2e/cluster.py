"""A real local Ray head with token authentication, as `ray job submit` meets it: own temp folder, own ports, ended by its pid."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LEFT = """
import json, ray
from ray.util.placement_group import placement_group_table
from ray.util.state import list_actors
ray.init(address="auto", logging_level="ERROR")
groups = [name for name, facts in placement_group_table().items() if facts["state"] != "REMOVED"]
actors = {actor.class_name for actor in list_actors(filters=[("state", "!=", "DEAD")])}
actors = sorted(actors - {"_AutoscalingCoordinatorActor"})  # the cluster's own: one for all jobs, without resources
total, free = ray.cluster_resources().get("CPU"), ray.available_resources().get("CPU", 0.0)
print(json.dumps({"groups": groups, "actors": actors, "busy": round(total - free, 6)}))
"""


def free_port() -> int:
    """One below the range from which the system, and so every Ray process that starts meanwhile, takes its ports."""
    while True:
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Node:
    """One Ray node of this machine: `ray start --block` and all that it started."""

    def __init__(self, words: list[str], environment: dict[str, str], log: Path) -> None:
        self.id = secrets.token_hex(28)
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats",
                 f"--dashboard-agent-listen-port={free_port()}", *words],
                env={**environment, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": self.id}, stdout=stream,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def pids(self) -> list[int]:
        """Of everything that runs on the node."""
        try:
            return [self.process.pid, *(p.pid for p in psutil.Process(self.process.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """As if the machine lost its power: all its processes at once, by kill -9."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """SIGTERM to its own process ends all it started; a job that trained leaves an actor that ends only with its head."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()


@dataclass
class Head:
    """A running head: `environment` is what a client needs, `address` what a driver and another node connect to."""

    dashboard: str
    environment: dict[str, str]
    address: str = ""
    folder: Path = Path()
    node: Node | None = None
    nodes: list[Node] = field(default_factory=list)

    def ray(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """A command of Ray's CLI."""
        command = [str(BIN / "ray"), *words]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout)

    def alive(self) -> list[str]:
        """Ids of the nodes that are up, by the dashboard; empty where it does not answer."""
        state = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        with contextlib.suppress(OSError, ValueError, KeyError):
            asked = urllib.request.Request(f"{self.dashboard}/api/v0/nodes?{state}")
            asked.add_header("Authorization", f"Bearer {Path(self.environment['RAY_AUTH_TOKEN_PATH']).read_text()}")
            with urllib.request.urlopen(asked, timeout=10) as answer:
                return [node["node_id"] for node in json.load(answer)["data"]["result"]["result"]]
        return []

    @property
    def client(self) -> dict[str, str]:
        """The environment of a job that is started beside the head, as `ray job submit` would start it there."""
        return self.environment | {"RAY_ADDRESS": self.address}

    def submit(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- python -m <words>`, followed to its end."""
        sent = ["job", "submit", "--address", self.dashboard, "--working-dir", "."]
        return self.ray(*sent, "--", sys.executable, "-m", *words, timeout=timeout)

    def add(self, num_cpus: int = 1) -> Node:
        """One more node. One whose agents are not up within Ray's 15 s (on a busy machine) is started again, as in a fleet."""
        for _ in range(5):
            node = self._start(num_cpus)
            while node.process.poll() is None and "Ray runtime started" not in node.log.read_text():
                time.sleep(0.3)
            if node.process.poll() is None:
                return node
            self.nodes.remove(node)
        raise AssertionError(f"no node came up: {node.log.read_text()[-600:]}")

    def _start(self, num_cpus: int) -> Node:
        words = [f"--address={self.address}", f"--num-cpus={num_cpus}", "--object-store-memory=100000000"]
        node = Node(words, self.environment, self.folder / f"node-{secrets.token_hex(3)}.log")
        self.nodes.append(node)
        return node

    def left(self, patience_s: float = 60) -> dict[str, Any]:
        """Placement groups, actors and CPUs that are still taken, once they had time to go; needs the dashboard."""
        deadline = time.monotonic() + patience_s
        while True:
            done = subprocess.run(
                [sys.executable, "-c", LEFT], env=self.client, capture_output=True, text=True, cwd=ROOT
            )
            assert done.returncode == 0, done.stderr[-2000:]
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            if not any(found.values()) or time.monotonic() > deadline:
                return found
            time.sleep(2)

    def drain(self, node: Node, deadline_s: int) -> None:
        """Announce that a node will be taken away, as a cloud does with a spot machine."""
        command = ["drain-node", "--address", self.address, "--node-id", node.id, "--reason",
                   "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds"]  # fmt: skip
        done = self.ray(*command, str(deadline_s))
        assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def head(num_cpus: int = 4, dashboard: bool = True, **variables: str) -> Iterator[Head]:
    """Start one and end it with its nodes. `variables`: more for the environment of all their processes. Without a dashboard
    (a dozen processes less) nothing can be submitted."""
    folder = Path(tempfile.mkdtemp(prefix="reid-head-", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    port = free_port()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "RAY_raylet_start_wait_time_s": "60",
        "RAY_worker_niceness": "0",  # what runs there is what the test waits for (Ray's default is 15)
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **variables,
    }
    words = ["--head", "--port=0", f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
             f"--ray-client-server-port={free_port()}", f"--num-cpus={num_cpus}", "--object-store-memory=200000000"]  # fmt: skip
    if not dashboard:
        words.append("--include-dashboard=false")
    node = Node(words, environment, folder / "head.log")
    running = Head(f"http://127.0.0.1:{port}", environment, folder=folder, node=node)
    try:
        deadline = time.monotonic() + 180
        while not (folder / "ray_current_cluster").exists() or (dashboard and not _answers(port)):
            assert node.process.poll() is None, node.log.read_text()[-600:]
            assert time.monotonic() < deadline, "the head did not come up in 180 s"
            time.sleep(0.5)
        running.address = (folder / "ray_current_cluster").read_text().strip()
        yield running
    finally:
        for each in [*running.nodes, node]:
            each.end()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
