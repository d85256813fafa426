"""cluster/onprem.yaml as an operator uses it: `ray up` over ssh to three hosts, a job on two of them, `ray down`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.render import render
from reid_dist import methods
from reid_dist.runs import Run
from tests.e2e.cluster import BIN, ROOT
from tests.e2e.hosts import Hosts, hosts, why_not
from tests.e2e.test_faults import command
from tests.e2e.test_submit import succeeded
from tests.worlds import small_tables

REASON = why_not()
OLD_AUTOSCALER = {"RAY_UP_enable_autoscaler_v2": "0"}  # as the file's header says


def launcher(machines: Hosts) -> Path:
    """onprem.yaml for these hosts, rendered as a user renders it: own settings, own folder."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "cluster/settings.yaml").read_text())
    head, *workers = machines.names.values()
    settings["onprem"] |= {
        "head_ip": head,
        "worker_ips": workers,
        "ssh_user": "root",
        "ssh_private_key": str(machines.key),
    }
    file = machines.folder / "onprem.yaml"
    file.write_text(render(settings)["onprem.yaml"])
    return file


@contextlib.contextmanager
def forwarded(machines: Hosts, file: Path) -> Iterator[None]:
    """`ray dashboard`: the head's dashboard at the operator's localhost:8265."""
    tunnel = subprocess.Popen(
        machines.operator(str(BIN / "ray"), "dashboard", str(file)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        tunnel.terminate()
        tunnel.wait(timeout=20)


def nodes_alive(machines: Hosts) -> int:
    asked = machines.ssh("host-1", "bash --login -c '. ~/reid-dist/cluster/env.sh; ray list nodes --format json'")
    with contextlib.suppress(ValueError):
        return sum(node["state"] == "ALIVE" for node in json.loads(asked.stdout))
    return 0


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_two_workers_on_two_hosts_that_ray_up_started() -> None:
    with hosts(3) as machines:
        small_tables(machines.folder, methods.load_recipe("comoe/tiny"))
        file = launcher(machines)
        up = machines.run(str(BIN / "ray"), "up", "-y", str(file), timeout=240, **OLD_AUTOSCALER)
        assert up.returncode == 0, up.stdout[-3000:] + up.stderr[-2000:]
        deadline = time.monotonic() + 120
        while nodes_alive(machines) < 3:
            assert time.monotonic() < deadline, machines.ssh(
                "host-1", "tail -n 60 /tmp/ray/session_latest/logs/monitor.*"
            ).stdout
            time.sleep(2)
        # More than half of a host's CPUs for each worker, so that no host can take both.
        wide = f"training.cpus_per_worker={(os.cpu_count() or 1) // 2 + 1}"
        short = ("training.threads_per_worker=1", "training.max_steps=4")
        words = command(machines.folder, "two-hosts", f"{machines.folder}/runs", wide, *short)
        with forwarded(machines, file):
            sent = ["job", "submit", "--address", "http://localhost:8265", "--working-dir", ".", "--"]
            while True:
                done = machines.run(str(BIN / "ray"), *sent, "python", "-m", *words, timeout=240, RAY_AUTH_MODE="token")
                if "Connection" not in done.stderr or time.monotonic() > deadline:
                    break
                time.sleep(1)
            record = succeeded(done, "train")
        assert (record["num_workers"], record["restarts"]) == (2, 0)
        logs = machines.folder / "runs/two-hosts/logs/attempt-0001"
        places = [
            re.search(r"rank-\d of attempt 1 on (\S+),", (logs / f"rank-{rank}.log").read_text()) for rank in (0, 1)
        ]
        assert {place and place[1] for place in places} == {"host-2", "host-3"}
        assert Run.read(f"{machines.folder}/runs/two-hosts").card()["status"] == "done"
        assert machines.ssh("host-1", "pgrep -x gcs_server").returncode == 0
        down = machines.run(str(BIN / "ray"), "down", "-y", str(file), **OLD_AUTOSCALER)
        assert down.returncode == 0, down.stdout[-2000:] + down.stderr[-2000:]
        assert machines.ssh("host-1", "pgrep -x gcs_server").returncode == 1
