"""Tracklets: grouped, cut, sampled, read in one take, scored whole, shown as film strips."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from reid_dist.errors import UserError
from reid_dist.methods.climb import METHOD
from reid_dist.methods.climb.config import Config
from reid_dist.methods.climb.figures import token_order
from reid_dist.methods.climb.method import encode
from reid_dist.methods.climb.tracklets import (
    chunks,
    clip_draws,
    cut_tracklets,
    dense_clips,
    group_tracklets,
    load_frames,
    restricted_clip,
)
from reid_dist.methods.spec import EvalSide
from reid_dist.reporting.film import FRAMES, film_strips
from tests.unit.climb_names import VIDEO, FakeView, model_for, recipe, stage_of


def test_tracklets_are_grouped_ordered_and_cut() -> None:
    view = FakeView(people=3, frames=(1, 5, 20))
    whole = group_tracklets(view)  # type: ignore[arg-type]
    assert len(whole) == 12
    assert sorted(np.concatenate(whole.rows).tolist()) == list(range(len(view)))
    for rows, label, camid in zip(whole.rows, whole.label, whole.camid, strict=True):
        assert view.frame[rows].tolist() == list(range(len(rows)))
        assert set(view.label[rows]) == {label}
        assert set(view.camid[rows]) == {camid}
    lengths = [len(rows) for rows in whole.rows]
    pieces = cut_tracklets(whole, "pieces", 4, 8, drop_short=False)
    assert sum(len(rows) for rows in pieces.rows) == sum(lengths)
    assert sorted({len(rows) for rows in pieces.rows}) == [1, 5, 8, 12]
    dropped = cut_tracklets(whole, "pieces", 4, 8, drop_short=True)
    assert sorted({len(rows) for rows in dropped.rows}) == [8, 12]
    windows = cut_tracklets(whole, "windows", 4, 4, drop_short=False)
    assert sorted({len(rows) for rows in windows.rows}) == [1, 4]
    with pytest.raises(UserError, match=r"model.frames=0"):
        group_tracklets(FakeView())  # type: ignore[arg-type]


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 4001])
def test_clips_of_any_length(frames: int) -> None:
    rng = np.random.default_rng(0)
    for clip in (restricted_clip(frames, 4), restricted_clip(frames, 4, rng)):
        assert clip.shape == (4,)
        assert (np.diff(clip) >= 0).all()
        assert 0 <= clip.min() <= clip.max() < frames
    every = dense_clips(frames, 4)
    assert every.shape == (-(-frames // 4), 4)
    assert set(every.reshape(-1).tolist()) == set(range(frames))


def test_an_empty_tracklet_is_refused() -> None:
    for function in (chunks, restricted_clip, dense_clips):
        with pytest.raises(ValueError, match="without frames"):
            function(0, 8)


def test_frames_of_other_sizes_are_read_in_one_take() -> None:
    view, stage = FakeView(people=2, frames=(6,)), stage_of(FakeView(people=4, frames=(6,)), **VIDEO)
    view.takes.clear()
    rows = np.array([[0, 1, 2, 2], [5, 5, 0, 3]])
    frames = load_frames(view, rows, stage.test_transform)  # type: ignore[arg-type]
    assert view.takes == [5]  # five different files, one take
    assert frames.shape == (2, 4, 3, 64, 32)
    with torch.inference_mode():  # as dense clips are read while a job encodes
        assert torch.equal(load_frames(view, rows, stage.test_transform), frames)  # type: ignore[arg-type]
    alone = stage.test_transform.apply_all(view.images(np.array([2, 3])))
    assert torch.equal(frames[0, 2], alone[0])
    assert torch.equal(frames[1, 3], alone[1])


def test_a_clip_shares_flip_and_crop_but_not_erasing() -> None:
    stage = stage_of(FakeView(people=4, frames=(6,)), **VIDEO)
    draws = [clip_draws(stage.transform, np.random.default_rng(i), 8) for i in range(40)]
    assert all(len({(d.flip, d.crop) for d in clip}) == 1 for clip in draws)
    assert {clip[0].flip for clip in draws} == {True, False}
    erased = np.mean([d.erase is not None for clip in draws for d in clip])
    assert 0.4 < erased < 0.6
    assert any(len({d.erase for d in clip}) > 2 for clip in draws)


def test_dense_clips_are_averaged_whatever_the_batch() -> None:
    view = FakeView(people=4, frames=(1, 9, 14))
    stage = stage_of(view, **VIDEO)
    dense = dataclasses.replace(stage.config, test_clips="dense")
    network = model_for(stage).eval()
    whole = group_tracklets(view)  # type: ignore[arg-type]
    picked = [int(np.argmax([len(rows) == n for rows in whole.rows])) for n in (1, 9, 14)]
    first = np.array([whole.rows[i][0] for i in picked])
    side = EvalSide("tracklet", first, np.zeros(3, dtype=np.int64))
    with torch.no_grad():
        together = encode(network, METHOD.eval_batch(dense, view, side, np.arange(3)))["descriptor"]  # type: ignore[arg-type]
        for place, number in enumerate(picked):
            rows = whole.rows[number]
            clips = load_frames(view, rows[dense_clips(len(rows), 4)], stage.test_transform)  # type: ignore[arg-type]
            torch.testing.assert_close(together[place], network.encode(clips).mean(0), rtol=1e-4, atol=1e-5)
            alone = encode(network, METHOD.eval_batch(dense, view, side, np.array([place])))["descriptor"]  # type: ignore[arg-type]
            torch.testing.assert_close(alone[0], together[place], rtol=1e-4, atol=1e-5)
        one = encode(network, METHOD.eval_batch(stage.config, view, side, np.arange(3)))["descriptor"]  # type: ignore[arg-type]
    torch.testing.assert_close(one[0], together[0], rtol=1e-4, atol=1e-5)  # a single frame: the same clip either way
    assert not torch.allclose(one[2], together[2], atol=1e-3)
    with pytest.raises(UserError, match="encodes tracklets, not images"):
        METHOD.eval_batch(stage.config, view, dataclasses.replace(side, kind="image"), np.array([0]))  # type: ignore[arg-type]


def test_one_frame_beside_two_thousand() -> None:
    """Clips are read as they are needed: each by one take, no frame left out, a lone frame repeated."""
    view = FakeView(people=2, cameras=1, each=1, frames=(1, 2000))
    config = Config(**{**VIDEO, "image_size": (32, 16), "test_clips": "dense"})
    whole = group_tracklets(view)  # type: ignore[arg-type]
    assert sorted(len(rows) for rows in whole.rows) == [1, 2000]
    side = EvalSide("tracklet", np.array([rows[0] for rows in whole.rows]), np.zeros(2, dtype=np.int64))
    view.takes.clear()
    dense = METHOD.eval_batch(config, view, side, np.arange(2))["clips"]  # type: ignore[arg-type]
    assert view.takes == []
    owners = []
    for clips, owner in dense:
        assert clips.shape[0] == len(owner) <= 2
        if len(whole.rows[owner[0]]) == 1:
            assert (clips[0] == clips[0, 0]).all()
        owners.extend(owner.tolist())
    assert len(view.takes) == 251  # passes of two clips
    assert sum(view.takes) == len(view)
    assert sorted(np.bincount(owners).tolist()) == [1, 500]


def test_reading_order_of_tracklets_is_drawn_over_their_first_frames() -> None:
    view = FakeView(people=4, frames=(1, 3))
    stage = stage_of(view, **VIDEO)
    first = np.array([rows[0] for rows in group_tracklets(view).rows])  # type: ignore[arg-type]
    side = EvalSide("tracklet", first, np.zeros(len(first), dtype=np.int64))
    figure = token_order(model_for(stage).eval(), recipe(**VIDEO), view, {"tracklet": side})  # type: ignore[arg-type]
    assert figure is not None
    assert len(figure["data"]) == 8
    assert {len(strip["pictures"]) for strip in figure["data"]} == {2}


def test_tracklets_are_shown_as_film_strips() -> None:
    view = FakeView(people=2, frames=(1, 3, 30))
    view.looks = np.array([[200, 60, 60], [60, 60, 200]])
    whole = group_tracklets(view)  # type: ignore[arg-type]
    picked = [next(rows for rows in whole.rows if len(rows) == n) for n in (1, 3, 30)]
    strips = film_strips(view, np.array([rows[-1] for rows in picked]))  # type: ignore[arg-type]
    for rows, data, count in zip(picked, strips, (1, 3, FRAMES), strict=True):
        picture = np.asarray(Image.open(io.BytesIO(data)))
        gaps = int((picture == 255).all(axis=(0, 2)).sum())
        assert (picture.shape[0], gaps) == (128, 2 * (count - 1))
        colour = picture.reshape(-1, 3).mean(0)
        assert (colour[0] > colour[2]) == (view.label[rows[0]] == 0)
