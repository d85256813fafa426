"""CLIMB's video path through the jobs: a trained run scored on one clip per tracklet and on all frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from jobs import evaluate as job
from reid_dist.data import leaks
from reid_dist.data.store import open_view
from reid_dist.data.tracklets import tracklets_of
from reid_dist.evaluation.distributed.retrieval import plan_retrieval, score
from reid_dist.evaluation.pipeline import Options
from reid_dist.evaluation.protocols import get
from reid_dist.methods.climb.method import transform_of
from reid_dist.methods.climb.tracklets import dense_clips, load_frames, restricted_clip
from reid_dist.training.loaded import load_run
from tests.learning import stored

WORLD = {"num_train": 6, "num_test": 6, "num_distractors": 3, "max_frames": 20}
SHORT = ("training.max_steps=3", "model.iterations=3", "schedule.warmup=0", "model.arch=tiny")


def by_hand(uri: str, dense: bool) -> float:
    """mAP of mean clip descriptors, tracklet after tracklet, one clip at a time."""
    loaded = load_run(uri)
    view = leaks.tested(open_view(loaded.recipe.data, loaded.recipe.data.test))
    retrieval = plan_retrieval(get("video"), view)
    frames, transform = loaded.recipe.model.frames, transform_of(loaded.recipe.model, train=False)
    features = {}
    for kind, side in retrieval.sides.items():
        rows = []
        for members in tracklets_of(view, side.rows):
            clips = dense_clips(len(members), frames) if dense else restricted_clip(len(members), frames)[None]
            with torch.no_grad():
                parts = [loaded.model.encode(load_frames(view, members[clip][None], transform)) for clip in clips]  # type: ignore[operator]
            rows.append(torch.cat(parts).mean(0))
        features[kind] = {"descriptor": torch.stack(rows).numpy()}
    return float(score(retrieval, features, loaded.spec.similarity, Options())[0]["mAP"])


def test_a_run_is_scored_on_one_clip_and_on_all_frames(tmp_path: Path) -> None:
    uri = stored(tmp_path, "climb/synthetic_video", SHORT, **WORLD)
    view = leaks.tested(open_view(load_run(uri).recipe.data, ("synthetic-mars",)))
    lengths = [len(rows) for rows in tracklets_of(view, np.arange(len(view)))]
    assert max(lengths) > 16
    one, every = job.main([uri]), job.main([uri, "model.test_clips=dense"])
    assert (one["num_queries"], one["protocol"]) == (every["num_queries"], every["protocol"])
    assert abs(one["mAP"] - by_hand(uri, dense=False)) < 1e-6
    assert abs(every["mAP"] - by_hand(uri, dense=True)) < 1e-6
    assert one["mAP"] != every["mAP"]
    assert one["stored"] != every["stored"]
    assert "model.test_clips=dense" in every["stored"]
