"""Eight tiny trials on shares of a CPU: killed in the middle, continued, bad ones stopped, nothing left behind.

One Ray head for everything; the sweep job is a process of its own, as under `ray job submit`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from reid_dist import methods
from reid_dist.runs import Run
from tests.e2e.cluster import ROOT, Head, head
from tests.worlds import small_tables
from tuning.state import SweepState

LEFT = """
import json, ray
from ray.util.placement_group import placement_group_table
ray.init(address="auto", logging_level="ERROR")
groups = [g["name"] or g["placement_group_id"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
total, free = ray.cluster_resources().get("CPU"), ray.available_resources().get("CPU", 0.0)
print(json.dumps({"groups": groups, "busy": round(total - free, 6)}))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head(num_cpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    small_tables(folder, methods.load_recipe("comoe/tiny"))
    return folder


def write_sweep(place: Path, **sections: Any) -> Path:
    """A sweep of four rates, of which one cannot learn, and two seeds."""
    sweep = {
        "name": "eight", "base": "comoe/tiny", "output": str(place / "sweeps"),
        "set": {
            "data": {"root": str(place)},
            "training": {"epochs": 5, "max_steps": 20, "eval_every": 1, "checkpoint_every": 1, "log_every": 1},
        },
        "axes": {"optim.lr": [1e-3, 1e-9]}, "protocol": {"seeds": [1, 2, 3, 4]}, "metric": "mAP",
        "scheduler": {"name": "asha", "grace": 4, "reduction": 2},
        "resources": {"num_workers": 1, "cpus_per_worker": 0.5, "driver": {"CPU": 0.1}},
        **sections,
    }  # fmt: skip
    path = place / f"{sweep['name']}.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


class Job:
    """`python -m jobs.tune FILE` against the head, in a process of its own."""

    def __init__(self, cluster: Head, file: Path) -> None:
        address = (Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).parent / "ray_current_cluster").read_text().strip()
        self.environment = cluster.environment | {"RAY_ADDRESS": address}
        self.log = (file.parent / f"{file.stem}-{time.time_ns()}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.tune", str(file)],
            cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip

    def finish(self, timeout: float = 400) -> tuple[int, dict[str, Any]]:
        out, _ = self.process.communicate(timeout=timeout)
        record: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return self.process.returncode, record

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()[-4000:]

    def left(self) -> dict[str, Any]:
        """Placement groups and CPUs that are still taken on the head, once they had time to go."""
        deadline = time.monotonic() + 60
        while True:
            answer = subprocess.run(
                [sys.executable, "-c", LEFT], env=self.environment, capture_output=True, text=True, check=True, cwd=ROOT
            )
            found: dict[str, Any] = json.loads(answer.stdout.strip().splitlines()[-1])
            if found == {"groups": [], "busy": 0.0} or time.monotonic() > deadline:
                return found
            time.sleep(2)


def content(folder: Path) -> dict[str, str]:
    """Digest of every file of a run."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_eight_trials_killed_in_the_middle_and_continued(cluster: Head, place: Path) -> None:
    file = write_sweep(place)
    state = SweepState(str(place / "sweeps" / "eight"))
    first = Job(cluster, file)
    deadline = time.monotonic() + 300
    while len(state.outcomes()) < 2:
        assert first.process.poll() is None, first.said()
        assert time.monotonic() < deadline, first.said()
        time.sleep(0.5)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    ended = state.outcomes()
    assert len(ended) < 8
    before = {name: content(place / "sweeps" / "eight" / "trials" / name) for name in ended}

    second = Job(cluster, file)
    code, record = second.finish()
    assert code == 0, second.said()
    outcomes = state.outcomes()
    assert record["trials"] == len(outcomes) == 8
    assert record["started_now"] == 8 - len(ended)
    assert record["concurrent_trials"] == 3  # 2 CPUs, 0.5 + 0.1 each
    for name, outcome in ended.items():
        assert content(place / "sweeps" / "eight" / "trials" / name) == before[name]
        assert outcomes[name] == outcome

    stopped = {name: o for name, o in outcomes.items() if o["status"] == "stopped"}
    assert stopped, {o["label"]: (o["value"], o["step"]) for o in outcomes.values()}
    assert all(o["step"] < 20 and o["scores"] == [] for o in stopped.values())
    done = [o for o in outcomes.values() if o["status"] == "done"]
    assert all(o["step"] == 20 and len(o["scores"]) == 1 and o["selected_on"] == "val" for o in done)
    card = Run.read(done[0]["uri"]).card()
    assert (card["status"], card["sweep"]) == ("done", state.uri)
    assert "jobs.tune" in card["command"]
    assert second.left() == {"groups": [], "busy": 0.0}

    folder = place / "sweeps" / "eight"
    assert {path.name for path in folder.glob("leaderboard.*")} == {
        f"leaderboard.{kind}" for kind in ("md", "csv", "tex", "html")
    }
    assert f"{len(done)} trials done, {len(stopped)} stopped early" in (folder / "leaderboard.md").read_text()
    recipe = methods.load_recipe(str(folder / "best.yaml"))
    assert recipe.optim.lr in {o["setting"]["optim.lr"] for o in done}
    assert recipe.data.test == ("synthetic-cuhk-pedes",)
    assert not (folder / "ray").exists()
