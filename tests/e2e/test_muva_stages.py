"""MUVA's two stages as jobs: one run that is killed in both, a stage-1 run that seeds several, transfer from A to B, the page."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from reid_dist.runs import Run
from tests.bench.bench_muva import make_tables
from tests.e2e.test_faults import Job

WORLD = {"num_train": 60, "num_test": 20, "num_distractors": 0}
SIZES = ("training.epochs=6", "training.global_batch=32", "model.prompts.epochs=8", "training.checkpoint_every_steps=5")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables synthetic-a and synthetic-b with exact masks."""
    folder = tmp_path_factory.mktemp("stages")
    make_tables(folder, **WORLD)
    return folder


def train(root: Path, name: str, *words: str) -> Job:
    return Job(
        "jobs.train", "muva/synthetic", f"data.root={root}", f"output={root}/runs", f"name={name}",
        "training.num_workers=2", "training.log_every=1", *SIZES, *words,
    )  # fmt: skip


def done(job: Job) -> dict[str, Any]:
    code, record, err = job.finish(400)
    assert code == 0, err[-3000:]
    return record


def finetune_records(run: str) -> list[dict[str, Any]]:
    """Step records of stage 2, without what differs by chance or by the stage's place in the run."""
    skip = ("rows_per_s", "time", "step", "stage")
    records = [m for m in Run.read(run).metrics() if m["kind"] == "step" and "id" in m]
    return [{key: value for key, value in record.items() if key not in skip} for record in records]


@pytest.fixture(scope="module")
def seed(root: Path) -> dict[str, Any]:
    """A run of stage 1 alone."""
    record = done(train(root, "prompts", "model.stages=[prompts]"))
    assert not finetune_records(record["run"])
    return record


def seeded(root: Path, seed: dict[str, Any], name: str, *words: str) -> Job:
    return train(root, name, "model.stages=[finetune]", f"init=run:{seed['run']}", *words)


@pytest.fixture(scope="module")
def runs(root: Path, seed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Two stage-2 runs from one stage-1 run, at the same time."""
    jobs = {
        "plain": seeded(root, seed, "plain"),
        "softer": seeded(root, seed, "softer", "model.memory_momentum=0.5"),
    }
    return {name: done(job) for name, job in jobs.items()}


def test_one_run_killed_in_both_stages_is_the_run_of_two(
    root: Path, seed: dict[str, Any], runs: dict[str, dict[str, Any]]
) -> None:
    """Both stages in one run with a worker killed in each: its second stage is digit by digit that of the seeded run."""
    job, uri, boundary = train(root, "whole"), f"{root}/runs/whole", seed["steps"]
    restarts: list[int] = []
    for low, high in ((0, boundary), (boundary, boundary + runs["plain"]["steps"])):
        job.wait_for(lambda low=low: (root / "runs/whole/run.json").exists() and Run.read(uri).latest_step() > low)
        job.workers()[-1].send_signal(signal.SIGKILL)
        job.wait_for(lambda before=restarts: len(_restarts(uri)) > len(before))
        restarts = _restarts(uri)
        assert low < restarts[-1] < high
    record = done(job)
    assert (record["restarts"], record["steps"]) == (2, boundary + runs["plain"]["steps"])
    assert finetune_records(uri) == finetune_records(runs["plain"]["run"])


def _restarts(uri: str) -> list[int]:
    return [note["step"] for note in Run.read(uri).notes() if note["kind"] == "restart"]


def test_stage_2_runs_repeat_no_stage_1(runs: dict[str, dict[str, Any]]) -> None:
    plain, softer = (runs[name] for name in ("plain", "softer"))
    for record in (plain, softer):
        metrics = [m for m in Run.read(record["run"]).metrics() if m["kind"] == "step"]
        assert len(metrics) == record["steps"]
        assert not any("contrast" in m for m in metrics)
    ours, theirs = finetune_records(plain["run"]), finetune_records(softer["run"])
    assert ours[0] == theirs[0]  # the same start
    assert ours[-1]["memory"] != theirs[-1]["memory"]


def test_a_seed_for_other_people_is_exit_2(root: Path, seed: dict[str, Any]) -> None:
    job = seeded(root, seed, "elsewhere", "data.train=[synthetic-b]", "data.test=[synthetic-a]", "model.masks=[bands]")
    code, record, err = job.finish(200)
    assert code == 2, err[-3000:]
    assert (
        "the prompts were learnt with another label map: 60 of 60 labels stand for other people or other images"
        in record["error"]
    )


def mask_table(run: str, stored: str) -> dict[str, float]:
    """IoU per part of predicted with exact masks, from a stored evaluation."""
    (table,) = [f for f in json.loads(Run.read(run).store.read(stored))["figures"] if f["kind"] == "table"]
    return {part: float(share) for part, share in table["data"]["rows"]}


def test_what_is_learnt_in_a_helps_in_b(root: Path, runs: dict[str, dict[str, Any]]) -> None:
    """One training, two targets: above chance and above the untrained weights in B, lower there than in A; and the page."""
    from jobs.evaluate import evaluate
    from jobs.report import report

    run = runs["plain"]["run"]
    found = {d: evaluate(run, "last", [f"data.test=[synthetic-{d}]"]) for d in "ab"}
    start = evaluate(run, "start")
    assert found["b"]["mAP"] > 1.5 * found["b"]["chance_mAP"]
    assert found["b"]["mAP"] > start["mAP"]
    assert found["b"]["mAP"] < found["a"]["mAP"]
    learnt, untrained = (mask_table(run, entry["stored"]) for entry in (found["a"], start))
    assert learnt.keys() == untrained.keys() == {"head", "upper", "legs"}
    assert min(learnt.values()) > 0.5
    assert all(learnt[part] > untrained[part] for part in learnt)
    page = Path(report(run)["report"]).read_text()
    for text in ("pseudo masks", "predicted", "legs: attention", "Intersection over union", "synthetic-b"):
        assert text in page
