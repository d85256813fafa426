"""Pair losses of RDE and ICL against the golden vectors, and where the original gives NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reid_dist.data.samplers import rank_slice
from reid_dist.losses import pair_losses, pair_losses_of_scores, trusted
from tests.golden import cases, load

EXACT = {"rtol": 1e-6, "atol": 1e-8}
FEATURES = ("img_global", "txt_global", "img_local", "txt_local")


def settings(c: dict[str, Any]) -> dict[str, float]:
    names = {"const_tau": "temperature", "const_margin": "margin", "const_logit_scale": "logit_scale"}
    return {ours: c[theirs] for theirs, ours in names.items() if theirs in c}


def kind_of(case: Path) -> str:
    words = case.stem.split("__")
    first = words[0].removesuffix("_per_sample")
    return first if first in ("tal", "trl", "sdm", "infonce") else words[1].split("_")[0]


@cases("icl", "tal_per_sample", "trl_per_sample", "sdm_per_sample", "infonce_per_sample")
def test_losses_of_scores(case: Path) -> None:
    c, kind = load(case), kind_of(case)
    scores = torch.as_tensor(c["in_scores"]).requires_grad_()
    pid = torch.as_tensor(c["in_pids"]) if "in_pids" in c else torch.arange(len(scores))
    rows = slice(0, len(scores))
    loss = pair_losses_of_scores(kind, scores, scores.T, pid, rows=rows, **settings(c))  # type: ignore[arg-type]
    torch.testing.assert_close(loss, torch.as_tensor(c["out_per_sample"]), **EXACT)
    trust = torch.as_tensor(c["in_label_hat"]) if "in_label_hat" in c else torch.ones(len(scores))
    total = (trust * loss).sum()
    if "out_loss" in c:
        torch.testing.assert_close(total.detach(), torch.tensor(c["out_loss"], dtype=total.dtype), **EXACT)
    (gradient,) = torch.autograd.grad(total, scores)
    expected = torch.as_tensor(c["grad_scores"])
    if kind == "tal" and bool(expected.isnan().any()):
        assert (pid[:, None] == pid).all()
        expected = torch.zeros_like(expected)  # the original's NaN; the loss is the constant 0
    torch.testing.assert_close(gradient, expected, **EXACT)


@cases("icl", "pair_loss")
def test_losses_of_features(case: Path) -> None:
    c, kind = load(case), kind_of(case)
    names = [name.removeprefix("in_") for name in c if name.startswith("in_") and name != "in_pids"]
    image, text = sorted(names, key=lambda name: "txt" in name or "text" in name)
    given = {name: torch.as_tensor(c[f"in_{name}"]).requires_grad_() for name in (image, text)}
    loss = pair_losses(kind, given[image], given[text], torch.as_tensor(c["in_pids"]), **settings(c))  # type: ignore[arg-type]
    torch.testing.assert_close(loss, torch.as_tensor(c["out_per_sample"]), **EXACT)
    loss.sum().backward()
    for name, value in given.items():
        torch.testing.assert_close(value.grad, torch.as_tensor(c[f"grad_{name}"]), **EXACT)


def robust(c: dict[str, Any], kind: str, given: dict[str, Tensor], rows: slice, world: int) -> tuple[Tensor, Tensor]:
    trust, pid = torch.as_tensor(c["in_label_hat"]), torch.as_tensor(c["in_pids"])
    found = []
    for branch in ("global", "local"):
        loss = pair_losses(
            kind,
            given[f"img_{branch}"],
            given[f"txt_{branch}"],
            pid,
            rows=rows,
            **settings(c),  # type: ignore[arg-type]
        )
        found.append(trusted(kind, loss, trust[rows], trust.sum(), world))  # type: ignore[arg-type]
    return found[0], found[1]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 9])  # uneven, and ranks without rows
@cases("icl", "robust_loss")
def test_weighted_losses_of_any_number_of_ranks(case: Path, world: int) -> None:
    c, kind = load(case), kind_of(case)
    given = {name: torch.as_tensor(c[f"in_{name}"]).requires_grad_() for name in FEATURES}
    shares = [robust(c, kind, given, rank_slice(len(c["in_pids"]), rank, world), world) for rank in range(world)]
    for place, name in enumerate(("out_loss_bge", "out_loss_tse")):
        mean = torch.stack([share[place] for share in shares]).mean()
        torch.testing.assert_close(mean.detach(), torch.tensor(c[name], dtype=mean.dtype), **EXACT)
    torch.stack([a + b for a, b in shares]).mean().backward()
    for name, value in given.items():
        torch.testing.assert_close(value.grad, torch.as_tensor(c[f"grad_{name}"]), **EXACT)


@pytest.mark.parametrize("kind", ["tal", "trl", "sdm", "infonce"])
def test_a_text_without_words_is_nobodys_positive_or_negative(kind: Any) -> None:
    """The other pairs' losses are those of the batch from which that text was never there; their images stay."""
    g = torch.Generator().manual_seed(4)
    image, text = (torch.randn(6, 8, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    pid, usable = torch.tensor([0, 0, 1, 2, 2, 3]), torch.tensor([True, True, False, True, True, True])
    loss = pair_losses(kind, image, text, pid, usable=usable, temperature=0.2, margin=1.0)
    assert loss[2] == 0
    assert (loss[usable] > 0).all()
    changed = text.detach().clone()
    changed[2] = torch.randn(8, generator=g)
    again = pair_losses(kind, image, changed, pid, usable=usable, temperature=0.2, margin=1.0)
    torch.testing.assert_close(again, loss)
    gradient = torch.autograd.grad(loss.sum(), (image, text))
    assert gradient[1][2].abs().max() == 0
    assert (
        kind == "trl" or gradient[0][2].abs().max() > 0
    )  # image 2 is still a negative of the other texts (trl: hardest)
    assert all(part.isfinite().all() for part in gradient)
    with_it = pair_losses(kind, image, text, pid, temperature=0.2, margin=1.0)
    assert kind == "trl" or (with_it[usable] - loss[usable]).abs().max() > 1e-6  # it would have been a negative


@pytest.mark.parametrize("kind", ["tal", "trl", "sdm", "infonce"])
@pytest.mark.parametrize("usable", [[True], [False]])
def test_a_batch_of_one_pair_is_finite(kind: Any, usable: list[bool]) -> None:
    image, text = torch.randn(1, 5, requires_grad=True), torch.randn(1, 5, requires_grad=True)
    loss = pair_losses(kind, image, text, torch.tensor([7]), usable=torch.tensor(usable))
    loss.sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert loss.isfinite().all()
    if kind == "tal":
        assert loss.sum() == 0
        assert image.grad.abs().max() == 0


def test_low_temperature_does_not_overflow() -> None:
    """exp(0.9 / 0.01) is beyond float32: the naive form gives NaN."""
    scores = torch.full((4, 4), 0.9, requires_grad=True)
    loss = pair_losses_of_scores("tal", scores, scores.T, torch.arange(4), rows=slice(0, 4), temperature=0.01)
    expected = 2 * (0.1 + 0.01 * torch.log(torch.tensor(3.0)))  # margin - s + (s + t log 3), both directions
    torch.testing.assert_close(loss, expected.expand(4))


def test_nothing_trusted_is_zero() -> None:
    value = trusted("sdm", torch.ones(3), torch.zeros(3), torch.tensor(0.0), 2)
    assert value == 0
