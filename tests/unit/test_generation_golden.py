"""Interaction, legacy answers and image budget against the released code's own numbers (golden/icl)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np

from reid_dist.generation.image_budget import seen_size, visual_tokens
from reid_dist.generation.interaction import (
    NO_ANCHOR,
    Policy,
    Search,
    calls_of_released_loop,
    candidates_of,
    find_anchor,
    rerank,
)
from reid_dist.generation.parsing import legacy_answers
from tests.golden import cases, load


@cases("icl", "parse_vqa_answers")
def test_legacy_answers(case: Path) -> None:
    golden = load(case)
    found = [legacy_answers(response) for response in json.loads(golden["in_responses"])]
    assert found == json.loads(golden["out_answers"])


@cases("icl", "interaction_rounds")
def test_policy_asks_no_more_and_ends_the_same(case: Path) -> None:
    golden = load(case)
    scores, yes, rounds = golden["in_similarity"], golden["in_yes"], golden["const_rounds"]
    candidates = candidates_of(scores, rounds)
    assert np.array_equal(candidates, golden["out_candidates"])
    policy = Policy(rounds=rounds, threshold=golden["const_xi"])
    asked: list[tuple[int, int]] = []

    async def search(query: int) -> Search:
        async def shown(row: int) -> bool:
            place = candidates[query].tolist().index(row)
            asked.append((query, place))
            return bool(yes[query, place])

        return await find_anchor(float(scores[query, candidates[query, 0]]), candidates[query].tolist(), shown, policy)

    async def together() -> list[Search]:
        return await asyncio.gather(*(search(query) for query in range(len(scores))))

    searches = asyncio.run(together())
    for number in range(1, rounds + 1):
        after = np.array([search.anchor_after(number) for search in searches])
        assert np.array_equal(after, golden["out_anchor"][number - 1])
        assert np.array_equal(after != NO_ANCHOR, golden["out_refined"][number - 1].astype(bool))
    originally = golden["out_asked_original"].astype(bool)
    assert all(originally[place, query] for query, place in asked), "ours asks something the original does not"
    assert len(asked) == len(set(asked)) == sum(len(search.answers) for search in searches)
    assert calls_of_released_loop(searches, rounds, candidates.shape[1]) == originally.sum()
    for query, search in enumerate(searches):
        assert [bool(golden["out_decision"][k, query]) for k in range(len(search.answers))] == list(search.answers)


@cases("icl", "rerank")
def test_one_blended_search(case: Path) -> None:
    golden = load(case)
    names = [name for name in ("bge", "tse") if "single_embedding" not in case.stem or name == "bge"]
    query, refined, gallery = (
        {name: golden[f"in_{side}_{name}"] for name in names} for side in ("query", "refined", "gallery")
    )
    scores = rerank(query, refined, gallery, golden["in_anchor"], golden["const_lambda"])
    np.testing.assert_allclose(scores, golden["out_scores"], atol=1e-5, rtol=1e-5)
    nobody = np.full_like(golden["in_anchor"], NO_ANCHOR)
    base = rerank(query, refined, gallery, nobody, golden["const_lambda"])
    np.testing.assert_allclose(base, golden["in_base_similarity"], atol=1e-5, rtol=1e-5)


@cases("icl", "vlm_image_budget")
def test_image_budget(case: Path) -> None:
    golden = load(case)
    factor, low, high = (golden[f"const_{name}"] for name in ("factor", "min_pixels", "max_pixels"))
    sizes = [seen_size(int(h), int(w), factor, low, high) for h, w in golden["in_hw"]]
    assert np.array_equal(sizes, golden["out_hw"])
    if low == high:
        tokens = [visual_tokens(int(h), int(w), factor, high) for h, w in golden["in_hw"]]
        assert np.array_equal(tokens, golden["out_visual_tokens"])
