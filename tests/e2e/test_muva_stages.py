"""MUVA's two stages as jobs: one run that is killed in both, a stage-1 run that seeds several, transfer from A to B, the page."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from reid_dist import methods
from reid_dist.config import to_mapping
from reid_dist.runs import Run
from tests.bench.bench_muva import make_tables
from tests.dist.muva_cells import train_from_seed
from tests.e2e.test_faults import Job
from tests.pool import Pool

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


def from_seed(seed: dict[str, Any]) -> tuple[str, str]:
    return "model.stages=[finetune]", f"init=run:{seed['run']}"


@pytest.fixture(scope="module")
def plain(root: Path, seed: dict[str, Any]) -> dict[str, Any]:
    """A run of stage 2 alone, from the stage-1 run."""
    return done(train(root, "plain", *from_seed(seed)))


def start(pool: Pool, root: Path, seed: dict[str, Any], *words: str) -> list[dict[str, float]]:
    """Three steps of another stage-2 run from the same seed, by one worker without Ray; the step records."""
    options = [f"data.root={root}", "training.log_every=1", "training.max_steps=3", *SIZES, *from_seed(seed), *words]
    losses: list[dict[str, float]] = pool.run(
        train_from_seed, 1, to_mapping(methods.load_recipe("muva/synthetic", options))
    )[0]
    return losses


def strike(job: Job, uri: str, after: int) -> int:
    """Kill a worker once a checkpoint beyond step `after` is committed; the step from which the job continues."""

    def restarts() -> list[int]:
        return [note["step"] for note in Run.read(uri).notes() if note["kind"] == "restart"]

    job.wait_for(lambda: Path(uri, "run.json").exists() and Run.read(uri).latest_step() > after)
    before = len(restarts())
    job.workers()[-1].send_signal(signal.SIGKILL)
    job.wait_for(lambda: len(restarts()) > before)
    return restarts()[-1]


def test_one_run_killed_in_both_stages_is_the_run_of_two(
    root: Path, seed: dict[str, Any], plain: dict[str, Any]
) -> None:
    """Both stages in one run with a worker killed in each: its second stage is digit by digit that of the seeded run."""
    job, uri, boundary = train(root, "whole"), f"{root}/runs/whole", seed["steps"]
    assert 0 < strike(job, uri, 0) < boundary
    assert boundary < strike(job, uri, boundary) < boundary + plain["steps"]
    record = done(job)
    assert (record["restarts"], record["steps"]) == (2, boundary + plain["steps"])
    assert finetune_records(uri) == finetune_records(plain["run"])


def test_stage_2_runs_repeat_no_stage_1(pool: Pool, root: Path, seed: dict[str, Any], plain: dict[str, Any]) -> None:
    """Two stage-2 runs of other settings: neither has a step of stage 1, and they start at the same weights."""
    steps = [m for m in Run.read(plain["run"]).metrics() if m["kind"] == "step"]
    other = start(pool, root, seed, "model.memory_momentum=0.9")
    assert (len(steps), len(other)) == (plain["steps"], 3)
    assert not any("contrast" in m for m in (*steps, *other))
    assert other[0]["loss"] == pytest.approx(steps[0]["loss"], rel=1e-4)
    assert other[2]["memory"] != pytest.approx(steps[2]["memory"], rel=1e-4)


def test_a_seed_for_other_people_is_refused(pool: Pool, root: Path, seed: dict[str, Any]) -> None:
    """Domain B has the numbers of A, in the same layout; the people are others."""
    with pytest.raises(
        AssertionError,
        match="UserError: the prompts were learnt with another label map: 60 of 60 labels stand for other people or other images",
    ):
        start(
            pool, root, seed, "data.train=[synthetic-b]", "data.test=[synthetic-a]", "model.masks=[synthetic-b-masks]"
        )


def mask_table(run: str, stored: str) -> dict[str, float]:
    """IoU per part of predicted with exact masks, from a stored evaluation."""
    (table,) = [f for f in json.loads(Run.read(run).store.read(stored))["figures"] if f["kind"] == "table"]
    return {part: float(share) for part, share in table["data"]["rows"]}


def test_what_is_learnt_in_a_helps_in_b(plain: dict[str, Any]) -> None:
    """One training, two targets: above chance and above the untrained weights in B, lower there than in A; and the page."""
    from jobs.evaluate import evaluate
    from jobs.report import report

    run = plain["run"]
    found = {d: evaluate(run, "last", [f"data.test=[synthetic-{d}]"]) for d in "ab"}
    before = evaluate(run, "start")
    assert found["b"]["mAP"] > 1.5 * found["b"]["chance_mAP"]
    assert found["b"]["mAP"] > before["mAP"]
    assert found["b"]["mAP"] < found["a"]["mAP"]
    learnt, untrained = (mask_table(run, entry["stored"]) for entry in (found["a"], before))
    assert learnt.keys() == untrained.keys() == {"head", "upper", "legs"}
    assert min(learnt.values()) > 0.5
    assert all(learnt[part] > untrained[part] for part in learnt)
    page = Path(report(run)["report"]).read_text()
    for text in ("pseudo masks", "predicted", "legs: attention", "Intersection over union", "synthetic-b"):
        assert text in page
