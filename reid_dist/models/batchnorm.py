"""Batch norm over the whole global batch, on any device.

The law of the project: N workers compute what one would. Plain batch norm breaks it (every rank would normalise by its
own rows), and torch.nn.SyncBatchNorm refuses CPU tensors and empty slices. These modules are torch's own BatchNorm1d/2d
(same parameters, buffers and state-dict names) whose statistics come from global sums and counts: one reduction of
2 C + 1 numbers in the forward pass and one of 2 C in the backward pass, whatever the slices are, also uneven or without
rows.

No module knows a rank. The training loop sets the attribute `reducer` to a sum over ranks; None means that this process
sees the whole batch, and torch's own kernel runs.

With m = mean and s = 1 / sqrt(var + eps) over all rows, y = (x - m) s w + b and, for g = dL/dy,
    dL/dx = w s (g - mean(g) - (x - m) s^2 mean(g (x - m))),
means over the global batch again. Weight and bias get this rank's share of their gradient, as every other parameter
does. Each rank contributes n, n mean and n (var + mean^2) in float64, so the merged variance does not cancel as float32
sums of squares would. Statistics and running buffers are float32 at least, whatever the precision of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Reducer = Callable[[Tensor], Tensor]  # sum over ranks of equally shaped tensors
LOW_PRECISION = (torch.bfloat16, torch.float16)


def _rows_first(x: Tensor) -> tuple[list[int], list[int]]:
    """(all axes but the channel axis 1, shape of a per-channel vector that broadcasts against `x`)."""
    return [axis for axis in range(x.dim()) if axis != 1], [1, -1] + [1] * (x.dim() - 2)


def _statistics(x: Tensor, reducer: Reducer) -> tuple[Tensor, Tensor, Tensor]:
    """Global (mean [C], biased variance [C], elements per channel []) in float64."""
    axes, _ = _rows_first(x)
    channels = x.shape[1]
    count = x.numel() // channels
    sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if count:
        wide = x.float() if x.dtype in LOW_PRECISION else x
        var, mean = (value.double() for value in torch.var_mean(wide, axes, correction=0))
        sums = torch.cat([count * mean, count * (var + mean.square()), sums[-1:] + count])
    total = reducer(sums)
    n = total[-1]
    if count <= 1 and n.item() <= 1:  # read back only where this rank cannot tell by itself
        raise ValueError(f"batch norm over {int(n.item())} value per channel: the global batch needs at least two")
    mean = total[:channels] / n
    return mean, (total[channels:-1] / n - mean.square()).clamp(min=0), n


class _GlobalNorm(torch.autograd.Function):
    """(x [n, C, ...], weight, bias, mean, var [C], count) -> y, with the gradient of the global statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        n: Tensor,
        eps: float,
        reducer: Reducer,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, n)
        ctx.eps, ctx.reducer = eps, reducer
        if x.numel() == 0:
            return torch.empty_like(x)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, n = ctx.saved_tensors
        axes, shape = _rows_first(x)
        grad = grads[0].to(mean.dtype)
        centred = x.to(mean.dtype) - mean.view(shape)
        scale = torch.rsqrt(var + ctx.eps)
        own = torch.stack([grad.sum(axes), (grad * centred).sum(axes)]).double()  # zeros for an empty slice
        total = (ctx.reducer(own) / n).to(mean.dtype)
        grad_weight, grad_bias = (own[1] * scale).to(weight.dtype), own[0].to(weight.dtype)
        grad_x = (grad - total[0].view(shape)).sub_(centred.mul_((total[1] * scale.square()).view(shape)))
        grad_x = grad_x.mul_((weight * scale).view(shape)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """What both shapes share. `reducer`: sum over ranks, set by the training loop; None: this process alone."""

    reducer: Reducer | None = None

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Synchronised:
        """Moves and casts, but running statistics never lose their float32: steps of 0.1 vanish in bfloat16."""
        kept = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            if getattr(self, name).dtype in LOW_PRECISION:
                setattr(self, name, value.to(device=getattr(self, name).device))
        return self

    def forward(self, input: Tensor) -> Tensor:
        """[n, C, ...] -> the same shape. Raises ValueError when the global batch has one value per channel."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        weight, bias = self.weight.to(self.running_mean.dtype), self.bias.to(self.running_mean.dtype)
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, weight, bias, training=False, eps=self.eps)
        self.num_batches_tracked.add_(1)
        if self.reducer is None:
            return F.batch_norm(input, self.running_mean, self.running_var, weight, bias, True, self.momentum, self.eps)
        with torch.no_grad():
            mean, var, n = _statistics(input.detach(), self.reducer)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (n / (n - 1))).to(self.running_var.dtype), self.momentum)
        kind = self.running_mean.dtype
        return _GlobalNorm.apply(input, weight, bias, mean.to(kind), var.to(kind), n, self.eps, self.reducer)


class BatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d ([n, C] or [n, C, L]) over the global batch."""


class BatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d ([n, C, H, W]) over the global batch."""
