"""Selective scan on one thread: our engine beside the recurrence over `unbind` slices differentiated by autograd.

    python -m tests.bench.bench_scan            # about two minutes
    python -m tests.bench.bench_scan ENGINE L   # one measurement in this process, as JSON

Forward and backward of the whole function (softplus, skip, gate) at batch 4, width 1536, state 16. Every measurement has its own
process; memory is what its resident set grew by at the peak, beyond the inputs. Seconds are the best of several runs: wall
clock, and CPU time of the thread, which a busy machine disturbs less.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH, WIDTH, STATES = 4, 1536, 16
ROUNDS = 3
LENGTHS = (64, 128, 256, 512, 1024, 2048)
NAMES = {
    "ours": "chunked, hand-written adjoint (ours)",
    "unbound": "unbind recurrence, autograd (the baseline)",
    "transposed": "the same, states before channels (best layout found for it)",
    "indexed": "textbook: indexed [b, d, l, n] tensors, autograd",
}


def ours(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    from reid_dist.models.mamba import selective_scan

    return selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, engine="torch")[0]


def finish(y: Tensor, u: Tensor, D: Tensor, z: Tensor) -> Tensor:
    return (y + u * D[:, None]) * F.silu(z)


def unbound(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """State [b, d, n]."""
    s = F.softplus(delta + bias[:, None])
    h, ys = u.new_zeros(len(u), *A.shape), []
    for x, step, b, c in zip((u * s).unbind(-1), s.unbind(-1), B.unbind(-1), C.unbind(-1), strict=True):
        h = torch.exp(step[..., None] * A) * h + x[..., None] * b[:, None]
        ys.append((h * c[:, None]).sum(-1))
    return finish(torch.stack(ys, -1), u, D, z)


def transposed(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """State [b, n, d], inputs laid out by time first."""
    s = F.softplus(delta + bias[:, None])
    x, steps, bs, cs = ((m.mT.contiguous()).unbind(1) for m in (u * s, s, B, C))
    rate, h, ys = A.T.contiguous(), u.new_zeros(len(u), A.shape[1], A.shape[0]), []
    for xt, step, b, c in zip(x, steps, bs, cs, strict=True):
        h = torch.exp(step[:, None] * rate) * h + xt[:, None] * b[..., None]
        ys.append((c[:, None] @ h)[:, 0])
    return finish(torch.stack(ys, -1), u, D, z)


def indexed(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    s = F.softplus(delta + bias[:, None])
    decay = torch.exp(s[..., None] * A[:, None])  # [b, d, l, n]
    adds = (s * u)[..., None] * B.mT[:, None]
    h, ys = u.new_zeros(len(u), *A.shape), []
    for t in range(u.shape[-1]):
        h = decay[:, :, t] * h + adds[:, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
    return finish(torch.stack(ys, -1), u, D, z)


def inputs(length: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    A = -torch.arange(1.0, STATES + 1).expand(WIDTH, -1).clone()
    shape = (BATCH, WIDTH, length)
    values = [normal(*shape), normal(*shape), A, normal(BATCH, STATES, length), normal(BATCH, STATES, length),
              normal(WIDTH), normal(*shape), normal(WIDTH) - 4]  # fmt: skip
    return [value.requires_grad_() for value in values]


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """Largest resident set while it is open, sampled by a thread."""

    def __enter__(self) -> Peak:
        self.start = self.peak = resident()
        self.open = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.open:
            self.peak = max(self.peak, resident())
            time.sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self.open = False
        self.thread.join()


def measure(engine: str, length: int, only_memory: bool) -> dict[str, Any]:
    """Seconds and bytes of one engine in this process."""
    from reid_dist.models.mamba.scan_cpu import forget_buffers

    torch.set_num_threads(1)
    function: Callable[..., Tensor] = globals()[engine]
    function(*inputs(8)).backward(torch.ones(BATCH, WIDTH, 8))  # imports (torch fetches sympy here), buffers
    forget_buffers()  # so that they count
    leaves, grad = inputs(length), torch.ones(BATCH, WIDTH, length)
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    with Peak() as peak:
        function(*leaves).backward(grad)
    best = {"wall": (1e9, 0.0), "cpu": (1e9, 0.0)}
    for _ in range(0 if only_memory else 1 if engine == "indexed" else 7):
        marks = [(time.perf_counter(), time.thread_time())]
        out = function(*leaves)
        marks.append((time.perf_counter(), time.thread_time()))
        out.backward(grad)
        marks.append((time.perf_counter(), time.thread_time()))
        del out
        for i, clock in enumerate(("wall", "cpu")):
            spent = (marks[1][i] - marks[0][i], marks[2][i] - marks[1][i])
            best[clock] = min(best[clock], spent, key=sum)
    return {"engine": engine, "length": length, **best, "bytes": peak.peak - peak.start}


def child(engine: str, length: int) -> dict[str, Any]:
    words = [sys.executable, "-m", "tests.bench.bench_scan", engine, str(length)]
    # Memory is read where freed blocks go back at once; time is not: that makes every slice of the loops fault its pages.
    eager = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    found: list[dict[str, Any]] = []
    for settings in ({}, eager):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | settings
        done = subprocess.run([*words, str(len(settings))], env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found[0] | {"bytes": found[1]["bytes"]}


def best(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Least time by each clock and least memory of several measurements of one engine."""
    return {**results[0], **{clock: min((r[clock] for r in results), key=sum) for clock in ("wall", "cpu")},
            "bytes": min(r["bytes"] for r in results)}  # fmt: skip


def row(result: dict[str, Any], base: dict[str, Any]) -> str:
    (fw, bw), (fc, bc) = result["wall"], result["cpu"]
    speed = [sum(base[clock]) / sum(result[clock]) for clock in ("wall", "cpu")]
    return (
        f"{result['length']:>5}  {NAMES[result['engine']]:<60} {fw:7.3f} + {bw:7.3f}  {fc:7.3f} + {bc:7.3f}  "
        f"{speed[0]:5.2f}x {speed[1]:5.2f}x  {result['bytes'] / 2**20:8.1f} MiB  {result['bytes'] / base['bytes']:5.2f}"
    )


def main() -> None:
    print(f"batch {BATCH}, width {WIDTH}, state {STATES}, float32, one thread, torch {torch.__version__}")
    print(
        "  len  engine" + " " * 56 + "wall fwd + bwd      cpu fwd + bwd     speed wall/cpu  memory, share of baseline"
    )
    turns = [
        (child("unbound", 128), child("ours", 128)) for _ in range(ROUNDS)
    ]  # in turn, so that both see the same machine
    base, own = (best([pair[i] for pair in turns]) for i in (0, 1))
    for result in (base, own, child("transposed", 128), child("indexed", 128)):
        print(row(result, base), flush=True)
    print("linear in length:")
    for length in LENGTHS:
        result = child("ours", length)
        per_token = [1e6 * sum(result[clock]) / length for clock in ("wall", "cpu")]
        print(
            f"{length:>5}  {sum(result['wall']):7.3f} s  {per_token[0]:7.1f} us per token wall, {per_token[1]:7.1f} cpu, "
            f"{result['bytes'] / 2**20:8.1f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3:] not in ([], ["0"]))))
    else:
        main()
