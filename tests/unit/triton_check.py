"""Run by test_mamba_scan in a process of its own, where TRITON_INTERPRET is set before Triton is imported."""

from __future__ import annotations

import torch

from reid_dist.models.mamba import scan_triton, selective_scan
from tests.unit.test_mamba_scan import make, run

# batch, channels, states, length, groups: odd sizes, several blocks of channels, several chunks, constant forms, l = 1
SIZES = [(1, 5, 3, 1, 1), (2, 6, 4, 9, 2), (1, 40, 3, 35, 1), (2, 6, 16, 33, 1), (2, 7, 3, 8, None)]


def main() -> None:
    """Print one line per size; assert agreement in float64."""
    scan_triton.CHUNK = 8  # so that short sequences cross chunks
    for seed, size in enumerate(SIZES):
        batch, channels, _, length, _ = size
        inputs = make(*size, seed=seed)
        grad = torch.randn(batch, channels, length, dtype=torch.float64)
        ours, theirs = (run(selective_scan, inputs, grad, delta_softplus=True, engine=e) for e in ("triton", "torch"))
        torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-9, atol=1e-9)
        print(size, "agrees")


if __name__ == "__main__":
    main()
