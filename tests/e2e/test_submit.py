"""Every job of the main path through `ray job submit` against a real local head with token authentication."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from reid_dist import methods
from reid_dist.runs import Run
from tests.e2e.cluster import ROOT, Head, head
from tests.injection import wait_until
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
    images = f"{place}/raw-synthetic-cuhk-pedes/imgs"
    loose = succeeded(cluster.submit("jobs.extract", run, images, f"out={place}/loose.npz"), "extract")
    assert loose["rows"] == 44
    page = succeeded(cluster.submit("jobs.report", run), "report")
    text = Path(str(page["report"])).read_text()
    assert "untrained" in text
    assert "Expert usage" in text
    listed = succeeded(cluster.submit("jobs.runs", "ls", f"runs={place}/runs", f"root={place}"), "runs")
    assert "submitted" in json.dumps(listed)


def test_demo(cluster: Head, place: Path) -> None:
    words = [f"folder={place}/demo", "training.max_steps=12", "training.epochs=1"]
    record = succeeded(cluster.submit("jobs.demo", *words, timeout=500), "demo")
    wanted = {
        "rank1",
        "rank5",
        "rank10",
        "mAP",
        "mINP",
        "chance_mAP",
        "num_workers",
        "zero_stage",
        "steps",
        "seconds",
        "report",
    }
    assert wanted <= record.keys()
    assert (record["steps"], record["num_workers"], record["zero_stage"]) == (12, 2, 1)


def exported(cluster: Head) -> str:
    """What Prometheus would read from all processes of the cluster."""
    found = json.loads((cluster.folder / "prom_metrics_service_discovery.json").read_text())
    pages = []
    for target in [target for group in found for target in group["targets"]]:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
            pages.append(answer.read().decode())
    return "\n".join(pages)


def test_job_stop_ends_with_a_checkpoint(cluster: Head, place: Path) -> None:
    run = place / "runs/long"
    many = ["training.epochs=400", "training.max_steps=2000", "training.checkpoint_every_steps=7"]
    words = ["jobs.train", "comoe/tiny", f"data.root={place}", f"output={place}/runs", "name=long", *many]
    there = ["--address", cluster.dashboard]
    sent = ["job", "submit", *there, "--working-dir", ".", "--no-wait", "--submission-id", "long"]
    started = cluster.ray(*sent, "--", sys.executable, "-m", *words, "training.log_every=1", "training.eval_every=0")
    assert started.returncode == 0, started.stderr
    wait_until(lambda: (run / "checkpoints").is_dir() and Run.read(str(run)).latest_step() > 0, "a checkpoint")
    panels = json.loads((ROOT / "cluster/monitoring/dashboard.json").read_text())["panels"]
    lines = [re.sub(r"by \([^)]*\)", "", panel["targets"][0]["expr"]) for panel in panels]
    shown = {name for line in lines for name in re.findall(r"ray_[a-z_]+", line) if not re.search("gpu|gram", name)}
    assert "ray_reid_training_step" in shown
    wait_until(lambda: all(map(exported(cluster).__contains__, shown)), f"not all of {shown}", 60)
    stopped = cluster.ray("job", "stop", *there, "long")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    record = json.loads((run / "record.json").read_text())
    at = re.search(r"at step (\d+); the same command continues", record["error"])
    assert at, record
    assert int(at[1]) == Run.read(str(run)).latest_step()


def test_doctor_looks_at_every_node(cluster: Head, place: Path) -> None:
    cluster.add()
    result = cluster.submit("jobs.doctor", "--cluster", f"storage={place}")
    record = json.loads([line for line in result.stdout.splitlines() if line.lstrip().startswith('{"job"')][-1])
    assert len(record["nodes"]) == 2
    for findings in record["nodes"].values():
        states = {finding["what"]: finding["state"] for finding in findings}
        good = ("python", "libraries", "authentication", "storage fence", "clock")
        assert {what: states[what] for what in good} == dict.fromkeys(good, "good")
    assert (result.returncode == 0) == (record["broken"] == 0)


def test_wrong_input_is_exit_2_in_the_log_and_a_wrong_token_gets_nothing(cluster: Head) -> None:
    result = cluster.submit("jobs.train", "comoe/tiny", "training.num_worker=2")
    assert result.returncode == 1  # ray's own exit code for any failure
    assert "did you mean 'num_workers'?" in result.stdout
    assert '"exit_code": 2' in result.stdout
    wrong = {**cluster.environment, "RAY_AUTH_TOKEN": "0" * 64, "RAY_AUTH_TOKEN_PATH": ""}
    stranger = Head(cluster.dashboard, wrong, cluster.address)
    refused = stranger.submit("jobs.train", "--list")
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
