"""The selective scan, one function with three engines (methods/climb.md section 3.1; Gu and Dao 2023, algorithm 2).

    s_t = softplus(delta_t + bias)        h_t = exp(s_t A) h_{t-1} + s_t u_t B_t        y_t = C_t . h_t + D u_t
    out_t = y_t silu(z_t)

A is discretised with the exact exponential, B with the plain product s B. Engines:

- "mamba-ssm": the CUDA kernels of that package, where it imports (its failing installs are common, so it is optional);
- "triton":    our kernel (scan_triton.py), for GPUs without that package;
- "torch":     chunked torch with a hand-written adjoint (scan_cpu.py), for CPUs, for float64 and anything else.

"auto" takes the first that can run on the tensors' device. Inside, everything is float32 whatever the input type
(float64 stays float64). NaN is not searched for: a NaN at step t makes its channel NaN from t on (one in B or C: all
channels of its row and group) and leaves what came before; the training loop then stops at the loss.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Engine = Literal["auto", "mamba-ssm", "triton", "torch"]

logger = logging.getLogger(__name__)


@functools.cache
def mamba_ssm_imports() -> bool:
    """Whether the package's CUDA extension loads here; the reason is logged once where the package is installed."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return False
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
    except Exception as error:  # a broken extension raises whatever its loader raises
        logger.warning("mamba-ssm is installed but does not load (%s): our Triton kernel is used", error)
        return False
    return True


@functools.cache
def triton_imports() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def choose_engine(device: torch.device, dtype: torch.dtype) -> Engine:
    """What "auto" means for tensors on `device`."""
    if device.type != "cuda" or dtype == torch.float64:
        return "torch"
    if mamba_ssm_imports():
        return "mamba-ssm"
    return "triton" if triton_imports() else "torch"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    engine: Engine = "auto",
) -> tuple[Tensor, Tensor]:
    """(out [b, d, l] in u's type, last state [b, d, n], which carries no gradient).

    u, delta, z [b, d, l]; A [d, n] < 0; B, C [b, n, l], [b, g, n, l] with channel c in group floor(c g / d), or
    constant [d, n]; D, delta_bias [d]. Raises ValueError for shapes that do not fit.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    if engine == "auto":
        engine = choose_engine(u.device, u.dtype)
    if engine == "mamba-ssm":
        return _mamba_ssm(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    wide = torch.promote_types(torch.float32, u.dtype)
    A, D, delta_bias = (None if m is None else m.to(wide) for m in (A, D, delta_bias))  # type: ignore[assignment]
    groups = max(m.shape[1] if m.dim() == 4 else 1 for m in (B, C))
    run = _torch if engine == "torch" else _triton
    if groups == 1:
        B, C = (m[:, 0] if m.dim() == 4 else m for m in (B, C))
        return run(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    size, results = u.shape[1] // groups, []
    for g in range(groups):
        span = slice(g * size, (g + 1) * size)
        b, c = (m[span] if m.dim() == 2 else m[:, g % m.shape[1]] if m.dim() == 4 else m for m in (B, C))
        skip, bias = (None if m is None else m[span] for m in (D, delta_bias))
        gate = None if z is None else z[:, span]
        results.append(run(u[:, span], delta[:, span], A[span], b, c, skip, gate, bias, delta_softplus))
    return torch.cat([out for out, _ in results], 1), torch.cat([last for _, last in results], 1)


def _torch(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One group of channels in torch; everything is fused into one adjoint."""
    from reid_dist.models.mamba.scan_cpu import scan

    return scan(u, delta, A, B, C, D, z, bias, softplus)


def _triton(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One group of channels by our kernel; softplus, skip and gate are torch's."""
    from reid_dist.models.mamba.scan_triton import scan

    step = delta.to(A.dtype) if bias is None else delta.to(A.dtype) + bias[:, None]
    if softplus:
        step = F.softplus(step)  # identity above 20, as in the kernels
    wide_u = u.to(A.dtype)
    forms = [(m.T if m.dim() == 2 else m.mT).to(A.dtype) for m in (B, C)]
    y, last = scan((wide_u * step).mT, step.mT, A.T, *forms)
    y = y.mT if D is None else y.mT + wide_u * D[:, None]
    return (y if z is None else y * F.silu(z.to(A.dtype))).to(u.dtype), last.mT


def _mamba_ssm(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The package's kernels: one type for u, delta, z, B, C; float32 for A, D and the bias; last axis contiguous."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    same = [None if m is None else m.to(u.dtype).contiguous() for m in (u, delta, z)]
    forms = [m.float() if m.dim() == 2 else m.to(u.dtype).contiguous() for m in (B, C)]
    floats = [None if m is None else m.float().contiguous() for m in (A, D, delta_bias)]
    out, last = selective_scan_fn(
        same[0], same[1], floats[0], *forms, D=floats[1], z=same[2], delta_bias=floats[2],
        delta_softplus=delta_softplus, return_last_state=True,
    )  # fmt: skip
    return out, last.detach()


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None
) -> None:
    if u.dim() != 3 or u.shape[-1] == 0:
        raise ValueError(f"selective scan: u {tuple(u.shape)}, expected [b, d, l] with l of at least 1")
    batch, channels, length = u.shape
    expected = {"delta": (delta, u.shape), "z": (z, u.shape), "D": (D, (channels,)), "delta_bias": (bias, (channels,))}
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != tuple(shape):
            raise ValueError(f"selective scan: {name} {tuple(value.shape)}, expected {tuple(shape)} like u")
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"selective scan: A {tuple(A.shape)}, expected ({channels}, states)")
    for name, form in {"B": B, "C": C}.items():
        groups = form.shape[1] if form.dim() == 4 else 1
        shapes = {2: A.shape, 3: (batch, A.shape[1], length), 4: (batch, groups, A.shape[1], length)}
        if tuple(form.shape) != tuple(shapes.get(form.dim(), ())) or channels % groups:
            raise ValueError(
                f"selective scan: {name} {tuple(form.shape)} for u {tuple(u.shape)} and A {tuple(A.shape)}: expected "
                f"[b, n, l], [b, g, n, l] with g dividing {channels}, or [d, n]"
            )
