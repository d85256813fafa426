"""Tracklets of a table and the frames of a clip (methods/climb.md section 6.4; TF-CLIP's rules).

Restricted random sampling: n frames are cut into S equal chunks (the last frame pads), training draws one frame of each
chunk, the test takes each chunk's first. Dense: consecutive clips of S, the last one padded cyclically from itself.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reid_dist.data.decode import decode
from reid_dist.data.store import NONE, TableView
from reid_dist.data.transforms import ImageDraws, ImageTransform
from reid_dist.errors import UserError


def chunks(frames: int, clip: int) -> np.ndarray:
    """int64 [S, q]: frame numbers of each chunk. Raises ValueError for a tracklet without frames."""
    if frames < 1:
        raise ValueError("a tracklet without frames has no clip")
    width = -(-frames // clip)
    return np.minimum(np.arange(clip * width), frames - 1).reshape(clip, width)


def restricted_clip(frames: int, clip: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """int64 [S]: one frame of each chunk, drawn by `rng` or (test) the first."""
    parts = chunks(frames, clip)
    if rng is None:
        return parts[:, 0]
    return pick(parts, rng.integers(0, parts.shape[1], size=clip))


def pick(parts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Entry offsets[s] of chunk s."""
    return parts[np.arange(len(parts)), offsets]


def dense_clips(frames: int, clip: int) -> np.ndarray:
    """int64 [clips, S]: all frames in consecutive clips. Raises ValueError for a tracklet without frames."""
    if frames < 1:
        raise ValueError("a tracklet without frames has no clip")
    starts = range(0, frames, clip)
    return np.stack([start + np.arange(clip) % min(clip, frames - start) for start in starts])


def pieces(frames: int, step: int) -> np.ndarray:
    """int64 [k, 2] ranges of `step` frames, the last one keeps the rest; none for a tracklet shorter than `step`."""
    count = frames // step
    ends = [*(step * (i + 1) for i in range(count - 1)), frames]
    return np.array([(step * i, ends[i]) for i in range(count)], dtype=np.int64).reshape(-1, 2)


def windows(frames: int, clip: int, stride: int) -> np.ndarray:
    """int64 [k, 2] ranges of `clip` frames every `stride`; a shorter tracklet is one range.

    As in TF-CLIP the last full window is left out.
    """
    starts = range(0, frames - clip, stride)
    ranges = [(start, start + clip) for start in starts] or [(0, frames)]
    return np.array(ranges, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Tracklets:
    """Tracklets of a view: rows of each in frame order, label and camera of each."""

    rows: tuple[np.ndarray, ...]
    label: np.ndarray  # int64 [M]
    camid: np.ndarray  # int64 [M]

    def __len__(self) -> int:
        return len(self.rows)


def group_tracklets(view: TableView) -> Tracklets:
    """Tracklets of all rows of a view, in order of first appearance. Rows of a tracklet share domain, id, camera and
    number. Raises UserError when the table has no tracklets."""
    number = np.asarray(view.tracklet)
    if len(number) and (number == NONE).any():
        raise UserError(
            f"tables {view.describe()} hold images, not tracklets: set model.frames=0 or train on a video set"
        )
    keys = np.stack([view.domain, view.pid, view.camid, number], axis=1)
    order = np.lexsort((np.arange(len(keys)), np.asarray(view.frame), *keys.T[::-1]))
    _, first = np.unique(keys[order], axis=0, return_index=True)
    groups = np.split(order, first[1:]) if len(order) else []
    groups.sort(key=lambda rows: int(rows.min()))
    heads = np.array([rows[0] for rows in groups], dtype=np.int64)
    return Tracklets(tuple(groups), np.asarray(view.label)[heads], np.asarray(view.camid)[heads])


def cut_tracklets(whole: Tracklets, how: str, clip: int, step: int, drop_short: bool) -> Tracklets:
    """Training items: whole tracklets, pieces of `step` frames (LS-VID) or windows of `clip` frames (iLIDS-VID)."""
    if how == "whole":
        return whole
    parts: list[tuple[int, np.ndarray]] = []
    for number, rows in enumerate(whole.rows):
        ranges = pieces(len(rows), step) if how == "pieces" else windows(len(rows), clip, step)
        if not len(ranges) and not drop_short:
            ranges = np.array([(0, len(rows))])
        parts.extend((number, rows[start:stop]) for start, stop in ranges.tolist())
    owner = np.array([number for number, _ in parts], dtype=np.int64)
    return Tracklets(tuple(rows for _, rows in parts), whole.label[owner], whole.camid[owner])


@functools.cache
def _decoders() -> ThreadPoolExecutor:
    """One pool per process, apart from the loader's threads, so that those may wait for it."""
    return ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 2), thread_name_prefix="frames")


def load_frames(
    view: TableView, rows: np.ndarray, transform: ImageTransform, draws: Sequence[ImageDraws] | None = None
) -> Tensor:
    """Frames of any shape of `rows` -> float32 [*rows.shape, 3, h, w]: one take, decoded in parallel, each file once.

    Frames of different sizes are resized to the transform's.
    """
    flat = rows.reshape(-1)
    unique, inverse = np.unique(flat, return_inverse=True)
    encoded = view.encoded(unique)
    images = list(_decoders().map(decode, encoded, [view.path(int(row)) for row in unique]))
    chosen = list(draws) if draws is not None else [ImageDraws()] * len(flat)
    with torch.inference_mode(False):  # the mode is this thread's alone: others may not write into its tensors
        out = torch.empty(len(flat), 3, *transform.size)

    def write(place: int) -> None:
        out[place] = transform.apply(images[inverse[place]], chosen[place])

    list(_decoders().map(write, range(len(flat))))
    return out.reshape(*rows.shape, 3, *transform.size)


def clip_draws(transform: ImageTransform, rng: np.random.Generator, frames: int) -> list[ImageDraws]:
    """Ours, after the paper's words: flip and crop shared by the clip, erasing drawn for each frame."""
    shared = transform.draw(rng)
    own = [transform.draw(rng).erase for _ in range(frames)]
    return [ImageDraws(shared.flip, shared.crop, erase) for erase in own]


@dataclass(frozen=True, slots=True)
class DenseClips:
    """All clips of some tracklets, made on demand: a tracklet of thousands of frames never stands in memory whole."""

    view: TableView
    rows: tuple[np.ndarray, ...]  # frames of each tracklet
    transform: ImageTransform
    clip: int
    at_once: int  # clips per forward pass

    def __iter__(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(clips [k, S, 3, h, w], int64 [k] place of the tracklet each belongs to)."""
        every = [
            (owner, rows[clip]) for owner, rows in enumerate(self.rows) for clip in dense_clips(len(rows), self.clip)
        ]
        for start in range(0, len(every), self.at_once):
            part = every[start : start + self.at_once]
            frames = load_frames(self.view, np.stack([rows for _, rows in part]), self.transform)
            yield frames, np.array([owner for owner, _ in part], dtype=np.int64)
