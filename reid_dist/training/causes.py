"""Which of the failures that Ray Train collected is the cause, and whether another try may help."""

from __future__ import annotations

from typing import Any

from reid_dist.errors import RunError, UserError
from reid_dist.runs.failures import collateral


def cause_of(error: Any) -> tuple[BaseException, str]:
    """(root cause, its text) of the first failing worker that says something of its own."""
    failures = list(error.worker_failures.values()) or [error]

    def unwrap(failure: BaseException) -> BaseException:
        for name in ("_base_exc", "cause", "__cause__"):
            inner = getattr(failure, name, None)
            if isinstance(inner, BaseException):
                return unwrap(inner)
        return failure

    def order(cause: BaseException) -> int:
        return 0 if isinstance(cause, (UserError, RunError)) else 1 + collateral(text_of(cause))

    first = min(map(unwrap, failures), key=order)
    return first, text_of(first)


def text_of(error: BaseException) -> str:
    """As the last line of a traceback."""
    return f"{type(error).__name__}: {error}"


def end_if_final(cause: BaseException) -> None:
    """Raises `cause` when it is of the kind that comes again: the user can mend it, or the run cannot go on."""
    if isinstance(cause, UserError):
        raise cause
    if isinstance(cause, RunError) and not cause.retryable:
        raise cause


def shortened(text: str) -> str:
    """The telling lines of a failure on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:400] if len(lines) < 4 else f"{lines[0]} ... {lines[-1]}"[:400]
