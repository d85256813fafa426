"""Division of the pairs: golden vectors, the mixture beside scikit-learn's results, edge cases, what a report shows of it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from reid_dist.data.draws import plan_rng
from reid_dist.methods.icl.consensus import divide, divide_branch, mixture_settings, scaled, split_clean, vote
from reid_dist.methods.icl.mixture import LOOSE, TIGHT, fit_two_gaussians
from reid_dist.methods.icl.record import detection, division_figures, division_record
from reid_dist.reporting.sections import section_of
from tests.golden import cases, load


@cases("icl", "consensus_gmm")
def test_branches(case: Path) -> None:
    c = load(case)
    settings = mixture_settings(c["const_noise_rate"], [c["const_dataset"]])
    for branch in ("bge", "tse"):
        found = divide_branch(c[f"in_loss_{branch}"], settings)
        np.testing.assert_array_equal(found.clean, c[f"out_clean_{branch}"].astype(bool))
        np.testing.assert_allclose(found.probability, c[f"out_prob_{branch}"], atol=1e-3)


@cases("icl", "split_by_threshold")
def test_threshold(case: Path) -> None:
    c = load(case)
    np.testing.assert_array_equal(split_clean(c["in_prob"], c["const_threshold"]), c["out_clean"].astype(bool))


@cases("icl", "consensus_labels")
def test_vote(case: Path) -> None:
    c = load(case)
    trust = vote(c["in_clean_bge"].astype(bool), c["in_clean_tse"].astype(bool), c["in_coin"])
    np.testing.assert_array_equal(trust, c["out_label_hat"])


def test_settings_follow_noise_and_set() -> None:
    assert mixture_settings(0.2, ["cuhk-pedes"]) is LOOSE
    assert mixture_settings(0.5, ["cuhk-pedes"]) is TIGHT
    assert mixture_settings(0.0, ["rstpreid"]) is TIGHT
    assert mixture_settings(0.0, ["rstpreid"], "loose") is LOOSE
    assert mixture_settings(0.0, ["icfg-pedes"], "tight") is TIGHT


def two_heaps(noisy: int = 300, clean: int = 700) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.concatenate([rng.normal(3.0, 0.3, noisy), rng.normal(1.0, 0.2, clean)])


def test_a_mixture_finds_two_heaps() -> None:
    mixture = fit_two_gaussians(two_heaps(), TIGHT)
    np.testing.assert_allclose(mixture.mean, [1.0, 3.0], atol=0.05)
    np.testing.assert_allclose(mixture.weight, [0.7, 0.3], atol=0.01)
    np.testing.assert_allclose(np.sqrt(mixture.variance), [0.2, 0.3], atol=0.03)
    for wrong in (np.ones(5), np.array([0.0, np.nan])):
        with pytest.raises(ValueError, match="finite"):
            fit_two_gaussians(wrong, TIGHT)


def test_losses_that_cannot_be_scaled(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        same = divide_branch(np.full(50, 2.5), LOOSE)
        assert same.clean.all()
        assert same.mixture is None
        values = two_heaps()
        values[5] = np.nan
        values[6] = np.inf
        found = divide_branch(values, LOOSE)
    assert "all 50 losses of a branch are the same" in caplog.text
    assert "2 of 1000 losses are not a number" in caplog.text
    assert found.losses[5] == found.losses[6] == 1.0
    assert not found.clean[[5, 6]].any()
    assert divide_branch(np.full(4, np.nan), LOOSE).clean.all()
    assert scaled(np.array([2.0, np.nan, 2.0])).tolist() == [0.0, 1.0, 0.0]


def test_division_and_its_record() -> None:
    losses = np.stack([two_heaps(), two_heaps()], axis=1)
    losses[:20, 0] = 1.0  # the global branch is deceived about 20 noisy pairs
    moved = np.arange(1000) < 300
    found = divide(losses, TIGHT, plan_rng(1, 0, "coins"))
    again = divide(losses, TIGHT, plan_rng(1, 0, "coins"))
    other = divide(losses, TIGHT, plan_rng(1, 1, "coins"))
    assert (found.trust == again.trust).all()
    assert (found.trust != other.trust).any()
    assert found.disagreement == pytest.approx(0.02)
    assert 0 < found.trust[:20].sum() < 20
    assert found.trust[20:300].sum() == 0
    assert found.trust[300:].all()
    record = division_record(found, 1, moved)
    assert record["precision"] == 1.0
    assert record["recall"] == pytest.approx(1 - found.trust[:20].sum() / 300)
    assert sum(record["global"]["mismatched"]) == 300
    assert sum(record["selected"]["trusted"]) == found.trust.sum()
    assert detection(np.ones(4, dtype=int), np.zeros(4, dtype=bool)) == {"precision": 0.0, "recall": 0.0}


@pytest.mark.parametrize("known", [True, False])
def test_figures_of_a_runs_metrics(known: bool) -> None:
    losses = np.stack([two_heaps(), two_heaps()], axis=1)
    moved = np.arange(1000) < 300 if known else None
    notes = [
        {"kind": "division", "step": n, **division_record(divide(losses, TIGHT, plan_rng(1, n, "c")), n + 1, moved)}
        for n in range(6)
    ]
    figures = division_figures([{"kind": "step", "step": 1, "loss": 1.0}, *notes])
    assert [figure["kind"] for figure in figures] == ["table"] + ["charts"] * 4  # epochs
    assert len(figures[0]["data"]["rows"]) == 6
    assert ("precision" in figures[0]["data"]["header"]) is known
    assert set(figures[1]["data"]["charts"]) == {"Global branch", "Selected branch"}
    series = figures[1]["data"]["charts"]["Global branch"]
    assert ("mismatched pairs" in series) is known
    x, curve = series["mixture, clean"]
    assert sum(curve) == pytest.approx(700, rel=0.05)  # the component's pairs, bin by bin
    assert x[int(np.argmax(curve))] < 0.4
    for figure in figures:
        section = section_of(figure)
        assert section.title == figure["title"]
    assert str(section.content[0]).count("<svg class=chart") == 2
    assert "loss, scaled to 0 ... 1" in str(section.content[0])
    assert division_figures([{"kind": "step", "step": 1}]) == []
    flat = division_record(divide(np.ones((9, 2)), LOOSE, plan_rng(1, 0, "c")), 1, None)
    (_, without) = division_figures([{"kind": "division", **flat}])
    assert set(without["data"]["charts"]["Global branch"]) == {"trusted pairs", "untrusted pairs"}  # no mixtures


def test_the_report_job_shows_them() -> None:
    from jobs.report import of_training
    from reid_dist import methods

    notes = [
        {"kind": "division", "step": 0, **division_record(divide(np.ones((9, 2)), LOOSE, plan_rng(1, 0, "c")), 1, None)}
    ]
    assert [figure["kind"] for figure in of_training(methods.get("icl"), notes)] == ["table", "charts"]
    assert of_training(methods.get("comoe"), notes) == []
