"""A real local Ray head with token authentication, as `ray job submit` meets it: own temp folder, own ports, ended by its pid."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    """One below the range from which the system, and so every Ray process that starts meanwhile, takes its ports."""
    while True:
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Head:
    """A running head: `environment` is what a client needs."""

    dashboard: str
    environment: dict[str, str]
    address: str

    @property
    def client(self) -> dict[str, str]:
        """The environment of a job that is started beside the head, as `ray job submit` would start it there."""
        return self.environment | {"RAY_ADDRESS": self.address}

    def submit(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- python -m <words>`, followed to its end."""
        command = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--"]
        return subprocess.run(
            [*command, sys.executable, "-m", *words],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip


@contextmanager
def head(num_cpus: int = 4, **variables: str) -> Iterator[Head]:
    """Start one and end it (SIGTERM to its own process, which ends all it started). `variables`: more for its environment."""
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
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **variables,
    }
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(
        [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--port=0",
         f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
         f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
         f"--num-cpus={num_cpus}", "--object-store-memory=200000000", "--disable-usage-stats"],
        env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not (folder / "ray_current_cluster").exists() or not _answers(port):
            assert process.poll() is None, (folder / "head.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the head did not come up in 90 s"
            time.sleep(0.5)
        yield Head(f"http://127.0.0.1:{port}", environment, (folder / "ray_current_cluster").read_text().strip())
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)  # a job that trained leaves an actor that ends only with its head
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
