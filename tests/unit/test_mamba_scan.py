"""The selective scan: golden vectors, its adjoint against autograd, every engine, lengths and forms, bad input."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reid_dist.models.mamba import scan as scan_module
from reid_dist.models.mamba import scan_cut, selective_scan
from reid_dist.models.mamba.scan_cpu import forget_buffers
from tests.golden import cases, load
from tests.unit.mamba_names import close, tensor

INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def textbook(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
             z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
             ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, one token after the other."""
    batch, channels, length = u.shape

    def spread(m: Tensor) -> Tensor:  # -> [b, d, n, l]
        if m.dim() == 2:
            return m[None, :, :, None].expand(batch, -1, -1, length)
        grouped = m[:, None] if m.dim() == 3 else m
        return grouped.repeat_interleave(channels // grouped.shape[1], dim=1)

    s = delta if delta_bias is None else delta + delta_bias[:, None]
    s = torch.where(s > 20, s, (1 + s.clamp(max=20).exp()).log()) if delta_softplus else s
    Bs, Cs = spread(B), spread(C)
    h, ys = u.new_zeros(batch, channels, A.shape[1]), []
    for t in range(length):
        h = (s[:, :, t, None] * A).exp() * h + (s[:, :, t] * u[:, :, t])[..., None] * Bs[..., t]
        ys.append((Cs[..., t] * h).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + u * D[:, None]
    return (y if z is None else y * z * z.sigmoid()), h


def make(batch: int, channels: int, states: int, length: int, groups: int | None = 1, seed: int = 0,
         dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:  # fmt: skip
    """Random inputs; `groups` None: constant B and C."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    form = (channels, states) if groups is None else (batch, groups, states, length)
    return {
        "u": normal(batch, channels, length), "delta": normal(batch, channels, length),
        "A": -normal(channels, states).exp(), "B": normal(*form), "C": normal(*form), "D": normal(channels),
        "z": normal(batch, channels, length), "delta_bias": normal(channels),
    }  # fmt: skip


def run(
    function: Any, inputs: dict[str, Tensor], grad: Tensor, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    out, last = function(**leaves, **options)
    out.backward(grad)
    return out.detach(), last.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@cases("climb", "selective_scan")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_golden(case: Path, dtype: torch.dtype) -> None:
    c = load(case)
    inputs = {name: tensor(c[f"in_{name}"], dtype) for name in INPUTS if f"in_{name}" in c}
    softplus = bool(c["const_delta_softplus"])
    out, last, grads = run(selective_scan, inputs, tensor(c["in_grad_out"], dtype), delta_softplus=softplus)
    close(out, c["out_y"], 1e-5, "y")
    close(last, c["out_last_state"], 1e-5, "last state")
    assert {f"grad_{name}" for name in grads} == {key for key in c if key.startswith("grad_")}
    for name, value in grads.items():
        close(value, c[f"grad_{name}"], 1e-5, name)


@pytest.mark.parametrize("groups", [1, 3, None])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 32, 33, 75])
def test_lengths_around_chunks_and_segments(length: int, groups: int | None) -> None:
    inputs = make(2, 6, 3, length, groups, seed=length)
    grad = torch.randn(2, 6, length, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours, theirs = (run(f, inputs, grad, delta_softplus=True) for f in (selective_scan, textbook))
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-10, atol=1e-10)


def test_one_constant_form_and_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """B by row and token, C constant; and blocks of channels narrower than the channels."""
    monkeypatch.setattr(scan_cut, "BLOCK_BYTES", 1)
    inputs = make(2, 150, 3, 40) | {"C": make(1, 150, 3, 1, None)["C"], "B": make(2, 1, 3, 40)["B"][:, 0]}
    grad = torch.randn(2, 150, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours, theirs = (run(f, inputs, grad, delta_softplus=True) for f in (selective_scan, textbook))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_adjoint_by_finite_differences() -> None:
    inputs = [value.requires_grad_() for value in make(1, 2, 2, 11, seed=3).values()]
    assert torch.autograd.gradcheck(lambda *leaves: selective_scan(*leaves, delta_softplus=True)[0], inputs)


def test_huge_steps_do_not_overflow() -> None:
    """Decays far below the smallest float: exact zeros, finite gradients."""
    inputs = make(1, 4, 3, 20, dtype=torch.float32)
    inputs["delta"] = inputs["delta"] * 1e3
    out, last, grads = run(selective_scan, inputs, torch.ones(1, 4, 20), delta_softplus=True)
    expected = run(
        textbook, {k: v.double() for k, v in inputs.items()}, torch.ones(1, 4, 20).double(), delta_softplus=True
    )
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-4, atol=1e-2)
    assert last.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_inputs_are_computed_wide(dtype: torch.dtype, tolerance: float) -> None:
    inputs = make(2, 6, 4, 33, dtype=dtype) | {k: make(2, 6, 4, 33)[k].float() for k in ("A", "D", "delta_bias")}
    grad = torch.ones(2, 6, 33, dtype=dtype)
    out, _, grads = run(selective_scan, inputs, grad, delta_softplus=True)
    exact = run(textbook, {k: v.double() for k, v in inputs.items()}, grad.double(), delta_softplus=True)
    assert out.dtype == dtype
    assert float((out - exact[0]).abs().max() / exact[0].abs().max()) < tolerance
    for name, value in grads.items():
        assert value.dtype == inputs[name].dtype
        assert float((value - exact[2][name]).abs().max() / exact[2][name].abs().max()) < tolerance, name


def test_nan_poisons_its_channel_from_its_step_on() -> None:
    inputs = make(2, 3, 2, 40)
    inputs["delta"] = inputs["delta"].abs()
    inputs["delta_bias"] = inputs["delta_bias"].abs()
    clean, *_ = selective_scan(**inputs)
    inputs["u"][1, 2, 17] = float("nan")
    out, _ = selective_scan(**inputs)
    assert out[1, 2, 17:].isnan().all()
    out[1, 2, 17:] = clean[1, 2, 17:]
    torch.testing.assert_close(out, clean)
    inputs["B"][0, 0, 1, 5] = float("nan")
    out, _ = selective_scan(**inputs)
    assert out[0, :, 5:].isnan().all()
    assert out[0, :, :5].isfinite().all()


def test_what_stays_for_the_next_scan_changes_nothing() -> None:
    """Buffers of one scan serve the next of the same size, also after NaN and after inference; others get their own."""
    inputs, other = make(2, 6, 4, 21, seed=1), make(3, 5, 4, 40, seed=2)

    def results(given: dict[str, Tensor]) -> list[Tensor]:
        out, last, grads = run(selective_scan, given, torch.ones_like(given["u"]), delta_softplus=True)
        return [out, last, *grads.values()]

    first, second = results(inputs), results(other)
    wrong = {name: torch.full_like(value, torch.nan) for name, value in inputs.items()}
    with torch.inference_mode():
        selective_scan(**wrong, delta_softplus=True)
    results(wrong)
    for given, before in ((inputs, first), (other, second), (inputs, first)):
        torch.testing.assert_close(results(given), before, rtol=0, atol=0)
    forget_buffers()
    with torch.inference_mode():
        selective_scan(**inputs, delta_softplus=True)
    torch.testing.assert_close(results(inputs), first, rtol=0, atol=0)


def test_memory_holds_few_states() -> None:
    """What is kept for the backward pass beside the inputs: one state per two chunks, and what enters the gate."""
    inputs = {name: value.requires_grad_() for name, value in make(1, 32, 8, 64).items()}
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        selective_scan(**inputs, delta_softplus=True)
    given = {value.data_ptr() for value in inputs.values()}
    kept = sum(count for place, count in saved.items() if place not in given)
    assert kept == 64 // (2 * scan_cut.CHUNK) * 8 * 32 + 64 * 32


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("u", torch.zeros(2, 6, 0), "l of at least 1"),
        ("delta", torch.zeros(2, 6, 3), r"delta \(2, 6, 3\), expected \(2, 6, 5\)"),
        ("A", torch.zeros(5, 3), r"A \(5, 3\)"),
        ("B", torch.zeros(2, 4, 3, 5), "g dividing 6"),
        ("C", torch.zeros(2, 3, 4), r"C \(2, 3, 4\)"),
        ("z", torch.zeros(6), r"z \(6,\)"),
    ],
)
def test_wrong_shapes_are_named(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**(make(2, 6, 3, 5) | {name: value}))


def test_engine_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for kernels, ours in itertools.product((True, False), repeat=2):
        monkeypatch.setattr(scan_module, "mamba_ssm_imports", lambda found=kernels: found)
        monkeypatch.setattr(scan_module, "triton_imports", lambda found=ours: found)
        assert scan_module.choose_engine(torch.device("cpu"), torch.float32) == "torch"
        assert scan_module.choose_engine(gpu, torch.float64) == "torch"
        expected = "mamba-ssm" if kernels else "triton" if ours else "torch"
        assert scan_module.choose_engine(gpu, torch.float32) == expected


def test_mamba_ssm_call_keeps_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types, layouts and keywords handed to the package (specification 3.6); the definition stands in for its kernel."""
    import types

    seen: dict[str, Any] = {}

    def kernel(u: Tensor, delta: Tensor, *matrices: Tensor, return_last_state: bool, **rest: Any) -> Any:
        seen.update(u=u, delta=delta, **dict(zip("ABC", matrices, strict=True)), **rest)
        assert return_last_state
        return textbook(u, delta, *matrices, **rest)

    package = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    package.selective_scan_fn = kernel  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    inputs = make(2, 6, 4, 9, 2, dtype=torch.float32)
    out, last = selective_scan(**inputs, delta_softplus=True, engine="mamba-ssm")
    torch.testing.assert_close((out, last), selective_scan(**inputs, delta_softplus=True), rtol=1e-4, atol=1e-5)
    half = {name: value.bfloat16() for name, value in inputs.items()}
    selective_scan(**half, delta_softplus=True, engine="mamba-ssm")
    assert {name: seen[name].dtype for name in ("u", "delta", "z", "B", "C")} == dict.fromkeys(
        ("u", "delta", "z", "B", "C"), torch.bfloat16
    )
    assert {name: seen[name].dtype for name in ("A", "D", "delta_bias")} == dict.fromkeys(
        ("A", "D", "delta_bias"), torch.float32
    )
    assert all(seen[name].is_contiguous() for name in ("u", "delta", "z", "B", "C"))


def test_triton_kernel_under_its_interpreter() -> None:
    """The kernel's maths on this machine, forward and all gradients, against the torch engine (no GPU is needed)."""
    pytest.importorskip("triton", reason="Triton is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "tests.unit.triton_check"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("agrees") >= 5
