"""What a dialogue says to a model and what comes back: plain records, the same for vLLM and for a script.

A dialogue is a pure coroutine over `Ask`: it renders a versioned prompt, awaits the reply, parses it and decides. It
knows no engine, no storage and no clock, so it is tested to the letter without a model (methods/icl.md section 7).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Finish = Literal["stop", "length", "abort"]
Status = Literal["ok", "partial", "fallback", "error"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; retries draw with a seed of their own."""

    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One user turn. `schema`: a JSON schema that decoding must follow; `choice`: the only texts allowed."""

    text: str
    sampling: Sampling
    image: bytes | None = None  # encoded (JPEG, PNG, ...)
    schema: Mapping[str, Any] | None = None
    choice: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said. `finish` "length": cut off at max_tokens."""

    text: str
    finish: Finish = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


Ask = Callable[[Request], Awaitable[Reply]]


class BadInput(ValueError):
    """This one row cannot be asked about (unreadable image, prompt beyond the context): an error row, never a retry of
    the engine."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage made of one input. `value` is plain JSON; None for status "error".

    "partial" (fewer answers than wanted) and "fallback" (the rule that stands in for the model) are usable.
    """

    value: Any
    status: Status = "ok"
    reason: str = ""  # why it is not "ok"
    replies: tuple[Reply, ...] = field(default=())

    @property
    def attempts(self) -> int:
        """Calls that were made."""
        return len(self.replies)
