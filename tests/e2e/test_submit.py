"""Every job of the main path through `ray job submit` against a real local head with token authentication."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from reid_dist import methods
from tests.e2e.cluster import Head, head
from tests.worlds import small_tables


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head() as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    small_tables(folder, methods.load_recipe("comoe/tiny"))
    return folder


def succeeded(result: subprocess.CompletedProcess[str], job: str) -> dict[str, object]:
    """The job's record, which the job's log holds as its last JSON line (ray prints after it)."""
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    lines = [line for line in result.stdout.splitlines() if line.lstrip().startswith('{"job"')]
    record: dict[str, object] = json.loads(lines[-1])
    assert (record["job"], record["exit_code"]) == (job, 0)
    return record


def test_pack_train_evaluate_extract_report_runs(cluster: Head, place: Path) -> None:
    run = f"{place}/runs/submitted"
    packed = succeeded(
        cluster.submit("jobs.pack", "cuhk-pedes", f"{place}/raw-synthetic-cuhk-pedes", f"root={place}", "name=packed"),
        "pack",
    )
    assert packed["rows"] == 44  # 12 + 4 + 6 identities of two images
    overrides = [f"data.root={place}", f"output={place}/runs", "name=submitted", "training.max_steps=6"]
    words = ["jobs.train", "comoe/tiny", "data.train=[packed]", "data.test=[packed]", "training.num_workers=2"]
    trained = succeeded(cluster.submit(*words, *overrides), "train")
    assert (trained["steps"], trained["num_workers"], trained["zero_stage"]) == (6, 2, 1)
    scored = succeeded(cluster.submit("jobs.evaluate", run), "evaluate")
    assert scored["num_queries"] == 24
    succeeded(cluster.submit("jobs.evaluate", run, "checkpoint=start"), "evaluate")
    features = succeeded(
        cluster.submit("jobs.extract", run, "packed", f"out={place}/features.npz", "split=test"), "extract"
    )
    assert features["rows"] == 12
    page = succeeded(cluster.submit("jobs.report", run), "report")
    text = Path(str(page["report"])).read_text()
    assert "untrained" in text
    assert "Expert usage" in text
    listed = succeeded(cluster.submit("jobs.runs", "ls", f"runs={place}/runs", f"root={place}"), "runs")
    assert "submitted" in json.dumps(listed)
