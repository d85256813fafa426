"""Mamba mixers (methods/climb.md sections 3.3 and 3.4; Gu and Dao 2023, figure 3).

    xz = in_proj(x);  x = silu(conv(x));  [dt, B, C] = x_weight x;  delta = dt_weight dt;  scan with gate z;  out_proj

The bidirectional mixer shares the two projections and has a second set of everything else for the reversed sequence;
both gated results are added. Its second pass exists upstream only in a fused kernel of a fork, so it is built here
from the scan. Unlike the originals, the parameters of one scan live in one module: ZeRO-3 gathers weights per module
call, and a parent that reads its child's bias would read an empty one.

Shapes: b batch, l length, m width, e = expand * m channels, n states, r rank of the step sizes, k taps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reid_dist.models.mamba.conv import causal_conv1d
from reid_dist.models.mamba.scan import selective_scan

STEP_MIN, STEP_MAX, STEP_FLOOR = 0.001, 0.1, 1e-4


def step_bias(uniform: Tensor) -> Tensor:
    """Start value of the step bias from U(0, 1) draws: softplus^-1 of a log-uniform step in [0.001, 0.1]."""
    span = math.log(STEP_MAX) - math.log(STEP_MIN)
    step = (uniform * span + math.log(STEP_MIN)).exp().clamp(min=STEP_FLOOR)
    return step + (-(-step).expm1()).log()


def default_rank(width: int) -> int:
    """r = ceil(m / 16)."""
    return math.ceil(width / 16)


class ScanPath(nn.Module):
    """Everything between the two projections, for one direction."""

    def __init__(self, channels: int, states: int, rank: int, taps: int = 4) -> None:
        super().__init__()
        self.states, self.rank = states, rank
        self.conv_weight = nn.Parameter(torch.empty(channels, taps))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.x_weight = nn.Parameter(torch.empty(rank + 2 * states, channels))
        self.dt_weight = nn.Parameter(torch.empty(channels, rank))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.A_log = nn.Parameter(torch.empty(channels, states))
        self.D = nn.Parameter(torch.empty(channels))
        self.reset_parameters(torch.rand(channels))

    @torch.no_grad()
    def reset_parameters(self, uniform: Tensor) -> None:
        """`uniform` [e]: draws of the step bias, which both directions of a mixer share."""
        channels, taps = self.conv_weight.shape
        for weight, fan in ((self.conv_weight, taps), (self.conv_bias, taps), (self.x_weight, channels)):
            nn.init.uniform_(weight, -(fan**-0.5), fan**-0.5)
        nn.init.uniform_(self.dt_weight, -(self.rank**-0.5), self.rank**-0.5)
        self.dt_bias.copy_(step_bias(uniform))
        self.A_log.copy_(torch.arange(1, self.states + 1, dtype=torch.float32).log().expand(channels, -1))
        nn.init.ones_(self.D)

    def forward(self, xz: Tensor) -> Tensor:
        """xz [b, 2e, l] (input, gate) -> [b, e, l]."""
        x, z = xz.chunk(2, dim=1)
        x = causal_conv1d(x, self.conv_weight, self.conv_bias)
        dt, B, C = (self.x_weight @ x).split((self.rank, self.states, self.states), dim=1)
        wide = torch.promote_types(torch.float32, x.dtype)
        A = -self.A_log.to(wide).exp()
        bias = self.dt_bias.to(wide)
        y, _ = selective_scan(x, self.dt_weight @ dt, A, B, C, D=self.D, z=z, delta_bias=bias, delta_softplus=True)
        return y


class Mixer(nn.Module):
    """Base of all mixers: the shared projections and `paths` scan paths, whose results `mix` joins."""

    def __init__(
        self, width: int, states: int = 16, taps: int = 4, expand: int = 2, rank: int | None = None, paths: int = 1
    ) -> None:
        super().__init__()
        channels, rank = expand * width, default_rank(width) if rank is None else rank
        self.in_proj = nn.Linear(width, 2 * channels, bias=False)
        self.paths = nn.ModuleList(ScanPath(channels, states, rank, taps) for _ in range(paths))
        uniform = torch.rand(channels)
        for path in self.paths:
            path.reset_parameters(uniform)
        self.out_proj = nn.Linear(channels, width, bias=False)

    def mix(self, xz: Tensor) -> Tensor:
        """xz [b, 2e, l] -> [b, e, l]: plain forward scan."""
        result: Tensor = self.paths[0](xz)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """[b, l, m] -> [b, l, m]."""
        return self.out_proj(self.mix(self.in_proj(x).mT).mT)


class MambaMixer(Mixer):
    """One direction: y_t sees x_0 ... x_t."""


class BidirectionalMambaMixer(Mixer):
    """scan(xz) + flip(scan_b(flip(xz))): a sum, not a mean; gates inside each direction."""

    def __init__(self, width: int, states: int = 16, taps: int = 4, expand: int = 2, rank: int | None = None) -> None:
        super().__init__(width, states, taps, expand, rank, paths=2)

    def mix(self, xz: Tensor) -> Tensor:
        """xz [b, 2e, l] -> [b, e, l]."""
        ahead, back = self.paths
        return ahead(xz) + back(xz.flip(-1)).flip(-1)
