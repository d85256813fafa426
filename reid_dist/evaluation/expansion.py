"""Query expansion: a query moves towards its nearest gallery items, and the gallery is searched again.

Average query expansion (Chum et al., ICCV 2007) with weights of the power alpha (Radenovic et al., TPAMI 2018); alpha 0
is the plain average. It looks at the whole gallery, so label such results "QE" and keep k and alpha in the record.
"""

from __future__ import annotations

import numpy as np

from reid_dist.evaluation.neighbours import nearest
from reid_dist.evaluation.similarity import Array, EvaluationError, host


def expand_queries(
    query: Array, gallery: Array, *, k: int = 5, alpha: float = 3.0, memory_mb: float = 64.0
) -> np.ndarray:
    """Unit-length queries float32 [Q, D]: (q + sum over the k nearest of max(cos, 0)^alpha g), normalised.

    Raises EvaluationError: k < 1, alpha < 0, features as `combine`.
    """
    if alpha < 0:
        raise EvaluationError(f"alpha={alpha}: expected 0 or more")
    found = nearest(query, gallery, k, memory_mb=memory_mb)
    weight = np.maximum(found.score, 0.0) ** alpha
    q, g = _unit(host(query)), host(gallery)
    for place in range(found.index.shape[1]):
        q += weight[:, place, None] * _unit(g[found.index[:, place]])
    return _unit(q)


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    unit: np.ndarray = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit
