"""Training jobs that are stopped, killed and fed wrong input, run as a user runs them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from reid_dist import methods
from reid_dist.runs import Run
from tests.e2e.cluster import ROOT
from tests.e2e.job import Job
from tests.s3server import S3Server, s3  # noqa: F401 - a fixture
from tests.worlds import small_tables


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    small_tables(folder, methods.load_recipe("comoe/tiny"))
    return folder


def losses(run: str) -> list[tuple[int, float]]:
    return [(m["step"], m["loss"]) for m in Run.read(run).metrics() if m["kind"] == "step"]


def command(tables: Path, name: str, output: str, *more: str) -> list[str]:
    return [
        "jobs.train", "comoe/tiny", f"data.root={tables}", f"output={output}", f"name={name}", "training.num_workers=2",
        "training.log_every=1", "training.eval_every=0", *more,
    ]  # fmt: skip


def test_run_on_s3_is_stopped_continued_done_and_guarded(tables: Path, s3: S3Server) -> None:  # noqa: F811
    output = f"{s3.uri}/runs"
    long = ("training.epochs=400", "training.max_steps=2000")
    first = Job(*command(tables, "bucket", output, *long))
    first.wait_for(lambda: _steps(f"{output}/bucket") > 5)
    first.process.send_signal(signal.SIGTERM)
    code, record, err = first.finish()
    assert code == 1, err[-2000:]
    assert "the same command continues" in record["error"]
    stopped = Run.read(f"{output}/bucket").latest_step()
    assert 5 < stopped < 2000
    code, record, err = Job(
        *command(tables, "bucket", output, "training.epochs=400", "training.max_steps=2001")
    ).finish()
    assert code == 2, err[-2000:]
    assert "training.max_steps: 2000 there, 2001 now" in record["error"]


def _steps(run: str) -> int:
    """Steps that are stored (flushed each minute and at checkpoints) or were logged by rank 0."""
    try:
        return len([1 for note in Run.read(run).metrics() if note["kind"] == "step"]) or Run.read(run).latest_step()
    except Exception:
        return 0


def test_killed_worker_is_survived_and_the_result_is_the_same(tables: Path, tmp_path: Path) -> None:
    relative = os.path.relpath(tables, ROOT)  # as typed in a terminal: it must mean the same on a worker
    quiet = Job(*command(Path(relative), "quiet", os.path.relpath(tmp_path, ROOT)))
    assert quiet.finish()[0] == 0
    struck = Job(*command(tables, "struck", str(tmp_path), "training.checkpoint_every_steps=2"))
    struck.wait_for(
        lambda: (tmp_path / "struck" / "checkpoints").is_dir() and Run.read(str(tmp_path / "struck")).latest_step() >= 4
    )
    struck.workers()[1].send_signal(signal.SIGKILL)
    code, record, err = struck.finish()
    assert code == 0, err[-3000:]
    assert record["restarts"] == 1
    assert losses(f"{tmp_path}/struck") == losses(f"{tmp_path}/quiet")
    again, done, _ = Job(*command(tables, "struck", str(tmp_path), "training.checkpoint_every_steps=2")).finish()
    assert (again, done["already_done"]) == (0, True)
    assert not (tmp_path / "struck" / "ray").exists()


def test_diverged_loss_ends_at_once_with_one_line(tables: Path, tmp_path: Path) -> None:
    code, record, err = Job(*command(tables, "nan", str(tmp_path), "optim.lr=1e30")).finish()
    assert code == 1
    assert "lower optim.lr" in record["error"]
    assert "\n" not in record["error"]
    assert json.loads((tmp_path / "nan" / "record.json").read_text())["exit_code"] == 1
    assert f"train: {record['error']}" in err


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (["jobs.train", "comoe/tiny", "optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
        (["jobs.train", "comoe/tiny", "training.zero_stage=4"], "choose one of 0, 1, 2, 3"),
        (["jobs.train", "comoe/cuhk"], "did you mean 'comoe/cuhk_pedes'?"),
        (["jobs.train", "comoe/tiny", "data.root=nowhere"], "jobs.pack"),
        (["jobs.evaluate", "nowhere/run"], "there is no run"),
        (["jobs.pack", "cuhk-pedes", "nowhere", "root=nowhere"], "nowhere"),
    ],
)
def test_wrong_words_are_exit_2_and_one_line(words: list[str], telling: str) -> None:
    code, record, err = Job(*words).finish(60)
    assert code == 2, err
    assert telling in record["error"]
    assert record["error"] in err.strip().splitlines()[-1]
