"""What the driver makes of failures, and what a worker leaves behind, with a stand-in for Ray Train's side."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import ray.train
from ray.train import WorkerGroupError

from reid_dist import methods
from reid_dist.config import to_mapping
from reid_dist.errors import Diverged, RunError, UserError
from reid_dist.runs import FencedOut, Run, identity_of
from reid_dist.training import launch
from tests.worlds import small_tables

DEATH = RuntimeError("ActorDiedError: The actor died unexpectedly before finishing this task.")
GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:31337")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    recipe = methods.load_recipe("comoe/tiny", [f"output={tmp_path}"])
    return Run.open(recipe.uri, identity_of(recipe, {}), recipe)


def fit(run: Run, monkeypatch: pytest.MonkeyPatch, tries: list[Any], **training: int) -> dict[str, Any]:
    """`launch.fit` whose tries end as given: a summary, or the errors of ranks 0 and 1, with what they noted."""
    words = [f"output={Path(run.uri).parent}", *(f"training.{k}={v}" for k, v in training.items())]
    recipe = methods.load_recipe("comoe/tiny", words)
    run = Run.open(run.uri, identity_of(recipe, {}), recipe)  # an attempt of its own

    def one_try(recipe: Any, run: Run, number: int, callbacks: Any, bar: bool) -> dict[str, Any]:
        outcome = tries.pop(0)
        if isinstance(outcome, dict):
            return outcome
        errors, noted = outcome
        for rank, (step, error) in noted.items():
            launch._note_failure(run, rank, number + 1, step, error)
        raise WorkerGroupError("workers failed", dict(enumerate(errors)))

    monkeypatch.setattr(launch, "_one_try", one_try)
    return launch.fit(recipe, run)


def bug() -> RuntimeError:
    try:
        raise RuntimeError("index 7 is out of range")
    except RuntimeError as error:
        return error


def test_deaths_in_a_row_continue_and_the_same_traceback_at_the_same_step_does_not(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = ([GLOO, DEATH], {0: (3, GLOO)})
    assert fit(run, monkeypatch, [dead, dead, {"steps": 20}]) == {"steps": 20}
    failed = ([GLOO, bug()], {0: (7, GLOO), 1: (7, bug())})
    with pytest.raises(RunError, match="same traceback came twice at the same step.*rank 1 at step 7: RuntimeError: index 7"):
        fit(run, monkeypatch, [failed, failed])
    moved = ([GLOO, bug()], {1: (9, bug())})
    assert fit(run, monkeypatch, [failed, moved, {"steps": 20}]) == {"steps": 20}
    with pytest.raises(RunError, match=r"failed 2 times \(training.max_failures=1\)"):
        fit(run, monkeypatch, [dead, dead, {}], max_failures=1)
    reasons = [note["reason"] for note in run.notes() if note["kind"] == "restart"]
    assert len(reasons) == 8


@pytest.mark.parametrize("error", [UserError("mend this"), Diverged("loss is nan"), FencedOut("a newer one")])
def test_what_another_try_cannot_mend_ends_at_once(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        fit(run, monkeypatch, [([GLOO, error], {})])


def test_a_hang_is_the_reason_that_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    next_one = Run.attach(run.uri, 2)
    next_one.note("hang", rank=1, start=1, step=6, seconds=300.0, waiting=False, where="in read (store.py:7)", stacks="logs/x")
    assert fit(run, monkeypatch, [([DEATH, DEATH], {}), {"steps": 20}]) == {"steps": 20}
    (note,) = [note for note in run.notes() if note["kind"] == "restart"]
    assert "rank 1 stopped answering in read (store.py:7)" in note["reason"]


def test_a_worker_notes_where_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"data.root={tmp_path}", f"output={tmp_path}/runs", "training.eval_every=0", "training.max_steps=11"]
    words += ["training.checkpoint_every=0", "training.checkpoint_every_steps=5", "training.keep_last=9"]
    recipe = methods.load_recipe("comoe/tiny", words)
    small_tables(tmp_path, recipe)
    run = Run.open(recipe.uri, identity_of(recipe, {}), recipe)
    context = types.SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "report", lambda metrics: None)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    config = {"recipe": to_mapping(recipe), "run": run.uri, "attempt": 1, "start": 1, "bar": False}
    summary = launch._worker(config)
    assert summary is not None
    assert (summary["steps"], summary["num_workers"]) == (11, 1)
    assert [c["step"] for c in run.checkpoints()] == [5, 10, 11]  # an epoch has five steps: its end is a fifth step too
    assert not [note for note in run.notes() if note["kind"] in ("failure", "hang")]

    def fails(*words: Any) -> None:
        raise ZeroDivisionError("own fault")

    monkeypatch.setattr("reid_dist.training.worker.prepare", fails)
    with pytest.raises(ZeroDivisionError):
        launch._worker(config | {"start": 2})
    (note,) = [note for note in run.notes() if note["kind"] == "failure"]
    assert (note["rank"], note["start"], note["step"]) == (0, 2, 0)
    assert note["error"] == "ZeroDivisionError: own fault"
