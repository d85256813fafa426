"""Parts of the training plane that need no workers: retention, out-of-memory text, meter, trackers, exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist import methods
from reid_dist.config import Recipe, TrackingConfig, TrainingConfig
from reid_dist.errors import Diverged, UserError
from reid_dist.runs import Run, identity_of
from reid_dist.training import checkpoint as checkpoints
from reid_dist.training.checkpoint import Progress, Snapshot
from reid_dist.training.context import RunContext
from reid_dist.training.loop import out_of_memory
from reid_dist.training.meter import Meter
from reid_dist.training.tracking import trackers

RECIPE = Recipe(name="run", method="toy", training=TrainingConfig(num_workers=2, micro_batches=3))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(str(tmp_path / "run"), identity_of(RECIPE, {}), RECIPE)


def snapshot(step: int, score: float | None = None) -> Snapshot:
    metrics = {} if score is None else {"rank1": score}
    weights = {"w": torch.full((3, 2), float(step)), "scalar": torch.tensor(1.5)}
    optimizer = {"exp_avg": {"w": torch.ones(3, 2)}, "step": {"w": torch.tensor(4.0)}}
    return Snapshot(Progress(step=step, metrics=metrics), weights, optimizer, {"memory": torch.arange(4)})


def test_checkpoints_are_kept_by_age_and_score_and_read_back_whole(run: Run) -> None:
    writer = checkpoints.Writer(run, keep_last=2, keep_best=1, score="rank1")
    for step, score in ((10, 0.2), (20, 0.9), (30, 0.3), (40, 0.4)):
        writer.save(snapshot(step, score))
    writer.close()
    assert [c["step"] for c in run.checkpoints() if c["kept"]] == [20, 30, 40]
    newest = checkpoints.newest(run)
    assert newest is not None
    assert newest.progress == Progress(step=40, metrics={"rank1": 0.4})
    assert torch.equal(newest.model["w"], torch.full((3, 2), 40.0))
    assert newest.optimizer.keys() == {"exp_avg", "step"}
    assert torch.equal(newest.method["memory"], torch.arange(4))


def test_a_damaged_checkpoint_is_passed_over_for_an_older_good_one(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    writer = checkpoints.Writer(run, keep_last=3, keep_best=0, score="rank1")
    for step in (10, 20):
        writer.save(snapshot(step))
    writer.close()
    victim = next(Path(run.uri).glob("checkpoints/step-00000020/*/model.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(bytes(data))
    newest = checkpoints.newest(run)
    assert newest is not None
    assert newest.progress.step == 10
    assert "does not verify" in caplog.text


def test_what_a_killed_publisher_left_is_removed_by_the_next(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = checkpoints.Writer(run, keep_last=2, keep_best=0, score="rank1")
    writer.save(snapshot(10))
    writer.close()
    for left in (
        "step-00000010/dead/model.safetensors",
        "step-00000020/dead/model.safetensors",
        "step-00000020/dead/.tmp-x",
    ):
        run.store.write(f"checkpoints/{left}", b"half")
    whole = sorted(run.store.list("checkpoints/step-00000010/"), key=lambda entry: entry.key)
    checkpoints.Writer(run, keep_last=2, keep_best=0, score="rank1").close()
    kept = {Path(path).parent.name for path in Path(run.uri).rglob("checkpoints/**/*") if path.is_file()}
    assert "dead" not in kept
    assert [e.key for e in run.store.list("checkpoints/")] == [e.key for e in whole if "dead" not in e.key]
    run.store.write("checkpoints/step-00000010/COMMITTED", b"{torn")
    checkpoints.Writer(run, keep_last=2, keep_best=0, score="rank1").close()  # must not end a run


def test_a_retired_checkpoint_loses_its_marker_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kill in the middle leaves an orphan and not a committed folder without its files."""
    writer = checkpoints.Writer(run, keep_last=1, keep_best=0, score="rank1")
    writer.save(snapshot(10))
    writer.wait()
    monkeypatch.setattr(type(run.store), "delete_tree", lambda self, prefix: None)  # killed before the files went
    writer.save(snapshot(20))
    writer.close()
    assert [c["step"] for c in run.checkpoints() if c["kept"]] == [20]


def test_out_of_memory_names_the_knobs() -> None:
    readable = out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RECIPE)
    assert isinstance(readable, UserError)
    for knob in (
        "training.micro_batches (now 3",
        "training.activation_checkpointing=true",
        "training.zero_stage=3 (now 1)",
    ):
        assert knob in str(readable)
    assert out_of_memory(RuntimeError("something else"), RECIPE) is None


