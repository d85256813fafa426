"""The law on the toy method: N workers compute what one would, at every ZeRO stage, in micro-batches, and after a restart
with another number of workers and another stage."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.cells import train_toy
from tests.pool import Pool

FP32 = 1e-6  # measured: 1.2e-7
BF16 = 4e-3  # measured against fp32: 1.9e-3 at four ranks


@pytest.fixture(scope="module")
def alone(pool: Pool) -> dict[str, Any]:
    """One worker at stage 0: the plain computation."""
    return pool.run(train_toy, 1, {"zero_stage": 0})[0]


def assert_same(result: list[dict[str, Any]], reference: dict[str, Any], tolerance: float, start: int = 0) -> None:
    for rank in result:
        assert rank["losses"] == result[0]["losses"], "ranks record different numbers"
    ours, theirs = result[0]["losses"], reference["losses"][start:]
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for term in ("contrast", "identity", "memory", "loss"):
            assert a[term] == pytest.approx(b[term], rel=tolerance, abs=tolerance), (a["step"], term)
        assert (a["step"], a["lr"], a["rows"]) == (b["step"], b["lr"], b["rows"])
    for name, value in reference["weights"].items():
        assert (result[0]["weights"][name] - value).abs().max() < 20 * tolerance, name
    assert (result[0]["memory"] - reference["memory"]).abs().max() < 20 * tolerance


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (4, 1), (4, 3)])
def test_workers_and_stages(pool: Pool, alone: dict[str, Any], world: int, stage: int) -> None:
    assert_same(pool.run(train_toy, world, {"zero_stage": stage}), alone, FP32)


@pytest.mark.parametrize(("world", "stage", "pieces"), [(1, 0, 3), (2, 1, 3), (2, 2, 4), (2, 3, 2), (4, 2, 3)])
def test_micro_batches_are_exact_even_with_empty_pieces(
    pool: Pool, alone: dict[str, Any], world: int, stage: int, pieces: int
) -> None:
    assert_same(pool.run(train_toy, world, {"zero_stage": stage, "micro_batches": pieces}), alone, FP32)


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_bf16_with_fp32_masters_follows_fp32(pool: Pool, alone: dict[str, Any], world: int, stage: int) -> None:
    result = pool.run(train_toy, world, {"zero_stage": stage, "precision": "bf16"})
    worst = max(
        abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(result[0]["losses"], alone["losses"], strict=True)
    )
    assert 0 < worst < BF16


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(("save", "resume"), [((2, 1), (4, 3)), ((2, 3), (1, 0)), ((1, 0), (2, 2)), ((4, 1), (2, 1))])
def test_stop_anywhere_and_resume_with_other_workers_and_stage(
    pool: Pool, save: tuple[int, int], resume: tuple[int, int], optimizer: str
) -> None:
    reference = pool.run(train_toy, 1, {"zero_stage": 0}, optimizer)[0]
    for stop in (4, 8):  # the boundary of the first stage, and the middle of an epoch of the second
        first = pool.run(train_toy, save[0], {"zero_stage": save[1]}, optimizer, None, stop)
        assert first[0]["progress"] is None
        assert len(first[0]["losses"]) == stop
        second = pool.run(train_toy, resume[0], {"zero_stage": resume[1]}, optimizer, first[0]["snapshot"])
        assert_same(second, reference, FP32, start=stop)


def test_same_layout_resumes_bit_for_bit(pool: Pool) -> None:
    whole = pool.run(train_toy, 2, {"zero_stage": 1})[0]
    first = pool.run(train_toy, 2, {"zero_stage": 1}, "adam", None, 8)[0]
    second = pool.run(train_toy, 2, {"zero_stage": 1}, "adam", first["snapshot"])[0]
    assert first["losses"] + second["losses"] == whole["losses"]
    assert all((second["weights"][name] == value).all() for name, value in whole["weights"].items())
