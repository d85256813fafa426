"""The scan's engines on a GPU against the definition in float64 on a CPU: random sizes, forms and types, all gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reid_dist.models.mamba import selective_scan
from reid_dist.models.mamba.scan import choose_engine, mamba_ssm_imports
from tests.unit.test_mamba_scan import make, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
ENGINES = [
    "triton",
    "torch",
    pytest.param("mamba-ssm", marks=pytest.mark.skipif(not mamba_ssm_imports(), reason="mamba-ssm is not installed")),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
FIXED = [
    (1, 1, 1, 1, 1),
    (2, 64, 16, 1, 1),
    (1, 33, 5, 31, 1),
    (2, 96, 16, 33, 3),
    (4, 130, 16, 257, 2),
    (2, 48, 16, 4099, 1),
]


def drawn() -> list[tuple[int, int, int, int, int]]:
    """(batch, channels, states, length, groups)."""
    rng = np.random.default_rng(0)
    sizes = []
    for _ in range(10):
        groups = int(rng.integers(1, 4))
        sizes.append((int(rng.integers(1, 6)), groups * int(rng.integers(1, 70)), int(rng.choice([1, 3, 8, 16])),
                      int(rng.integers(1, 700)), groups))  # fmt: skip
    return sizes


def assert_agrees(engine: str, inputs: dict[str, torch.Tensor], tolerance: float) -> None:
    """Outputs, last state and gradients, each beside its largest entry."""
    batch, channels, length = inputs["u"].shape
    grad = torch.randn(batch, channels, length, generator=torch.Generator().manual_seed(9)).to(inputs["u"].dtype)
    exact = run(selective_scan, {k: v.double() for k, v in inputs.items()}, grad.double(), delta_softplus=True)
    found: Any = run(
        selective_scan, {k: v.cuda() for k, v in inputs.items()}, grad.cuda(), delta_softplus=True, engine=engine
    )
    assert found[0].dtype == inputs["u"].dtype
    pairs = {"out": (found[0], exact[0]), "last": (found[1], exact[1])}
    pairs |= {name: (value, exact[2][name]) for name, value in found[2].items()}
    for name, (ours, theirs) in pairs.items():
        off = (ours.double().cpu() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
        assert float(off) < tolerance, (name, float(off), tuple(inputs["u"].shape))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f32", "bf16"])
@pytest.mark.parametrize("size", [*FIXED, *drawn()], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_equals_the_definition(engine: str, size: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    batch, channels, states, length, groups = size
    wide = make(batch, channels, states, length, groups, seed=length)
    inputs = {
        name: value.float() if name in ("A", "D", "delta_bias") else value.to(dtype) for name, value in wide.items()
    }
    assert_agrees(engine, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("engine", ["triton", "torch"])
def test_constant_mixing(engine: str) -> None:
    assert_agrees(engine, {k: v.float() for k, v in make(3, 70, 16, 61, None).items()}, TOLERANCE[torch.float32])


def test_auto_takes_kernels_for_float32_and_torch_for_float64() -> None:
    device = torch.device("cuda")
    assert choose_engine(device, torch.float32) == ("mamba-ssm" if mamba_ssm_imports() else "triton")
    assert choose_engine(device, torch.float64) == "torch"
