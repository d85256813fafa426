"""The image pipeline against recorded draws, and the draws themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reid_dist.data.draws import row_rng
from reid_dist.data.transforms import ImageDraws, ImageTransform, person_transform
from tests.golden import cases, load


@cases("comoe", "image_transform")
def test_image_transform(case: Path) -> None:
    c = load(case)
    crop, erase = c["in_crop_top_left"].tolist(), c["in_erase_tlhw"].tolist()
    draws = ImageDraws(
        flip=c["in_flip"],
        crop=tuple(crop) if crop[0] >= 0 else None,
        erase=tuple(erase) if erase[0] >= 0 else None,
    )
    size = tuple(c["const_out_hw"].tolist())
    transform = person_transform(size, train=c["const_train"], augment=c["const_augment"])
    assert transform.mean == tuple(c["const_mean"].tolist())
    assert transform.std == tuple(c["const_std"].tolist())
    result = transform.apply(c["in_image_uint8"], draws)
    torch.testing.assert_close(result, torch.as_tensor(c["out_tensor"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(transform.apply_all([c["in_image_uint8"]] * 2, [draws] * 2)[1], result)


@cases("icl", "image_transform")
def test_the_other_text_method_has_the_same_pipeline(case: Path) -> None:
    c = load(case)
    if c["in_image"].dtype != np.uint8:
        pytest.fail(f"unexpected image type {c['in_image'].dtype}")
    transform = ImageTransform(size=tuple(c["const_size"].tolist()), pad=c["const_pad"])
    draws = ImageDraws(
        flip=bool(c["in_flip"]),
        crop=tuple(c["in_crop_top_left"].tolist()) if c["const_pad"] else None,
        erase=tuple(c["in_erase_box"].tolist()) if c["in_erase_on"] else None,
    )
    expected = torch.as_tensor(c["out_image"])
    torch.testing.assert_close(transform.apply(c["in_image"], draws), expected, rtol=1e-5, atol=1e-5)


def test_draws_stay_in_bounds_and_follow_their_probabilities() -> None:
    transform = person_transform((32, 16), train=True)
    draws = [transform.draw(row_rng(1, 0, position, 7, "image")) for position in range(2000)]
    assert 0.45 < np.mean([d.flip for d in draws]) < 0.55
    corners = np.array([d.crop for d in draws])
    assert corners.min() == 0
    assert corners.max() == 20
    boxes = np.array([d.erase for d in draws if d.erase is not None])
    assert 0.43 < len(boxes) / len(draws) <= 0.55
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 32).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 16).all()
    area = boxes[:, 2] * boxes[:, 3] / (32 * 16)
    assert area.min() > 0.01
    assert area.max() < 0.45


def test_a_row_draws_the_same_wherever_it_is_drawn() -> None:
    transform = person_transform((32, 16), train=True)
    assert transform.draw(row_rng(1, 2, 3, 4, "image")) == transform.draw(row_rng(1, 2, 3, 4, "image"))
    others = [transform.draw(row_rng(1, 2, position, 4, "image")) for position in range(20)]
    assert len(set(others)) > 10


def test_every_corner_of_the_padded_image() -> None:
    transform = ImageTransform(size=(4, 3), mean=(0, 0, 0), std=(1, 1, 1), pad=2)
    image = np.random.default_rng(0).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    for top in range(5):
        for left in range(5):
            expected = torch.as_tensor(padded[top : top + 4, left : left + 3].copy()).permute(2, 0, 1) / 255
            torch.testing.assert_close(transform.apply(image, ImageDraws(crop=(top, left))), expected)
