"""The authors' published mask files: one pickle per training set, {file name: NumPy array [3, L]}, additive (0 =
visible).

A pickle may run any code when it is read, so this reader admits NumPy arrays of plain numbers and plain containers
alone: the few names that such a file needs are answered by stand-ins of ours, every other name ends the reading
before anything is called. Not even NumPy's own reconstruction runs on the file's content; bytes become arrays through
`numpy.frombuffer`.

The files were never seen (they lie on Google Drive only): the value convention is inferred from the authors' two
consumers (methods/muva.md section 5.4), so it is checked here value by value.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from reid_dist.errors import UserError
from reid_dist.methods.muva.config import PARTS
from reid_dist.methods.muva.masks import ImageRows, MaskRow

_NUMBERS = re.compile(r"[<>=|]?(f2|f4|f8|b1|u1|u2|u4|u8|i1|i2|i4|i8|\?)")
BLOCKED_FROM = -1e3  # an additive value this low lets nothing through a softmax


class _Type:
    """Stands for numpy.dtype."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise pickle.UnpicklingError(f"an array of type {code!r}, expected plain numbers")
        self.code, self.order = code.lstrip("<>=|"), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            self.order = state[1]

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """Stands for an array while a pickle is read."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        self.value = _build(content, kind, shape, "F" if fortran else "C")


def _build(content: object, kind: object, shape: object, order: object) -> np.ndarray:
    if not isinstance(kind, _Type) or not isinstance(content, (bytes, bytearray)) or not isinstance(shape, tuple):
        raise pickle.UnpicklingError("an array whose content is not plain bytes")
    dtype = kind.dtype()
    if not all(isinstance(n, int) and n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(content):
        raise pickle.UnpicklingError(f"an array of shape {shape} with {len(content)} bytes")
    return np.frombuffer(bytes(content), dtype).reshape(shape, order="F" if order == "F" else "C")


def _from_buffer(content: object, kind: object, shape: object, order: object) -> _Array:
    made = _Array()
    made.value = _build(content, kind, shape, order)
    return made


def _latin1(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("text in an unexpected encoding")
    return text.encode("latin1")


class _NdArray:
    """Stands for the name numpy.ndarray, which a file passes along but must not call."""

    def __init__(self, *_: object) -> None:
        raise pickle.UnpicklingError("a call of numpy.ndarray")


def _reconstruct(*_: object) -> _Array:
    return _Array()


_NAMES: Mapping[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _NdArray,
    ("_codecs", "encode"): _latin1,  # how protocol 2 writes bytes
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"the name {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("a reference to something outside the file")


def read_mask_pickle(content: bytes, where: str) -> dict[str, np.ndarray]:
    """{file name: array} of an official mask file. Raises UserError when it holds anything else; nothing of it runs."""
    try:
        found = _ArrayUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a crafted file can raise anything out of the pickle machine
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{where} is no plain mask file and was not read: it holds {reason}") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{where}: expected a dict of file name -> array, found {type(found).__name__}")
    arrays: dict[str, np.ndarray] = {}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, _Array) or value.value is None:
            raise UserError(f"{where}: entry {name!r} is not a file name with an array")
        arrays[PurePosixPath(name).name] = value.value
    if len(arrays) != len(found):
        raise UserError(f"{where}: {len(found) - len(arrays)} file names occur twice under different folders")
    return arrays


def visible_from_additive(array: np.ndarray, grid: tuple[int, int], where: str) -> np.ndarray:
    """Additive mask [3, L] or [3, rows, columns] -> bool [3, L]. Raises UserError for another shape or convention."""
    rows, columns = grid
    if array.shape not in ((len(PARTS), rows * columns), (len(PARTS), rows, columns)):
        raise UserError(f"{where}: mask of shape {array.shape}, expected ({len(PARTS)}, {rows * columns})")
    flat = array.reshape(len(PARTS), -1)
    visible = flat == 0
    if flat.dtype.kind != "f" or not bool((visible | (flat <= BLOCKED_FROM)).all()):
        raise UserError(
            f"{where}: mask values {np.unique(flat)[:4].tolist()} of type {flat.dtype}; an additive mask holds 0 (visible) "
            "and -inf or very negative numbers (blocked)"
        )
    return visible


def masks_of_pickle(content: bytes, where: str, view: ImageRows, grid: tuple[int, int]) -> Iterator[MaskRow]:
    """The masks of a view's images by file name, which must be unique within the view.

    Raises UserError for two images of one name, an image that the file lacks, or a mask of another form.
    """
    arrays = read_mask_pickle(content, where)
    names = [PurePosixPath(view.path(row)).name for row in range(len(view))]
    doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) != len(names) else []
    missing = [name for name in names if name not in arrays]
    if doubled or missing:
        what = (
            f"{len(doubled)} file names occur twice in the table" if doubled else f"{len(missing)} images are not in it"
        )
        raise UserError(f"{where}: {what}, first {(doubled or missing)[0]}: is it the file of this dataset?")
    for name, digest in zip(names, view.digests(np.arange(len(view))), strict=True):
        yield MaskRow(digest, visible_from_additive(arrays[name], grid, f"{where}, {name}"))
