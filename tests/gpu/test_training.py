"""Every method's tiny recipe through DeepSpeed on a GPU, beside the same steps on the CPU of the same machine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist import methods
from tests.dist.cells import train_recipe
from tests.dist.test_methods_law import TINY, mapping_of
from tests.pool import Pool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
STEPS = 3  # beyond them hard mining and batch norm amplify rounding in some methods (tests/dist/test_methods_law.py)
RTOL = 2e-3

HALF = [
    (name, precision, stage)
    for name in TINY
    for precision, stage in (("bf16", 1), ("bf16", 3), ("fp16_pure", 0))
    if precision in methods.get(name.split("/")[0]).precisions
]


def train_exactly(mapping: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses, with float32 sums in float32: convolutions of a GPU otherwise round to ten bits."""
    torch.backends.cudnn.allow_tf32 = False
    return train_recipe(mapping)["losses"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, Pool]]:
    both = {"cpu": Pool("gloo"), "gpu": Pool("nccl")}
    yield both
    for pool in both.values():
        pool.close()


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("name", TINY)
def test_first_steps_equal_those_of_a_cpu(pools: dict[str, Pool], tables: Path, name: str, stage: int) -> None:
    mapping = mapping_of(name, tables, num_workers=1, zero_stage=stage)
    cpu, gpu = (pools[kind].run(train_exactly, 1, mapping)[0] for kind in ("cpu", "gpu"))
    assert len(cpu) == len(gpu) > STEPS
    for ours, theirs in list(zip(gpu, cpu, strict=True))[:STEPS]:
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=RTOL, abs=1e-5), (theirs["step"], key)


@pytest.mark.parametrize(("name", "precision", "stage"), HALF)
def test_half_precision(pools: dict[str, Pool], tables: Path, name: str, precision: str, stage: int) -> None:
    """The first loss is that of float32 up to rounding (sharpened by ICL's temperature of .015), and training stays finite."""
    kinds = [mapping_of(name, tables, num_workers=1, zero_stage=stage, precision=kind) for kind in (precision, "fp32")]
    half, whole = (pools["gpu"].run(train_exactly, 1, mapping)[0] for mapping in kinds)
    assert half[0]["loss"] == pytest.approx(whole[0]["loss"], rel=0.15)
    assert all(math.isfinite(record["loss"]) for record in half)
