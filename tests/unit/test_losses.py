"""Losses against the golden vectors, and the shares of ranks against the whole."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reid_dist.data.samplers import rank_slice
from reid_dist.losses import (
    identity_ce,
    info_nce,
    masked_lm_ce,
    masked_lm_nll,
    projection_matching,
    similarity_distribution_matching,
)
from tests.golden import cases, load

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def leaf(array: object) -> Tensor:
    return torch.as_tensor(array).clone().requires_grad_()


def check(loss: Tensor, case: dict, **leaves: Tensor) -> None:
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(case["out_loss"], dtype=loss.dtype), **TOLERANCE)
    for name, tensor in leaves.items():
        torch.testing.assert_close(tensor.grad, torch.as_tensor(case[f"grad_{name}"]), **TOLERANCE)


@cases("comoe", "loss_sdm")
def test_sdm(case: Path) -> None:
    c = load(case)
    image, text = leaf(c["in_image_feat"]), leaf(c["in_text_feat"])
    soft = torch.as_tensor(c["in_image_id"]) if "in_image_id" in c else None
    loss = similarity_distribution_matching(
        image, text, torch.as_tensor(c["in_pid"]), logit_scale=c["const_logit_scale"], image_id=soft,
        factor=c["const_factor"], epsilon=c["const_epsilon"],
    )  # fmt: skip
    check(loss, c, image_feat=image, text_feat=text)


@cases("comoe", "loss_itc")
def test_info_nce(case: Path) -> None:
    c = load(case)
    image, text = leaf(c["in_image_feat"]), leaf(c["in_text_feat"])
    check(info_nce(image, text, logit_scale=c["const_logit_scale"]), c, image_feat=image, text_feat=text)


@cases("comoe", "loss_cmpm")
def test_projection_matching(case: Path) -> None:
    c = load(case)
    image, text = leaf(c["in_image_feat"]), leaf(c["in_text_feat"])
    loss = projection_matching(image, text, torch.as_tensor(c["in_pid"]), epsilon=c["const_epsilon"])
    check(loss, c, image_feat=image, text_feat=text)


@cases("comoe", "loss_id")
def test_identity_ce(case: Path) -> None:
    c = load(case)
    image, text = leaf(c["in_image_logits"]), leaf(c["in_text_logits"])
    check(identity_ce(image, text, torch.as_tensor(c["in_label"])), c, image_logits=image, text_logits=text)


@cases("comoe", "loss_mlm")
def test_masked_words(case: Path) -> None:
    c = load(case)
    scores, label = leaf(c["in_scores"]), torch.as_tensor(c["in_label"])
    nll = masked_lm_nll(scores, label, c["const_ignore_index"])
    loss = masked_lm_ce(nll, (label != c["const_ignore_index"]).double())
    if label.any():
        check(loss, c, scores=scores)
    else:  # nothing asked: 0 / 0, as in the original; its gradient was never run
        assert loss.isnan()
        assert torch.tensor(c["out_loss"]).isnan()


@cases("comoe", "shard_contrastive")
def test_shards_give_the_global_gradient(case: Path) -> None:
    c = load(case)
    pid, scale, world = torch.as_tensor(c["in_pid"]), c["const_logit_scale"], c["const_world"]
    image, text = leaf(c["in_image_feat"]), leaf(c["in_text_feat"])
    sdm, itc = [], []
    for rank in range(world):
        own = {"rows": rank_slice(len(pid), rank, world), "world_size": world, "logit_scale": scale}
        sdm.append(similarity_distribution_matching(image, text, pid, **own))
        itc.append(info_nce(image, text, **own))
    total = (sum(sdm) + c["const_itc_weight"] * sum(itc)) / world
    total.backward()
    expected = torch.tensor([c["out_global_sdm"], c["out_global_itc"]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([sum(sdm), sum(itc)]).detach() / world, expected, **TOLERANCE)
    for tensor, name in ((image, "image_feat"), (text, "text_feat")):
        torch.testing.assert_close(tensor.grad, torch.as_tensor(c[f"grad_global_{name}"]), **TOLERANCE)
        assert not torch.allclose(tensor.grad, torch.as_tensor(c[f"grad_naive_{name}"]), **TOLERANCE)


@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 7), (0, 0, 5, 5, 7)], ids=["one", "uneven", "empty"])
def test_any_slices_average_to_the_whole(cuts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    draw = torch.randn(4, 7, 6, generator=generator, dtype=torch.float64)
    pid, label = torch.tensor([0, 0, 1, 2, 2, 2, 3]), torch.tensor([0, 5, 1, 2, 0, 3, 4])
    slices = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    world = len(slices)

    def mean_of_shares(features: Tensor, split: bool) -> Tensor:
        image, text = features[0], features[1]
        total = torch.zeros((), dtype=torch.float64)
        for rows in slices if split else [slice(0, 7)]:
            w = world if split else 1
            nll = masked_lm_nll(features[3][rows], label[rows])
            total = (
                total
                + (
                    similarity_distribution_matching(image, text, pid, logit_scale=9.0, rows=rows, world_size=w)
                    + info_nce(image, text, logit_scale=9.0, rows=rows, world_size=w)
                    + projection_matching(image, text, pid, rows=rows, world_size=w)
                    + identity_ce(features[2][rows], features[3][rows], label[rows], total=7, world_size=w)
                    + masked_lm_ce(nll, (label[rows] != 0).double(), total=(label != 0).sum(), world_size=w)
                )
                / w
            )
        return total

    whole, split = leaf(draw), leaf(draw)
    one, many = mean_of_shares(whole, False), mean_of_shares(split, True)
    one.backward()
    many.backward()
    torch.testing.assert_close(many, one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-10, atol=1e-12)


def test_a_zero_vector_gives_no_nan() -> None:
    image = torch.zeros(3, 4, requires_grad=True)
    loss = similarity_distribution_matching(image, torch.randn(3, 4), torch.arange(3), logit_scale=50.0)
    loss.backward()
    assert loss.isfinite()
    assert image.grad is not None
    assert image.grad.isfinite().all()
