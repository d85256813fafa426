"""The Triton kernels compile for GPUs that are not here (their maths is pinned by tests/unit/test_mamba_scan.py)."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int, constant: bool) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from reid_dist.models.mamba import scan_triton

    sizes = {"states": 16, "N": 16, "D": scan_triton.BLOCK_D, "CHUNK_": scan_triton.CHUNK}
    forms = {**sizes, "CONST_B": constant, "CONST_C": constant}
    kernels = (
        (scan_triton._forward, "x s A B C y last kept", "length channels chunks", forms | {"KEEP": True}),
        (
            scan_triton._backward,
            "x s A B C g kept scratch dx ds dA dB dC",
            "length channels chunks blocks",
            forms,
        ),
    )
    for kernel, pointers, numbers, constants in kernels:
        signature = dict.fromkeys(pointers.split(), "*fp32") | dict.fromkeys(numbers.split(), "i32")
        source = ASTSource(kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert ".entry" in compiled.asm["ptx"]
