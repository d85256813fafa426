"""Mixers of the ablations (methods/climb.md section 3.5); no recipe uses them, paper table 5 compares orders.

StrideMambaMixer (MambaMIL's SR mixer), ThreeWayMambaMixer (Vivim's), FourDirectionBlock (VMamba's SS2D).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reid_dist.models.mamba.mixer import Mixer, default_rank, step_bias
from reid_dist.models.mamba.scan import selective_scan


def stride_regroup(x: Tensor, rate: int) -> Tensor:
    """[b, c, l] -> [b, c, rate * k], k = ceil(l / rate): zero padding, then position a * rate + r goes to r * k + a."""
    k = -(-x.shape[-1] // rate)
    return F.pad(x, (0, k * rate - x.shape[-1])).unflatten(-1, (k, rate)).mT.flatten(-2)


def stride_restore(x: Tensor, rate: int, length: int) -> Tensor:
    """The inverse of `stride_regroup`: [b, c, rate * k] -> [b, c, length]."""
    return x.unflatten(-1, (rate, -1)).mT.flatten(-2)[..., :length]


class StrideMambaMixer(Mixer):
    """Forward scan plus a scan of the stride-regrouped sequence."""

    def __init__(
        self, width: int, rate: int, states: int = 16, taps: int = 4, expand: int = 2, rank: int | None = None
    ) -> None:
        super().__init__(width, states, taps, expand, rank, paths=2)
        self.rate = rate

    def mix(self, xz: Tensor) -> Tensor:
        """xz [b, 2e, l] -> [b, e, l]."""
        ahead, strided = self.paths
        regrouped = strided(stride_regroup(xz, self.rate))
        return ahead(xz) + stride_restore(regrouped, self.rate, xz.shape[-1])


class ThreeWayMambaMixer(Mixer):
    """(forward + reversed + frame-interleaved scan) / 3 over `frames` frames of l / frames tokens each."""

    def __init__(
        self, width: int, frames: int, states: int = 16, taps: int = 4, expand: int = 2, rank: int | None = None
    ) -> None:
        super().__init__(width, states, taps, expand, rank, paths=3)
        self.frames = frames

    def mix(self, xz: Tensor) -> Tensor:
        """xz [b, 2e, l] -> [b, e, l]. Raises ValueError when l is not a multiple of the frames."""
        if xz.shape[-1] % self.frames:
            raise ValueError(f"{xz.shape[-1]} tokens do not make {self.frames} equal frames")
        ahead, back, across = self.paths
        interleaved = across(xz.unflatten(-1, (self.frames, -1)).mT.flatten(-2))
        restored = interleaved.unflatten(-1, (-1, self.frames)).mT.flatten(-2)
        return (ahead(xz) + back(xz.flip(-1)).flip(-1) + restored) / 3


def cross_scan(x: Tensor) -> Tensor:
    """[b, c, h, w] -> [b, 4, c, h * w]: row-major, column-major, and both reversed."""
    two = torch.stack([x.flatten(2), x.mT.flatten(2)], dim=1)
    return torch.cat([two, two.flip(-1)], dim=1)


def cross_merge(y: Tensor) -> Tensor:
    """[b, 4, c, h, w], routes as of `cross_scan`, each unrolled as h * w -> sum on the pixels [b, c, h * w]."""
    h, w = y.shape[-2:]
    routes = y.flatten(-2)
    rows, columns = (routes[:, :2] + routes[:, 2:].flip(-1)).unbind(1)
    return rows + columns.unflatten(-1, (w, h)).mT.flatten(-2)


class FourDirectionBlock(nn.Module):
    """Pre-norm residual block that scans an image map along four routes, each with its own parameters.

    x + out_proj(LN(sum of routes) * silu(z)), with x' = silu(3 x 3 depth-wise convolution).
    """

    def __init__(self, width: int, states: int = 16, taps: int = 3, expand: int = 2, rank: int | None = None) -> None:
        super().__init__()
        channels, rank = expand * width, default_rank(width) if rank is None else rank
        self.states, self.rank = states, rank
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.in_proj = nn.Linear(width, 2 * channels, bias=False)
        self.conv = nn.Conv2d(channels, channels, taps, padding=taps // 2, groups=channels)
        self.x_weight = nn.Parameter(torch.empty(4, rank + 2 * states, channels))
        self.dt_weight = nn.Parameter(torch.empty(4, channels, rank))
        self.dt_bias = nn.Parameter(step_bias(torch.rand(4, channels)))
        self.A_log = nn.Parameter(torch.arange(1, states + 1).float().log().expand(4 * channels, -1).clone())
        self.D = nn.Parameter(torch.ones(4 * channels))
        self.out_norm = nn.LayerNorm(channels)
        self.out_proj = nn.Linear(channels, width, bias=False)
        nn.init.uniform_(self.x_weight, -(channels**-0.5), channels**-0.5)
        nn.init.uniform_(self.dt_weight, -(rank**-0.5), rank**-0.5)

    def _routes(self, x: Tensor) -> Tensor:
        """x [b, e, h, w] -> [b, h, w, e]."""
        routes = cross_scan(x)
        projected = torch.einsum("rfe,brel->brfl", self.x_weight, routes)
        dt, B, C = projected.split((self.rank, self.states, self.states), dim=2)
        delta = torch.einsum("rek,brkl->brel", self.dt_weight, dt)
        y, _ = selective_scan(
            routes.flatten(1, 2), delta.flatten(1, 2), -self.A_log.exp(), B, C, D=self.D,
            delta_bias=self.dt_bias.flatten(), delta_softplus=True,
        )  # fmt: skip
        merged = cross_merge(y.unflatten(1, (4, -1)).unflatten(-1, x.shape[-2:]))
        return merged.unflatten(-1, x.shape[-2:]).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, h, w, m] -> [b, h, w, m]."""
        inner, gate = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        scanned = self._routes(F.silu(self.conv(inner.permute(0, 3, 1, 2))))
        return x + self.out_proj(self.out_norm(scanned) * F.silu(gate))
