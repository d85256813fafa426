"""Fixtures of the dist tier."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(scope="package")
def pool() -> Iterator[Pool]:
    """Warm gloo processes, one set for the tier; ended with it, for each holds 1 GB and the end-to-end tests come next."""
    members = Pool()
    yield members
    members.close()
