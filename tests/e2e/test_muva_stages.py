"""MUVA's two stages as jobs: a stage-1 run that seeds a stage-2 run, transfer from A to B, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reid_dist.runs import Run
from tests.bench.bench_muva import make_tables
from tests.e2e.job import Job

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


def test_a_seeded_run_repeats_no_stage_1(plain: dict[str, Any]) -> None:
    """Every step of it is one of stage 2."""
    steps = [m for m in Run.read(plain["run"]).metrics() if m["kind"] == "step"]
    assert len(steps) == len(finetune_records(plain["run"])) == plain["steps"]
    assert not any("contrast" in m for m in steps)


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
