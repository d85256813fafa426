"""Images that are part of a file: `<file>#xywh=x,y,w,h` is a box of a picture (CUHK-SYSU's scenes; cut at the
picture's edge), `<file>#<key>/<name>` a cell of a MATLAB 7.3 file (CUHK03's classic release). They come out as PNG,
which keeps every pixel.

Every other path is a file and comes out as it is stored.
"""

from __future__ import annotations

import functools
import io
import os
import re
import tempfile
import threading
from typing import Any

import numpy as np
from PIL import Image

from reid_dist.data.decode import decode
from reid_dist.data.records import DatasetError
from reid_dist.storage import is_remote
from reid_dist.storage.base import Store

_BOX = re.compile(r"(.+)#xywh=(\d+),(\d+),(\d+),(\d+)")
_CELL = re.compile(r"(.+\.mat)#(detected|labeled)/([1-5])_(\d{3,4})_([12])_(\d{2})\.png")


def load_image(store: Store, path: str) -> bytes:
    """Encoded image of a record's path. Raises FileNotFoundError, DatasetError, StorageError."""
    if box := _BOX.fullmatch(path):
        left, top, width, height = (int(number) for number in box.groups()[1:])
        place: Any = store  # hashable as every object is
        scene = _scene(place, box[1])
        crop = scene[top : top + height, left : left + width]
        if not crop.size:
            raise DatasetError(f"{store.uri}: {path} lies outside its picture of {scene.shape[1]} x {scene.shape[0]}")
        return _png(crop)
    if cell := _CELL.fullmatch(path):
        pair, person, _, number = (int(text) for text in cell.groups()[2:])
        return _png(read_cell(open_hdf5(store, cell[1]), cell[2], pair, person, number))
    return store.read(path)


@functools.lru_cache(maxsize=8)  # one picture holds several people, whose records stand together
def _scene(store: Any, file: str) -> np.ndarray:
    return decode(store.read(file), file)


_opened: dict[tuple[str, str, str], Any] = {}  # by place, file and content
_opening = threading.Lock()


def open_hdf5(store: Store, file: str) -> Any:
    """An opened h5py.File, kept open; a remote one is copied to this machine once per process.

    Raises FileNotFoundError, DatasetError, StorageError.
    """
    entry = next((entry for entry in store.list(file) if entry.key == file), None)
    if entry is None:
        raise FileNotFoundError(f"{store.uri}/{file} does not exist")
    key = (store.uri, file, f"{entry.tag}/{entry.modified}/{entry.size}")
    with _opening:
        if key not in _opened:
            if is_remote(store.uri):
                with tempfile.TemporaryDirectory(prefix="reid-mat-") as folder:
                    store.download(file, os.path.join(folder, "copy.mat"))
                    _opened[key] = _hdf5(os.path.join(folder, "copy.mat"), file)  # readable after its name is gone
            else:
                _opened[key] = _hdf5(os.path.join(store.uri, file), file)
    return _opened[key]


def _hdf5(path: str, name: str) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError:
        raise DatasetError(f"{name} is not a MATLAB 7.3 (HDF5) file; fetch the authors' own again") from None


def read_cell(file: Any, key: str, pair: int, person: int, number: int) -> np.ndarray:
    """uint8 [height, width, 3] of one cell; pair, person, number (1 to 10) count from 1. MATLAB's arrays are
    transposed.
    """
    cells = file[file[key][0][pair - 1]]
    array = np.asarray(file[cells[number - 1][person - 1]])
    return np.ascontiguousarray(array.transpose(2, 1, 0))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
