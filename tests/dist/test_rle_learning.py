"""RLE learns on the synthetic visible-infrared world: people whom it never saw, both directions."""

from __future__ import annotations

from pathlib import Path

from tests.rle_learning import DIRECTIONS, learn

CLEARLY = 1.5  # times the better of chance and the untrained network


def test_trained_beats_untrained_and_chance_both_ways(tmp_path: Path) -> None:
    run = learn(tmp_path)
    for name in DIRECTIONS:
        after, before = run["trained"][name], run["untrained"][name]
        floor = max(before["mAP"], after["chance_mAP"])
        assert after["mAP"] > CLEARLY * floor, (name, run)
        assert after["rank1"] > max(before["rank1"], after["chance_rank1"]), (name, run)
