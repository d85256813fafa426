"""Eight tiny trials on shares of a CPU: killed in the middle, extended, continued, bad ones stopped, nothing left behind.

One Ray head for everything; the sweep job is a process of its own, as under `ray job submit`. The head is told what `connect`
tells a private cluster, which nobody can look into from outside: no actor of Ray Train's cleans up behind a stopped trial.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs._cluster import PRIVATE
from reid_dist import methods
from reid_dist.runs import Run
from tests.e2e.cluster import Head, head
from tests.e2e.job import Job, digests
from tests.worlds import small_tables
from tuning.search import history
from tuning.state import SweepState

STEPS = 12
RATES = [1e-3, 1e-9, 3e-4, 1e-8, 1e-4, 3e-3, 1e-7, 5e-4]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head(num_cpus=2, **PRIVATE) as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    small_tables(folder, methods.load_recipe("comoe/tiny"))
    return folder


def write_sweep(place: Path, rates: list[float]) -> Path:
    """A trial per rate; all start from one shared run."""
    sweep = {
        "name": "eight", "base": "comoe/tiny", "output": str(place / "sweeps"),
        "set": {
            "data": {"root": str(place)},
            "training": {"epochs": 3, "max_steps": STEPS, "eval_every": 1, "checkpoint_every": 1, "log_every": 1},
        },
        "axes": {"optim.lr": rates}, "metric": "mAP",
        "scheduler": {"name": "asha", "grace": 4, "reduction": 2},
        "resources": {"num_workers": 1, "cpus_per_worker": 0.7, "driver": {"CPU": 0.1}},
        "shared": [{"name": "start", "without": ["optim.lr"], "then": {},
                    "set": {"optim.lr": 1e-3, "training": {"max_steps": 2, "epochs": 1, "eval_every": 0, "select_on": "none"}}}],
    }  # fmt: skip
    path = place / "eight.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


@pytest.mark.timeout(1200)  # a loaded machine: eleven starts of Ray Train, each of which imports torch four times
def test_eight_trials_killed_in_the_middle_extended_and_continued(cluster: Head, place: Path) -> None:
    folder = place / "sweeps" / "eight"
    state = SweepState(str(folder))
    first = Job("jobs.tune", str(write_sweep(place, RATES[:5])), environment=cluster.client)
    first.wait_for(lambda: len(trials(state)) >= 2, timeout=500)
    first.kill()
    ended = state.outcomes()
    assert len(trials(state)) < 5
    before = {name: digests(Path(outcome_uri(state, name))) for name in ended}

    second = Job("jobs.tune", str(write_sweep(place, RATES)), environment=cluster.client)
    code, record, said = second.finish(600)
    assert code == 0, said[-4000:]
    outcomes = state.outcomes()
    assert record["trials"] == len(trials(state)) == 8
    assert record["started_now"] == 9 - len(ended)  # eight trials and the shared run
    assert record["concurrent_trials"] == 2  # 2 CPUs, 0.7 + 0.1 each
    for name, outcome in ended.items():
        assert digests(Path(outcome_uri(state, name))) == before[name]
        assert outcomes[name] == outcome
    check_shared(state)
    check_ends(state)
    assert cluster.left() == {"groups": [], "actors": [], "busy": 0.0}
    check_board(folder, trials(state))


def outcome_uri(state: SweepState, name: str) -> str:
    return str(state.planned()[name]["uri"])


def trials(state: SweepState) -> dict[str, dict[str, Any]]:
    """Outcomes without those of shared runs."""
    return {name: outcome for name, outcome in state.outcomes().items() if not name.startswith("start-")}


def check_shared(state: SweepState) -> None:
    """One run, computed once, from which all trials took their weights."""
    planned = state.planned()
    (shared,) = [facts for name, facts in planned.items() if name.startswith("start-")]
    run = Run.read(shared["uri"])
    assert (run.latest_step(), run.attempt) == (2, 1)
    assert {planned[name]["recipe"]["init"] for name in trials(state)} == {f"run:{run.uri}"}


def check_ends(state: SweepState) -> None:
    """Those that were behind on the selection split were stopped and not scored; the others are whole."""
    ended = trials(state).values()
    stopped = [outcome for outcome in ended if outcome["status"] == "stopped"]
    done = [outcome for outcome in ended if outcome["status"] == "done"]
    assert stopped, {o["label"]: (o["value"], o["step"]) for o in ended}
    assert all(o["step"] < STEPS and o["scores"] == [] for o in stopped)
    assert all(o["step"] == STEPS and len(o["scores"]) == 1 and o["selected_on"] == "val" for o in done)
    seen = {o["name"]: {r["step"]: r["mAP"] for r in history(Run.read(o["uri"]).metrics(), "mAP")} for o in done}
    assert all(o["value"] < max(values[o["step"]] for values in seen.values()) for o in stopped)
    card = Run.read(done[0]["uri"]).card()
    assert (card["status"], card["sweep"]) == ("done", state.uri)
    assert "jobs.tune" in card["command"]


def check_board(folder: Path, ended: dict[str, dict[str, Any]]) -> None:
    done = [outcome for outcome in ended.values() if outcome["status"] == "done"]
    kinds = {f"leaderboard.{kind}" for kind in ("md", "csv", "tex", "html")}
    assert {path.name for path in folder.glob("leaderboard.*")} == kinds
    assert f"{len(done)} trials done, {8 - len(done)} stopped early" in (folder / "leaderboard.md").read_text()
    recipe = methods.load_recipe(str(folder / "best.yaml"))
    assert recipe.optim.lr in {o["setting"]["optim.lr"] for o in done}
    assert recipe.data.test == ("synthetic-cuhk-pedes",)
    assert not (folder / "ray").exists()
    assert json.loads((folder / "record.json").read_text())["exit_code"] == 0
