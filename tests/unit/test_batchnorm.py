"""Synchronised batch norm in one process: with a reducer it is torch's batch norm; ranks come in tests/dist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reid_dist.models.batchnorm import BatchNorm1d, BatchNorm2d

SHAPES = {"1d": (7, 5), "1d-length": (6, 5, 3), "2d": (4, 5, 3, 2)}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}


def identity(value: Tensor) -> Tensor:
    """The sum over one rank."""
    return value.clone()


def pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(torch's module, ours with a reducer) with equal random parameters."""
    reference = (nn.BatchNorm2d if name == "2d" else nn.BatchNorm1d)(5).to(dtype)
    ours = (BatchNorm2d if name == "2d" else BatchNorm1d)(5).to(dtype)
    generator = torch.Generator().manual_seed(3)
    state = {k: v if v.dtype == torch.int64 else torch.rand(v.shape, generator=generator).to(dtype) + 0.5
             for k, v in reference.state_dict().items()}  # fmt: skip
    reference.load_state_dict(state)
    ours.load_state_dict(state)
    ours.reducer = identity
    return reference, ours


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_equals_torch(name: str, dtype: torch.dtype, offset: float) -> None:
    reference, ours = pair(name, dtype)
    tolerance = TOLERANCE[dtype] * (1 + offset)
    generator = torch.Generator().manual_seed(4)
    for _ in range(2):  # running statistics move twice
        x = (torch.randn(SHAPES[name], generator=generator, dtype=torch.float64) + offset).to(dtype)
        cotangent = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(dtype)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = reference(a), ours(b)
        torch.testing.assert_close(yb, ya, rtol=tolerance, atol=tolerance)
        (ya * cotangent).sum().backward()
        (yb * cotangent).sum().backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=tolerance, atol=tolerance)
    for (key, theirs), (_, value) in zip(reference.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(value.grad, theirs.grad, rtol=tolerance, atol=tolerance, msg=key)
    for key, theirs in reference.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], theirs, rtol=tolerance, atol=tolerance, msg=key)
    reference.eval()
    ours.eval()
    torch.testing.assert_close(ours(x), reference(x), rtol=tolerance, atol=tolerance)


def test_gradient_is_the_derivative() -> None:
    """Independent of torch's own kernel: finite differences."""
    _, ours = pair("1d", torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: ours(value).square(), (x,))


def test_without_a_reducer_it_is_torchs_kernel() -> None:
    reference, ours = pair("2d", torch.float32)
    ours.reducer = None
    x = torch.randn(SHAPES["2d"], generator=torch.Generator().manual_seed(2))
    assert torch.equal(ours(x), reference(x))
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in ours.state_dict().items())


def test_running_statistics_stay_float32_in_bfloat16() -> None:
    ours = BatchNorm2d(5).bfloat16()
    ours.reducer = identity
    assert ours.weight.dtype == torch.bfloat16
    x = (torch.randn(8, 5, 6, 6, generator=torch.Generator().manual_seed(5)) * 0.01 + 1).bfloat16().requires_grad_()
    for _ in range(200):
        y = ours(x)
    y.square().sum().backward()
    assert y.dtype == x.grad.dtype == ours.weight.grad.dtype == torch.bfloat16
    assert ours.running_mean.dtype == torch.float32
    mean = x.detach().float().mean((0, 2, 3))
    torch.testing.assert_close(ours.running_mean, mean, rtol=1e-5, atol=1e-5)  # in bfloat16: 0.02 off


@pytest.mark.parametrize("reducer", [None, identity])
def test_one_value_per_channel_is_refused(reducer: object) -> None:
    ours = BatchNorm1d(5)
    ours.reducer = reducer  # type: ignore[assignment]
    with pytest.raises(ValueError, match="value"):
        ours(torch.randn(1, 5))


def test_wrong_rank_of_input_is_refused() -> None:
    with pytest.raises(ValueError, match="4D"):
        BatchNorm2d(5)(torch.randn(3, 5))