def test_an_elastic_recipe_is_a_range_for_ray_train(monkeypatch: pytest.MonkeyPatch) -> None:
    from reid_dist.training.launch import _scaling

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    fixed = _scaling(RECIPE, {"CPU": 1.0})
    assert (fixed.num_workers, fixed.use_gpu, fixed.elasticity_enabled) == (2, False, False)
    training = dataclasses.replace(RECIPE.training, num_workers=4, min_workers=2, resize_every_s=5.0)
    elastic = _scaling(dataclasses.replace(RECIPE, training=training), {"CPU": 1.0, "GPU": 1.0})
    assert (elastic.min_workers, elastic.max_workers, elastic.use_gpu) == (2, 4, True)
    assert elastic.elastic_resize_monitor_interval_s == 5.0
    assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "5"


def test_gauges_for_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import metrics

    from reid_dist.training.launch import GAUGES, Gauges

    seen: dict[str, tuple[float, dict[str, str]]] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            seen[self.name] = (value, tags)

    monkeypatch.setattr(metrics, "Gauge", Gauge)
    Gauges("mine").log(7, {"step/loss": 0.5, "step/rows_per_s": 90.0, "step/lr": 1e-4})
    Gauges("mine").log(8, {"eval/loss": 3.0})
    of_run = {"run": "mine"}
    assert seen == {"reid_training_loss": (0.5, of_run), "reid_training_rows_per_s": (90.0, of_run),
                    "reid_training_step": (8, of_run)}  # fmt: skip
    assert {f"reid_training_{name}" for name in GAUGES} == seen.keys()


def test_meter_reads_rarely_and_names_the_term_that_diverged() -> None:
    records: list[dict[str, float]] = []
    meter = Meter(RunContext(seed=1, rank=0, world_size=1), every=3, record=records.append)
    for step in (1, 2):
        meter.add(step, 0, 0, 0.1, 8, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    assert not records
    meter.add(3, 0, 0, 0.1, 8, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    assert [record["loss"] for record in records] == [3.0] * 3
    meter.add(4, 0, 0, 0.1, 8, {"a": torch.tensor(1.0), "b": torch.tensor(float("nan"))})
    with pytest.raises(Diverged, match="loss term b is nan at step 4"):
        meter.flush()


def test_trackers_receive_scalars_and_a_broken_one_is_dropped(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    class FakeRun:
        def log(self, scalars: dict[str, float], step: int) -> None:
            seen.append((step, scalars))
            if step == 2:
                raise RuntimeError("quota")

        def finish(self) -> None:
            seen.append("finished")

    fake = types.SimpleNamespace(init=lambda **words: seen.append(words["project"]) or FakeRun())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recipe = Recipe(name="run", method="toy", tracking=TrackingConfig(wandb="lab"))
    sinks = trackers(recipe, run)
    for step in (1, 2, 3):
        for sink in sinks:
            sink.log(step, {"loss": 0.5})
    for sink in sinks:
        sink.close()
    assert seen == ["lab", (1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert "quota" in caplog.text
    assert list(Path(run.uri).glob("tensorboard/attempt-0001/events*"))


def test_a_wanted_tracker_that_is_not_installed_is_the_users(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="pip install mlflow"):
        trackers(Recipe(name="run", method="toy", tracking=TrackingConfig(mlflow="sqlite:///x")), run)


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        ("UserError('mend\\nthis')", 2, "x: mend this"),
        ("RunError('no luck')", 1, "x: no luck"),
        ("KeyError('oops')", 1, "x: KeyError: 'oops'"),
        ("KeyboardInterrupt()", 1, "x: interrupted"),
    ],
)
def test_exit_codes_and_the_last_line(raised: str, code: int, line: str) -> None:
    program = (
        "from jobs._job import run_job, record_in\nfrom reid_dist.errors import *\nimport sys\n"
        f"def main(argv):\n    record_in(lambda record: sys.stderr.write('stored\\n'))\n    raise {raised}\n"
        "run_job('x', main)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, record["exit_code"], record["job"]) == (code, code, "x")
    assert done.stderr.splitlines()[-1] == line
    assert "stored" in done.stderr


@pytest.mark.parametrize("name", methods.names())
def test_precisions_that_a_method_cannot_be_computed_in_are_refused(name: str) -> None:
    """With the value and the remedy, before any job starts."""
    spec, (word, *_) = methods.get(name), [recipe for recipe in methods.recipes(name) if recipe.endswith("/tiny")]
    for precision, stage in (("fp32", 1), ("bf16", 1), ("fp16_pure", 0)):
        recipe = methods.load_recipe(word, [f"training.precision={precision}", f"training.zero_stage={stage}"])
        if precision in spec.precisions:
            spec.refuse(recipe)
        else:
            with pytest.raises(UserError, match=f"training.precision={precision}"):
                spec.refuse(recipe)
