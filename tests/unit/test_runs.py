"""Runs: the same recipe continues, another one is refused, two attempts cannot both write, no secret is stored."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from reid_dist import runs
from reid_dist.config import Recipe, build_recipe, flatten, to_mapping
from reid_dist.errors import RunError, UserError
from reid_dist.runs import FencedOut, Identity, Run, code_version, identity_of, library_versions, ship_logs
from reid_dist.runs import identity as identity_module
from reid_dist.runs import logs as logs_module
from reid_dist.runs.metrics import MetricsWriter
from reid_dist.storage import StorageError, open_store
from reid_dist.storage.publish import publish_folder
from tests.s3server import s3  # noqa: F401 - the fixture


@dataclass(frozen=True)
class Config:
    width: int = 8


DATA = {"cuhk-pedes": {"version": 1, "content": "abc", "rows": 10}}


def recipe(**overrides: object) -> Recipe:
    tree = {"name": "r1", "method": "toy", **overrides}
    return build_recipe(tree, lambda name: Config)


def start(uri: str, **overrides: object) -> Run:
    chosen = recipe(**overrides)
    return Run.open(uri, identity_of(chosen, DATA), chosen)


@pytest.fixture(params=["folder", "bucket"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "runs" / "r1")
    return request.getfixturevalue("s3").uri + "/r1"


def test_every_free_key_exists() -> None:
    assert set(flatten(to_mapping(recipe()))) >= identity_module.FREE


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("training", {"num_workers": 8}, True),
        ("training", {"zero_stage": 3, "micro_batches": 4}, True),
        ("output", "s3://elsewhere/x", True),
        ("data", {"root": "s3://bucket/x", "cache": "/fast", "loader_threads": 9}, True),
        ("tracking", {"wandb": "project"}, True),
        ("seed", 2, False),
        ("training", {"global_batch": 32}, False),
        ("training", {"precision": "bf16"}, False),
        ("model", {"width": 9}, False),
        ("optim", {"lr": 2e-4}, False),
        ("data", {"train": ["other"]}, False),
    ],
)
def test_what_identifies_a_run(key: str, value: object, same: bool) -> None:
    one, two = identity_of(recipe(), DATA), identity_of(recipe(**{key: value}), DATA)
    assert (one.digest == two.digest) is same


def test_data_and_code_identify_a_run() -> None:
    one = identity_of(recipe(), DATA)
    assert identity_of(recipe(), {"cuhk-pedes": {"version": 2, "content": "abc", "rows": 10}}).digest != one.digest
    assert dataclasses.replace(one, code="other").digest != one.digest
    assert identity_of(recipe(), json.loads(json.dumps(DATA))).digest == one.digest


def test_code_version_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's working directory has no .git: the digest is that of the files, the same as in a checkout."""
    here = code_version()["digest"]
    package = tmp_path / "reid_dist"
    for path in sorted(Path(runs.__file__).parents[1].rglob("*.py")):
        target = package / path.relative_to(Path(runs.__file__).parents[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    monkeypatch.setattr(identity_module, "__file__", str(package / "runs" / "identity.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    copied = identity_module.code_version.__wrapped__()
    assert copied == {"digest": here, "commit": None, "dirty": None}
    (package / "config.py").write_text("# other\n")
    assert identity_module.code_version.__wrapped__()["digest"] != here


def test_open_continue_and_done(uri: str) -> None:
    first = start(uri)
    assert first.attempt == 1
    assert first.finished is None
    second = start(uri, training={"num_workers": 2})
    assert second.attempt == 2
    second.write_record({"exit_code": 1, "error": "a worker died"})
    third = start(uri)
    assert third.attempt == 3
    third.write_record({"exit_code": 0, "rank1": 0.5})
    again = start(uri)
    assert again.finished == {"exit_code": 0, "rank1": 0.5}
    assert again.attempt == 0
    assert [a["reason"] for a in again.card()["attempts"]] == [
        "replaced by a newer attempt; no end was recorded",
        "a worker died",
        "done",
    ]
    assert Run.read(uri).attempt == 3


def test_another_recipe_is_refused_with_the_difference(uri: str) -> None:
    start(uri)
    with pytest.raises(
        UserError, match=r"training\.epochs: 60 there, 5 now; optim\.lr|optim\.lr: 0\.0001 there"
    ) as caught:
        start(uri, training={"epochs": 5}, optim={"lr": 0.5})
    assert "training.epochs: 60 there, 5 now" in str(caught.value)
    assert "name=" in str(caught.value)
    assert "\n" not in str(caught.value)
    other = recipe()
    with pytest.raises(UserError, match=r"data\.cuhk-pedes\.version: 1 there, 2 now"):
        Run.open(uri, identity_of(other, {"cuhk-pedes": {"version": 2, "content": "abc", "rows": 10}}), other)
    changed = dataclasses.replace(identity_of(other, DATA), code="0" * 32)
    with pytest.raises(UserError, match="code: "):
        Run.open(uri, changed, other)


@pytest.mark.parametrize("name", ["..", ".hidden", "a b", "x;rm", "a\nb", "n" * 300])
def test_bad_run_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="name"):
        Run.open(f"{tmp_path}/{name}", identity_of(recipe(), DATA), recipe())


def test_unreadable_run_and_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        Run.read(str(tmp_path / "none"))
    open_store(tmp_path / "bad").write("run.json", b"{")
    with pytest.raises(UserError, match="cannot be read"):
        start(str(tmp_path / "bad"))


def test_newer_attempt_fences_out_the_older(uri: str) -> None:
    old = start(uri)
    worker = Run.attach(uri, old.attempt)
    worker.check_fence()
    new = start(uri)
    for fenced in (old, worker):
        with pytest.raises(FencedOut, match=r"attempt 1 .* replaced"):
            fenced.check_fence()
    assert FencedOut("x").retryable is False
    new.check_fence()
    old.write_record({"exit_code": 1, "error": "fenced out"})
    new.write_record({"exit_code": 0})
    old.write_record({"exit_code": 1, "error": "fenced out"})
    assert Run.read(uri).finished == {"exit_code": 0}


def test_fenced_attempt_commits_nothing(tmp_path: Path) -> None:
    uri = str(tmp_path / "r1")
    old = start(uri)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w").write_bytes(b"w")
    new = start(uri)
    with pytest.raises(FencedOut):
        publish_folder(old.store, "checkpoints/step-00000005", tmp_path / "model", guard=old.check_fence)
    assert new.latest_step() == 0
    assert new.store.list("checkpoints") == []


def test_two_attempts_at_the_same_moment(tmp_path: Path) -> None:
    """However two starts interleave, exactly one attempt is not fenced out, and numbers are never shared."""
    uri = str(tmp_path / "r1")
    start(uri)
    gate = threading.Barrier(8)

    def attempt(_: int) -> Run | None:
        gate.wait()
        try:
            return start(uri)
        except FencedOut:
            return None

    with ThreadPoolExecutor(8) as pool:
        started = [run for run in pool.map(attempt, range(8)) if run]
    numbers = [run.attempt for run in started]
    assert len(numbers) == len(set(numbers)) >= 1
    alive = []
    for run in started:
        try:
            run.check_fence()
        except FencedOut:
            continue
        alive.append(run.attempt)
    assert alive == [max(numbers)]


def test_the_loser_of_the_conditional_put_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reid_dist.runs import run as module

    uri = str(tmp_path / "r1")
    start(uri)
    monkeypatch.setattr(module, "_attempts", lambda store: [])  # listed before the other's number was there
    with pytest.raises(FencedOut, match="same moment"):
        start(uri)


def test_stop_request_is_the_attempts_own(uri: str) -> None:
    run = start(uri)
    assert not run.stop_requested()
    run.request_stop("SIGTERM")
    assert Run.attach(uri, 1).stop_requested()
    assert not start(uri).stop_requested()


def _checkpoint(run: Run, tmp_path: Path, step: int, rank1: float) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / "w").write_text(str(step))
    name = f"checkpoints/step-{step:08d}"
    manifest = publish_folder(run.store, name, folder)
    run.note_checkpoint(name, step, {"rank1": rank1}, manifest.size)


def test_card(uri: str, tmp_path: Path) -> None:
    run = start(uri)
    run.describe(hosts=2)
    _checkpoint(run, tmp_path, 5, 0.1)
    run.note_restart(reason="node lost", step=5)
    run = start(uri)
    _checkpoint(run, tmp_path, 10, 0.3)
    _checkpoint(run, tmp_path, 10, 0.4)  # saved twice: the latest counts
    assert run.latest_step() == 10
    run.store.delete_tree("checkpoints/step-00000005")
    run.write_record({"exit_code": 0})
    card = json.loads(run.store.read("card.json"))
    assert card["status"] == "done"
    assert card["hosts"] == 2
    assert [(c["step"], c["metrics"]["rank1"], c["kept"]) for c in card["checkpoints"]] == [
        (5, 0.1, False),
        (10, 0.4, True),
    ]
    assert card["metrics"] == {"rank1": 0.4}
    assert [(r["reason"], r["step"], r["attempt"]) for r in card["restarts"]] == [("node lost", 5, 1)]
    assert [a["number"] for a in card["attempts"]] == [1, 2]
    assert card["attempts"][1]["end"] >= card["attempts"][1]["start"]
    assert card["data"] == DATA
    assert card["code"] == code_version()
    assert card["libraries"]["torch"] == library_versions()["torch"]
    assert card["seeds"] == {"seed": 1}
    assert card["command"].startswith("python ")
    assert card["recipe"]["training"]["global_batch"] == 64
    assert card["identity"] == identity_of(recipe(), DATA).digest


def test_metrics_of_attempts_are_merged(uri: str) -> None:
    first = start(uri)
    for step in (1, 2, 3):
        first.write_metrics({"kind": "step", "step": step, "loss": 1.0})
    first.write_metrics({"kind": "eval", "step": 2, "rank1": 0.1})
    first.flush_metrics()
    first.flush_metrics()
    second = start(uri)
    for step in (3, 4):
        second.write_metrics({"kind": "step", "step": step, "loss": 2.0})
    second.flush_metrics()
    again = MetricsWriter(second.store, 2)  # its worker starts again in the same attempt
    again.write({"kind": "step", "step": 4, "loss": 3.0})
    again.flush()
    merged = Run.read(uri).metrics()
    assert [(m["kind"], m["step"], m.get("loss")) for m in merged] == [
        ("step", 1, 1.0),
        ("step", 2, 1.0),
        ("eval", 2, None),
        ("step", 3, 2.0),
        ("step", 4, 3.0),
    ]
    assert len(second.store.list("metrics/")) == 3


def test_metrics_survive_a_failing_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(str(tmp_path / "r1"))
    run.write_metrics({"kind": "step", "step": 1})

    def refuse(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(run.store, "write", refuse)
        with pytest.raises(StorageError, match="full"):
            run.flush_metrics()
    run.flush_metrics()
    assert [m["step"] for m in run.metrics()] == [1]


def test_logs_are_shipped(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(uri)
    monkeypatch.setattr(logs_module, "SHIP_EVERY_S", 0.05)
    log = logging.getLogger("reid_dist.somewhere")
    with ship_logs(run, "rank-0"):
        log.info("early line")
        _wait(lambda: b"early line" in _read(run, "logs/attempt-0001/rank-0.log"))
    with pytest.raises(RunError, match="boom"), ship_logs(run, "rank-0"):
        raise RunError("boom")
    second = run.store.read("logs/attempt-0001/rank-0.2.log").decode()
    assert "Traceback" in second
    assert "RunError: boom" in second
    assert "early line" not in second


def _read(run: Run, key: str) -> bytes:
    return run.store.read(key) if run.store.exists(key) else b""


def _wait(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_log_that_cannot_be_stored_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(str(tmp_path / "r1"))

    def refuse(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(run.store, "write", refuse)
    with ship_logs(run, "driver"):
        logging.getLogger("reid_dist").info("line")
    assert run.store.list("logs") == []


def test_finished_needs_exit_code_zero(tmp_path: Path) -> None:
    run = start(str(tmp_path / "r1"))
    assert run.finished is None
    run.write_record({"exit_code": 1})
    assert run.finished is None


def test_import_is_light() -> None:
    code = "import sys, reid_dist.runs; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'boto3', 'lance')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=os.getcwd(), check=False).returncode == 0


def test_identity_tree_is_plain() -> None:
    tree = Identity(recipe={"betas": (0.9, 0.999)}, data={}, code="x").tree()
    assert tree == {"recipe": {"betas": [0.9, 0.999]}, "data": {}, "code": "x"}
