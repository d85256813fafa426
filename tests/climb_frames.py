"""CLIMB shown one frame of each tracklet where it would read a clip, for what more frames bring."""

from __future__ import annotations

import dataclasses

import numpy as np

from reid_dist.data.store import TableView
from reid_dist.data.tracklets import tracklets_of
from reid_dist.methods.climb import METHOD
from reid_dist.methods.climb.config import Config
from reid_dist.methods.climb.method import camera_tensor, transform_of
from reid_dist.methods.climb.tracklets import load_frames
from reid_dist.methods.spec import Batch, EvalSide


def first_frames(config: Config, view: TableView, side: EvalSide, index: np.ndarray) -> Batch:
    """Clips that are the first frame again and again."""
    rows = side.rows[index]
    first = np.array([members[0] for members in tracklets_of(view, rows)])
    clips = np.repeat(first[:, None], config.frames, axis=1)
    return {**camera_tensor(config, view, rows), "image": load_frames(view, clips, transform_of(config, train=False))}


ONE_FRAME = dataclasses.replace(METHOD, eval_batch=first_frames)
