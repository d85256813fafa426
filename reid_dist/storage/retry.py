"""Bounded retries: exponential backoff with full jitter, until the tries or the total time are used up."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from reid_dist.storage.base import StorageError

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a request is tried. The defaults outlast a short outage and end an unreachable bucket within two
    minutes.
    """

    tries: int = 8
    base_s: float = 0.2  # first wait at most; doubles
    cap_s: float = 15.0
    deadline_s: float = 120.0
    connect_s: float = 10.0
    read_s: float = 30.0  # silence on the socket


def retry(call: Callable[[], T], what: str, policy: RetryPolicy, worth: Callable[[Exception], str | None]) -> T:
    """`call()` until it returns. `worth(error)` gives the readable cause of an error worth another try, None for any
    other.

    Errors not worth it are raised as they are; when tries or deadline are used up, StorageError with `what` and the
    last cause.
    """
    started = time.monotonic()
    for number in range(1, policy.tries + 1):
        try:
            return call()
        except Exception as error:
            cause = worth(error)
            if cause is None:
                raise
            pause = random.uniform(0, min(policy.cap_s, policy.base_s * 2 ** (number - 1)))
            spent = time.monotonic() - started
            if number == policy.tries or spent + pause > policy.deadline_s:
                raise (
                    type(error)(f"{what}: {cause} ({number} tries in {spent:.0f} s)")
                    if isinstance(error, StorageError)
                    else StorageError(f"{what}: {cause} ({number} tries in {spent:.0f} s)")
                ) from None
            logger.info("%s: %s; try %d of %d", what, cause, number + 1, policy.tries)
            time.sleep(pause)
    raise StorageError(f"{what}: no try was allowed")
