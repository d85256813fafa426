"""Tuning pairs: hard negatives are other people's, drawn reproducibly; the exported files are LLaMA-Factory's."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reid_dist.errors import UserError
from reid_dist.generation.pairs import HARD, build_pairs, llama_factory_files
from reid_dist.generation.prompts import LOCATE

PIDS = np.repeat(np.arange(8), 3)
ROWS = np.arange(24)
TEXTS = [f'person {pid} with a "bag"' for pid in PIDS]


def ranked(k: int) -> np.ndarray:
    """Own pictures first, then everybody else's by distance of their number."""
    return np.stack([np.argsort(np.abs(PIDS - pid), kind="stable")[:k] for pid in PIDS])


def test_one_positive_and_hard_negatives_of_other_people() -> None:
    pairs = build_pairs(TEXTS, ROWS, PIDS, ROWS + 100, PIDS, ranked(20), seed=3, negatives=2)
    assert len(pairs) == 3 * len(TEXTS)
    for place in range(len(TEXTS)):
        positive, *negative = pairs[3 * place : 3 * place + 3]
        assert (positive.row, positive.text, positive.answer) == (place, TEXTS[place], True)
        hardest = [i for i in ranked(20)[place] if PIDS[i] != PIDS[place]][:HARD]
        assert len({pair.row for pair in negative}) == 2
        assert all(pair.row - 100 in hardest and not pair.answer for pair in negative)
    assert pairs == build_pairs(TEXTS, ROWS, PIDS, ROWS + 100, PIDS, ranked(20), seed=3, negatives=2)
    assert pairs != build_pairs(TEXTS, ROWS, PIDS, ROWS + 100, PIDS, ranked(20), seed=4, negatives=2)
    chosen = {pair.row for pair in build_pairs(TEXTS[:1] * 200, ROWS[[0] * 200], PIDS[[0] * 200], ROWS, PIDS,
                                               ranked(20)[[0] * 200], seed=0) if not pair.answer}  # fmt: skip
    assert len(chosen) == HARD, "every one of the ten can be drawn, and none beyond"


def test_lists_without_anybody_else_are_refused() -> None:
    with pytest.raises(UserError, match="caption 0 has 0 pictures of other people among its 3 best"):
        build_pairs(TEXTS, ROWS, PIDS, ROWS, PIDS, ranked(3), seed=0)


def test_exported_files() -> None:
    pairs = build_pairs(TEXTS[:1], ROWS[:1], PIDS[:1], ROWS, PIDS, ranked(20), seed=0)
    files = llama_factory_files("who", pairs, {row: f"images/{row}.jpg" for row in ROWS})
    records = json.loads(files["who.json"])
    assert [record["messages"][1] for record in records] == [
        {"role": "assistant", "content": "Yes"},
        {"role": "assistant", "content": "No"},
    ]
    asked = records[0]["messages"][0]
    assert asked == {"role": "user", "content": "<image>" + LOCATE.render(text=TEXTS[0])}
    assert records[0]["images"] == ["images/0.jpg"]
    info = json.loads(files["dataset_info.json"])["who"]
    assert info["file_name"] == "who.json"
    assert info["formatting"] == "sharegpt"
    assert info["columns"] == {"messages": "messages", "images": "images"}
    assert set(info["tags"].values()) == {"role", "content", "user", "assistant"}
