"""Fixtures shared by all tiers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Warm gloo processes, one set for the whole session."""
    members = Pool()
    yield members
    members.close()
