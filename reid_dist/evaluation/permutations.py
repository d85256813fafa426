"""SYSU-MM01's published draws, `rand_perm_cam.mat`: selection rule (a) of datasets.md 6.4.

The file holds a cell array {camera}{id} of matrices [trials, n], the numbers (from 1) of that folder's files in the
order in which trial t draws them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reid_dist.evaluation.similarity import EvaluationError

NAME = "rand_perm_cam"


def read_permutations(path: str | Path) -> dict[tuple[int, int], np.ndarray]:
    """{(camera, pid): int64 [trials, n]}, cameras and ids from 1, for `protocols.select`.

    Raises EvaluationError: no such file, not a MATLAB 5 file, another variable, something else than whole numbers.
    """
    from scipy import io

    try:
        content = io.loadmat(str(path))
    except FileNotFoundError:
        raise EvaluationError(f"{path}: no such file") from None
    except (ValueError, TypeError, OSError, NotImplementedError) as error:  # the last: MATLAB 7.3, which is HDF5
        raise EvaluationError(f"{path}: not a MATLAB 5 file ({error})") from error
    if NAME not in content or content[NAME].dtype != object:
        there = sorted(name for name in content if not name.startswith("__"))
        raise EvaluationError(f"{path}: expected the cell array {NAME}, there is {there}")
    found: dict[tuple[int, int], np.ndarray] = {}
    for camera, ids in enumerate(content[NAME].ravel(), 1):
        for pid, matrix in enumerate(np.asarray(ids).ravel() if np.size(ids) else [], 1):
            if not np.size(matrix):
                continue  # that camera never saw this id
            values = np.asarray(matrix)
            if values.ndim != 2 or values.dtype.kind not in "iuf" or (values != np.floor(values)).any():
                raise EvaluationError(
                    f"{path}: camera {camera}, id {pid} holds {values.dtype} {values.shape}, expected whole [trials, n]"
                )
            found[camera, pid] = values.astype(np.int64)
    if not found:
        raise EvaluationError(f"{path}: {NAME} is empty")
    return found
