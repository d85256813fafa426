"""What holds for all tiers: one thread of BLAS per process."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
