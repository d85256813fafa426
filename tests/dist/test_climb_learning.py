"""CLIMB learns on the synthetic image and video worlds: people whom it never saw."""

from __future__ import annotations

from pathlib import Path

from tests.learning import learn

CLEARLY = 1.5  # times the better of chance and the untrained network
WORLD = {"num_train": 200, "num_test": 30, "num_distractors": 0, "images_per_id": 6}
SHORT = (
    "training.epochs=1", "model.iterations=120", "training.global_batch=48", "schedule.warmup=10", "optim.lr=1e-3",
)  # fmt: skip
VIDEO = {"num_train": 160, "num_test": 30, "num_distractors": 0, "max_frames": 6, "twins": 0.0, "difficulty": "mild"}
CLIPS = (
    "training.epochs=1", "model.iterations=70", "training.global_batch=16", "schedule.warmup=10", "optim.lr=1e-3",
    "model.instances=2", "model.frames=4", "model.temporal_strides=[1,4]", "seed=1",
)  # fmt: skip


def test_trained_beats_untrained_and_chance(tmp_path: Path) -> None:
    run = learn(tmp_path, "climb/synthetic_image", ["image"], SHORT, **WORLD)
    after, before = run["trained"]["image"], run["untrained"]["image"]
    assert after["mAP"] > CLEARLY * max(before["mAP"], after["chance_mAP"]), run


def test_trained_on_clips_beats_untrained_and_chance(tmp_path: Path) -> None:
    run = learn(tmp_path, "climb/synthetic_video", ["video"], CLIPS, seed=1, **VIDEO)
    after, before = run["trained"]["video"], run["untrained"]["video"]
    assert after["mAP"] > CLEARLY * max(before["mAP"], after["chance_mAP"]), run
