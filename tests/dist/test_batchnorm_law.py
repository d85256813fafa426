"""Synchronised batch norm over processes (gloo on CPUs, NCCL on GPUs) equals torch's batch norm of one process on the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from reid_dist.models.batchnorm import BatchNorm1d, BatchNorm2d
from reid_dist.training.collectives import reduce_sum
from tests.pool import Pool

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
CUTS = {
    2: [(3, 6), (0, 9), (9, 0), (1, 8)],
    3: [(3, 3, 3), (0, 5, 4), (8, 0, 1)],
    4: [(2, 3, 2, 2), (1, 0, 0, 8), (0, 4, 5, 0)],
}


def network(kinds: tuple[type[nn.Module], type[nn.Module]], dtype: torch.dtype) -> nn.Module:
    """Two batch norms of either kind with weights between, so that gradients pass through statistics twice."""
    torch.manual_seed(0)
    two, one = kinds
    convolution = nn.Conv2d(3, 6, 3, bias=False)
    return nn.Sequential(two(3), convolution, nn.ReLU(), two(6), nn.Flatten(), one(24), nn.Linear(24, 4)).to(dtype)


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Two batches of 9 images and the cotangents of the outputs; the rows' means differ, as modalities' do."""
    generator = torch.Generator().manual_seed(1)
    shift = torch.arange(9, dtype=torch.float64).view(9, 1, 1, 1)
    return [
        ((torch.randn(9, 3, 4, 4, generator=generator, dtype=torch.float64) + shift).to(dtype),
         torch.randn(9, 4, generator=generator, dtype=torch.float64).to(dtype))
        for _ in range(2)
    ]  # fmt: skip


def passes(counts: tuple[int, ...], name: str, device: str = "cpu") -> dict[str, Tensor]:
    """Outputs, gradients and buffers of this rank's slice after two passes; parameter gradients summed over ranks."""
    torch.backends.cudnn.allow_tf32 = False  # else a GPU convolves float32 with ten bits
    dtype, rank = getattr(torch, name), dist.get_rank()
    net = network((BatchNorm2d, BatchNorm1d), dtype).to(device)
    for module in net:
        if hasattr(module, "reducer"):
            module.reducer = reduce_sum
    start = sum(counts[:rank])
    result: dict[str, Tensor] = {}
    for index, (x, cotangent) in enumerate(batches(dtype)):
        own = x[start : start + counts[rank]].to(device).requires_grad_()
        y = net(own)
        (y * cotangent[start : start + counts[rank]].to(device)).sum().backward()
        result |= {f"y{index}": y.detach(), f"x{index}": own.grad}
    for key, parameter in net.named_parameters():
        dist.all_reduce(parameter.grad)
        result[f"grad.{key}"] = parameter.grad
    return {key: value.cpu() for key, value in (result | dict(net.named_buffers())).items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("world", "counts"), [(world, counts) for world, cuts in CUTS.items() for counts in cuts])
def test_equals_one_process(pool: Pool, world: int, counts: tuple[int, ...], dtype: str) -> None:
    assert_equals_one_process(pool.run(passes, world, counts, dtype), dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine, so no NCCL")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_one_process_on_gpus(dtype: str) -> None:
    """One rank for each GPU, the last with all rows that are left over; on one GPU the global sums are still NCCL's."""
    world = min(torch.cuda.device_count(), 4)
    pool = Pool("nccl")
    try:
        counts = (*[2] * (world - 1), 9 - 2 * (world - 1))
        assert_equals_one_process(pool.run(passes, world, counts, dtype, "cuda"), dtype)
    finally:
        pool.close()


def assert_equals_one_process(ranks: list[dict[str, Tensor]], dtype: str) -> None:
    """Values, gradients and running statistics of the ranks beside torch's of one process on the CPU."""
    net = network((nn.BatchNorm2d, nn.BatchNorm1d), getattr(torch, dtype))
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for index, (x, cotangent) in enumerate(batches(getattr(torch, dtype))):
        x.requires_grad_()
        y = net(x)
        (y * cotangent).sum().backward()
        for key, value in ((f"y{index}", y.detach()), (f"x{index}", x.grad)):
            torch.testing.assert_close(torch.cat([rank[key] for rank in ranks]), value, **tolerance, msg=key)
    for rank in ranks:
        for key, parameter in net.named_parameters():
            atol = 20 * TOLERANCE[dtype]  # sums over 144 values
            torch.testing.assert_close(rank[f"grad.{key}"], parameter.grad, rtol=TOLERANCE[dtype], atol=atol)
        for key, value in net.named_buffers():
            torch.testing.assert_close(rank[key], value, **tolerance, msg=key)
            assert torch.equal(rank[key], ranks[0][key]), f"{key} differs between ranks"
