"""Scripted engines: what answers in unit tests of generation, in place of vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from reid_dist.generation.messages import Reply, Request


class ScriptedEngine:
    """Answers by a function of the request. `hang` and `fail` name calls (from 0, over the life of `calls`) that never
    answer, or raise.
    """

    def __init__(
        self, answer: Callable[[Request], str], calls: list[Request], hang: set[int] = frozenset(), fail: set[int] = frozenset()
    ) -> None:  # fmt: skip
        self.answer, self.calls, self.hang, self.fail = answer, calls, hang, fail
        self.started = self.closed = 0

    async def start(self) -> None:
        self.started += 1

    async def generate(self, request: Request) -> Reply:
        number = len(self.calls)
        self.calls.append(request)
        await asyncio.sleep(0)
        if number in self.hang:
            await asyncio.sleep(3600)
        if number in self.fail:
            raise RuntimeError("the engine broke")
        text = self.answer(request)
        return Reply(text, prompt_tokens=len(request.text.split()), completion_tokens=len(text.split()))

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        self.drop()

    def drop(self) -> None:
        self.closed += 1
