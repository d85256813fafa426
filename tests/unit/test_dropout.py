"""Row dropout: the mask is a function of the row's seed, the module and the element."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from reid_dist.data.draws import row_seeds
from reid_dist.models.dropout import RowDropout, keep_mask


def seeds(count: int, epoch: int = 0) -> torch.Tensor:
    return torch.from_numpy(row_seeds(1, epoch, np.arange(count), "model"))


@pytest.mark.parametrize("cuts", [(0, 9), (0, 4, 9), (0, 0, 1, 1, 8, 9)])
def test_any_split_of_the_rows_draws_the_same(cuts: tuple[int, ...]) -> None:
    drop = RowDropout(0.3, salt=5)
    x, s = torch.randn(9, 4, 6), seeds(9)
    whole = drop(x, s)
    parts = [drop(x[a:b], s[a:b]) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)
    order = torch.randperm(9)
    torch.testing.assert_close(drop(x[order], s[order]), whole[order], rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rate_and_independence(p: float) -> None:
    masks = keep_mask(seeds(400), 3, (500,), p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(masks.mean().item() - (1 - p)) < 5 * sigma / 200000**0.5
    assert (masks.mean(0) - (1 - p)).abs().max() < 5 * sigma / 20  # no element is favoured
    assert (masks.mean(1) - (1 - p)).abs().max() < 5 * sigma / 500**0.5  # no row is
    others = [keep_mask(seeds(400), 4, (500,), p), keep_mask(seeds(400, epoch=1), 3, (500,), p)]
    neighbours = [
        (masks[1:], masks[:-1]),
        (masks[:, 1:], masks[:, :-1]),
        *((masks, other.double()) for other in others),
    ]
    for a, b in neighbours:
        correlation = ((a - a.mean()) * (b - b.mean())).mean() / sigma**2
        assert correlation.abs() < 5 / a.numel() ** 0.5


def test_scaling_evaluation_and_gradient() -> None:
    drop = RowDropout(0.25, salt=0)
    x = torch.ones(8, 1000, requires_grad=True)
    y = drop(x, seeds(8))
    y.sum().backward()
    assert y.detach().unique().tolist() == pytest.approx([0.0, 4 / 3])
    torch.testing.assert_close(x.grad, y.detach())
    assert drop.eval()(x, None) is x
    assert RowDropout(0.0, salt=0)(x, None) is x


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="row_seed"):
        RowDropout(0.1, salt=0)(torch.ones(2, 2), None)
    with pytest.raises(ValueError, match="probability"):
        RowDropout(1.0, salt=0)
