"""The law for ICL with everything on: reorganised captions, noise, a division of the pairs before every epoch. 20 pairs
in batches of 6, 6, 6 and 2, so that two of four ranks hold no row of the tail. Float64 compares values, float32 the ZeRO stages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reid_dist.data.captions import CaptionGroups, caption_digest, write_caption_groups
from reid_dist.methods.icl.noise import checked, draw_permutation, store_permutation
from tests.dist.icl_cells import train_icl
from tests.pool import Pool
from tests.unit.icl_names import FakeView

WHOLE: dict[str, Any] = {"groups": ("g",), "noise": "half"}
TERMS = {"global", "selected", "global_second", "selected_second", "loss"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    place, view = str(tmp_path_factory.mktemp("icl")), FakeView()
    rows = [
        CaptionGroups(
            digest, caption_digest(text), ((f"hat {row}", f"a hat {row}"), (f"bags {n}",), ("a person", "one"))
        )
        for row, digest in enumerate(view.digests(np.arange(len(view))))
        for n, text in enumerate(view.captions[row])
    ]
    write_caption_groups(place, "g", rows, "test")
    store_permutation(place, "half", checked(draw_permutation(20, 0.5, 3), 20, "half"))
    return place


def assert_same(ranks: list[dict[str, Any]], alone: dict[str, Any], rtol: float, start: int = 0) -> None:
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)
    assert all(rank["trust"] == alone["trust"] for rank in ranks)
    ours, theirs = ranks[0]["losses"], alone["losses"][start:]
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for key, value in b.items():
            assert a[key] == pytest.approx(value, rel=rtol, abs=1e-6), (b["step"], key)
    for name, value in alone["weights"].items():
        assert (ranks[0]["weights"][name] - value).abs().max() <= rtol * max(1.0, float(value.abs().max())), name


@pytest.fixture(scope="module")
def exact(pool: Pool, root: str) -> dict[str, Any]:
    result: dict[str, Any] = pool.run(train_icl, 1, root, {"zero_stage": 0}, WHOLE, True)[0]
    assert [record["rows"] for record in result["losses"]] == [6, 6, 6, 2] * 2
    assert set(result["losses"][0]) >= TERMS
    assert len(result["divisions"]) == 2
    assert 0 < sum(result["trust"]) < 20
    return result


@pytest.mark.parametrize(("world", "pieces"), [(1, 2), (2, 1), (3, 1), (4, 2)])
def test_workers_with_uneven_and_empty_slices(
    pool: Pool, root: str, exact: dict[str, Any], world: int, pieces: int
) -> None:
    ranks = pool.run(train_icl, world, root, {"zero_stage": 0, "micro_batches": pieces}, WHOLE, True)
    assert_same(ranks, exact, 1e-6)
    assert ranks[0]["divisions"] == exact["divisions"]


@pytest.fixture(scope="module")
def alone(pool: Pool, root: str) -> dict[str, Any]:
    result: dict[str, Any] = pool.run(train_icl, 1, root, {"zero_stage": 0}, WHOLE)[0]
    return result


@pytest.mark.parametrize(("world", "stage"), [(2, 2), (2, 3), (3, 1)])
def test_zero_stages(pool: Pool, root: str, alone: dict[str, Any], world: int, stage: int) -> None:
    assert_same(pool.run(train_icl, world, root, {"zero_stage": stage}, WHOLE), alone, 1e-4)


def test_a_restart_within_an_epoch_divides_nothing_anew(pool: Pool, root: str, alone: dict[str, Any]) -> None:
    first = pool.run(train_icl, 2, root, {"zero_stage": 1}, WHOLE, False, None, 6)[0]
    assert len(first["divisions"]) == 2  # of both epochs
    assert first["trust"] == alone["trust"]
    ranks = pool.run(train_icl, 3, root, {"zero_stage": 2}, WHOLE, False, first["snapshot"])
    assert ranks[0]["divisions"] == []
    assert_same(ranks, alone, 1e-4, start=6)
    again = pool.run(train_icl, 2, root, {"zero_stage": 1}, WHOLE, False, first["snapshot"])
    whole = pool.run(train_icl, 2, root, {"zero_stage": 1}, WHOLE)[0]
    assert first["losses"] + again[0]["losses"] == whole["losses"]  # bit for bit on the same layout


def test_other_groups_or_noise_are_refused_on_resume(pool: Pool, root: str) -> None:
    first = pool.run(train_icl, 1, root, {"zero_stage": 1}, WHOLE, False, None, 2)[0]
    with pytest.raises(AssertionError, match="holds something else than when this run began"):
        pool.run(train_icl, 1, root, {"zero_stage": 1}, {"groups": ("g",)}, False, first["snapshot"])


def test_batch_norm_over_the_global_batch(pool: Pool, root: str) -> None:
    reference = pool.run(train_icl, 1, root, {"zero_stage": 0}, {"select_norm": "batch"}, True)[0]
    assert_same(pool.run(train_icl, 3, root, {"zero_stage": 0}, {"select_norm": "batch"}, True), reference, 1e-6)
    with pytest.raises(AssertionError, match="micro_batches=2"):
        pool.run(train_icl, 1, root, {"zero_stage": 0, "micro_batches": 2}, {"select_norm": "batch"})


def test_pure_float16_keeps_no_masters(pool: Pool, root: str, alone: dict[str, Any]) -> None:
    settings = {"zero_stage": 0, "precision": "fp16_pure"}
    one, two = pool.run(train_icl, 1, root, settings, WHOLE)[0], pool.run(train_icl, 2, root, settings, WHOLE)
    assert one["types"] == {"torch.float16", "torch.float32"}
    assert all(rank["losses"] == two[0]["losses"] for rank in two)
    for run in (one, two[0]):
        assert 0 < abs(run["losses"][0]["loss"] / alone["losses"][0]["loss"] - 1) < 0.05
    for name in ("towers.image.blocks.0.mlp.fc.weight", "text_selection.skip.weight"):
        weight = one["weights"][name]
        assert (weight == weight.half().float()).all()
        assert not (alone["weights"][name] == alone["weights"][name].half().float()).all()
    first = pool.run(train_icl, 1, root, settings, WHOLE, False, None, 3)[0]
    second = pool.run(train_icl, 1, root, settings, WHOLE, False, first["snapshot"])[0]
    assert first["losses"] + second["losses"] == one["losses"]


def test_bf16_with_masters_follows_float32(pool: Pool, root: str, alone: dict[str, Any]) -> None:
    ranks = pool.run(train_icl, 2, root, {"zero_stage": 1, "precision": "bf16"}, WHOLE)
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert 0 < abs(ranks[0]["losses"][0]["loss"] / alone["losses"][0]["loss"] - 1) < 0.1
    weight = ranks[0]["weights"]["text_selection.skip.weight"]
    assert not (weight == weight.bfloat16().float()).all()  # what is saved are the masters


@pytest.mark.parametrize(("precision", "stage", "apart"), [("bf16", 1, 0.05), ("fp16_pure", 0, 0.02)])
def test_reduced_precision_learns_at_one_and_two_workers(
    pool: Pool, root: str, precision: str, stage: int, apart: float
) -> None:
    plain = {"consensus": False, "corruption": 0.0, "augment": False}
    training = {"zero_stage": stage, "precision": precision, "epochs": 10}
    runs = [pool.run(train_icl, world, root, training, plain)[0]["losses"] for world in (1, 2)]
    one, two = ([record["loss"] for record in run if record["rows"] == 6] for run in runs)  # whole batches
    for losses in (one, two):
        assert np.mean(losses[-6:]) < 0.75 * np.mean(losses[:6])
    assert two[:3] == pytest.approx(one[:3], rel=apart)
