"""What an epoch's division leaves in the run's metrics, and the figures that a report makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reid_dist.methods.icl.consensus import Branch, Division
from reid_dist.methods.icl.objective import BRANCHES

BINS = 40  # of a histogram over 0 ... 1
SHOWN = 4  # epochs that are drawn


def detection(trust: np.ndarray, moved: np.ndarray) -> dict[str, float]:
    """Precision and recall with which untrusted pairs (trust 0) are the mismatched ones (`moved` bool [N]); 0 for none."""
    noisy = trust == 0
    both = float((noisy & moved).sum())
    return {"precision": both / max(1, int(noisy.sum())), "recall": both / max(1, int(moved.sum()))}


def _histogram(values: np.ndarray) -> list[int]:
    counts: list[int] = np.histogram(values, bins=BINS, range=(0.0, 1.0))[0].tolist()
    return counts


def _branch_record(branch: Branch, trust: np.ndarray, moved: np.ndarray | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "trusted": _histogram(branch.losses[trust == 1]),
        "untrusted": _histogram(branch.losses[trust == 0]),
        "clean": float(branch.clean.mean()),
    }
    if branch.mixture is not None:
        parts = zip(branch.mixture.weight, branch.mixture.mean, branch.mixture.variance, strict=True)
        record["mixture"] = [[float(number) for number in part] for part in parts]
    if moved is not None:
        record |= {"mismatched": _histogram(branch.losses[moved]), "matched": _histogram(branch.losses[~moved])}
    return record


def division_record(division: Division, number: int, moved: np.ndarray | None) -> dict[str, Any]:
    """Plain content: shares, histograms of the scaled losses and mixtures per branch; with a known permutation also what truly
    is mismatched, and precision and recall."""
    record: dict[str, Any] = {
        "number": number, "pairs": len(division.trust), "clean": float(division.trust.mean()),
        "coins": division.disagreement,
    }  # fmt: skip
    if moved is not None:
        record |= detection(division.trust, moved)
    for name, branch in zip(BRANCHES, division.branches, strict=True):
        record[name] = _branch_record(branch, division.trust, moved)
    return record


def _density(mixture: Sequence[Sequence[float]], component: int, pairs: int, x: np.ndarray) -> list[float]:
    """Expected pairs per bin of one component."""
    weight, mean, variance = mixture[component]
    height = weight * pairs / BINS / np.sqrt(2 * np.pi * variance)
    density: list[float] = (height * np.exp(-0.5 * (x - mean) ** 2 / variance)).tolist()
    return density


def _series(record: Mapping[str, Any], branch: str) -> dict[str, Any]:
    x = (np.arange(BINS) + 0.5) / BINS
    content, pairs = record[branch], record["pairs"]
    wanted = ("matched", "mismatched") if "matched" in content else ("trusted", "untrusted")
    series: dict[str, Any] = {f"{name} pairs": [x.tolist(), content[name]] for name in wanted}
    for component, name in enumerate(("clean", "noisy")) if "mixture" in content else ():
        series[f"mixture, {name}"] = [x.tolist(), _density(content["mixture"], component, pairs, x)]
    return series


def _charts(record: Mapping[str, Any]) -> dict[str, Any]:
    known = "matched" in record[BRANCHES[0]]
    told = "whether their caption is truly theirs" if known else "the label they got"
    return {
        "kind": "charts",
        "title": f"Losses before epoch {record['number']}",
        "text": f"Pairs per bin by {told}, and the two fitted Gaussians.",
        "data": {
            "x_label": "loss, scaled to 0 ... 1",
            "charts": {f"{branch.capitalize()} branch": _series(record, branch) for branch in BRANCHES},
        },
    }


def division_figures(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Report sections of a run's metrics: a table over all epochs, histograms with mixtures of up to SHOWN epochs. [] without
    a division."""
    records = [record for record in metrics if record.get("kind") == "division"]
    if not records:
        return []
    known = "precision" in records[-1]
    header = ["epoch", "trusted", "by coin", *(f"clean, {branch}" for branch in BRANCHES)]
    header += ["precision", "recall"] if known else []
    rows = []
    for record in records:
        shares = [record["clean"], record["coins"], *(record[branch]["clean"] for branch in BRANCHES)]
        shares += [record["precision"], record["recall"]] if known else []
        rows.append([str(record["number"]), *(f"{100 * share:.1f} %" for share in shares)])
    text = "Before every epoch each pair's losses are divided by two mixtures; where they disagree a coin decides."
    found = " Precision and recall: of the untrusted pairs against the permutation that was put in." if known else ""
    table = {"kind": "table", "title": "Division of the training pairs", "text": text + found,
             "data": {"header": header, "rows": rows}}  # fmt: skip
    picked = [records[i] for i in np.unique(np.linspace(0, len(records) - 1, min(SHOWN, len(records))).astype(int))]
    return [table, *(_charts(record) for record in picked)]
