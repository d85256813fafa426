"""The one distinction that every job makes of its failures: the user can mend it (exit 2), or not (exit 1)."""


class UserError(ValueError):
    """Something the user can mend. The message is one readable line: what, where, remedy. Jobs end with exit code 2."""


class RunError(RuntimeError):
    """Something went wrong that no change of input mends (a dead worker, an unreachable bucket). Exit code 1."""

    retryable = True  # whether starting again from the last checkpoint may help


class Diverged(RunError):
    """A loss that is not a number: the same steps would give it again."""

    retryable = False
