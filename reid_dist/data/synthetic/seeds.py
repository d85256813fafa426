"""One random stream per name: what is drawn for an image depends on nothing but its own key.

Datasets specification 8.2: everything comes from (seed, domain, identity, camera, frame), so any image can be rebuilt
alone and in any order, by any number of workers.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(*key: int | str) -> np.random.Generator:
    """The generator of `key`; equal keys give equal draws, other keys independent ones."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
