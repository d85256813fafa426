"""The selective scan's engines on a GPU, forward and backward: `python -m tests.bench.bench_scan_gpu`.

Beside our Triton kernel: mamba-ssm's kernels where they import, the chunked torch engine, and the recurrence over `unbind` slices
differentiated by autograd. Median of some twenty turns by CUDA events; memory is what a turn takes beyond its inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from reid_dist.models.mamba import selective_scan
from reid_dist.models.mamba.scan import mamba_ssm_imports
from tests.unit.test_mamba_scan import make

SIZES = [
    (4, 1536, 16, 128),
    (64, 1536, 16, 129),
    (16, 1536, 16, 1032),
    (4, 1536, 16, 8192),
]  # batch, channels, states, length
STEPWISE = 1100  # tokens up to which the recurrence is worth waiting for


def recurrence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """One token after the other; autograd keeps every state."""
    s = torch.nn.functional.softplus(delta + delta_bias[:, None])
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for st, xt, b, c in zip(s.unbind(2), (s * u).unbind(2), B[:, 0].unbind(2), C[:, 0].unbind(2), strict=True):
        h = (st[..., None] * A).exp() * h + xt[..., None] * b[:, None]
        ys.append((h * c[:, None]).sum(-1))
    return (torch.stack(ys, -1) + u * D[:, None]) * torch.nn.functional.silu(z)


def measure(turn: Callable[[], None]) -> tuple[float, float]:
    """(milliseconds of the median turn, MiB at its peak beyond what stood before)."""
    for _ in range(3):
        turn()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        turn()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2], (torch.cuda.max_memory_allocated() - before) / 2**20


def turn(engine: str, leaves: dict[str, Tensor], grad: Tensor) -> None:
    """Forward and backward; gradients are let go of."""
    if engine == "recurrence":
        out = recurrence(**leaves)
    else:
        out, _ = selective_scan(**leaves, delta_softplus=True, engine=engine)  # type: ignore[arg-type]
    torch.autograd.grad(out, list(leaves.values()), grad)


def main() -> None:
    if not torch.cuda.is_available():
        print("no GPU on this machine: nothing measured")
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    engines = ["triton", *(["mamba-ssm"] if mamba_ssm_imports() else []), "torch", "recurrence"]
    for size in SIZES:
        batch, channels, states, length = size
        inputs = {name: value.float().cuda() for name, value in make(*size).items()}
        leaves = {name: value.requires_grad_() for name, value in inputs.items()}
        grad = torch.randn(batch, channels, length, device="cuda")
        for engine in engines:
            if engine == "recurrence" and length > STEPWISE:
                continue
            took, memory = measure(functools.partial(turn, engine, leaves, grad))
            print(f"batch {batch}, channels {channels}, states {states}, length {length}: {engine} {took:.3f} ms, "
                  f"{memory:.0f} MiB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
