"""Access to the golden vectors: numbers made by the authors' code, kept outside this repository.

`REID_GOLDEN` names their folder; else `../shared/golden` beside the checkout. Cases are found by function prefix and carry
their own sizes and constants, so another set of vectors in the same format runs through the same tests.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(os.environ.get("REID_GOLDEN") or Path(__file__).resolve().parents[2] / "shared" / "golden")


def cases(method: str, *prefixes: str) -> pytest.MarkDecorator:
    """Parametrise a test's `case` over `<method>/<prefix>_*.npz` (a case is loaded when the test runs)."""
    folder = ROOT / method
    found = [
        path
        for prefix in prefixes
        for path in sorted(folder.glob(f"{prefix}*.npz"))
        if re.fullmatch(rf"{re.escape(prefix)}(_.*)?", path.stem)
    ]
    if not found:
        reason = f"no golden vectors {prefixes} in {folder} (set REID_GOLDEN)"
        return pytest.mark.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=reason))])
    return pytest.mark.parametrize("case", found, ids=[path.stem for path in found])


def load(path: Path) -> dict[str, Any]:
    """Arrays of one case; 0-d arrays become Python values (str, int, float, bool)."""
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key].item() if arrays[key].ndim == 0 else arrays[key] for key in arrays.files}
