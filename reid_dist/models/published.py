"""Published weight files: tensors by name, read without executing anything (safetensors, or torch with `weights_only`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reid_dist.errors import UserError

WRAPPERS = ("model", "state_dict", "net")  # under one of these keys many training scripts keep the weights


def read_published(uri: str) -> dict[str, Tensor]:
    """Tensors of a checkpoint (.safetensors, .pt, .pth; local, or s3:// through the node cache), flattened.

    One wrapping level ({"model": ...}, {"state_dict": ...}, {"net": ...}) and a "module." prefix are taken off; NumPy
    numbers and arrays beside the weights (RLE's authors store their scores there) are admitted and passed over. Raises UserError
    when the file is missing, holds more than plain tensors and containers, or no named tensor.
    """
    from reid_dist.storage import cached_file

    path = cached_file(uri)
    if uri.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    try:
        with torch.serialization.safe_globals(_numpy_values()):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in many ways, all the user's to mend
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{uri}: not a file of plain tensors ({reason[:120]}); convert it to safetensors "
            f"(TorchScript and pickled code are refused)"
        ) from None
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(f"{uri}: holds no named tensors")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _numpy_values() -> list[Any]:
    """What a pickle names to hold NumPy numbers and arrays, under NumPy 1's names and NumPy 2's. None of it runs code."""
    import numpy as np
    from numpy._core import multiarray

    parts = [(getattr(multiarray, name), name) for name in ("_reconstruct", "scalar")]
    named = [
        (part, f"{package}.multiarray.{name}") for part, name in parts for package in ("numpy.core", "numpy._core")
    ]
    numbers = [np.bool_, np.int32, np.int64, np.float32, np.float64]
    return [*named, np.ndarray, np.dtype, *(type(np.dtype(number)) for number in numbers)]
