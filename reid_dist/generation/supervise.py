"""An engine that is watched: a request that takes too long means a stalled engine, which is restarted, and asked again.

Engines are started once per worker and closed in order. `ScriptedEngine`s of the tests and vLLM (engine.py) look alike.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from reid_dist.errors import RunError, UserError
from reid_dist.generation.messages import BadInput, Reply, Request

logger = logging.getLogger(__name__)


class EngineDied(RunError):
    """The engine failed or hung more often than it may be restarted."""


class Engine(Protocol):
    """What answers. `generate` raises BadInput for a request that cannot be answered, anything else when it is ill."""

    async def start(self) -> None: ...
    async def generate(self, request: Request) -> Reply: ...
    async def check(self) -> None:
        """Raises when the engine is ill."""
        ...

    async def close(self) -> None:
        """End with all child processes; may be called twice."""
        ...

    def drop(self) -> None:
        """As `close`, where no event loop runs any more."""
        ...


class Supervised:
    """`Ask` over an engine made by `make`; at most `restarts` restarts in its life.

    `stall_s`: seconds that a request may take before the engine counts as stalled. Requests under way while it is
    restarted fail and are asked again by themselves.
    """

    def __init__(self, make: Callable[[], Engine], stall_s: float, restarts: int = 3) -> None:
        self._make, self._stall_s, self._left = make, stall_s, restarts
        self._engine: Engine | None = None
        self._number = 0  # of the engine; a request that failed on an older one does not restart the newer
        self._lock = asyncio.Lock()
        self._dead = ""  # why no engine is started any more
        self.restarted = 0

    async def __call__(self, request: Request) -> Reply:
        """Raises BadInput, EngineDied."""
        while True:
            engine, number = await self._current()
            try:
                return await asyncio.wait_for(engine.generate(request), self._stall_s)
            except BadInput:
                raise
            except Exception as error:
                cause = "no answer in time" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
                await self._restart(number, cause)

    async def _current(self) -> tuple[Engine, int]:
        async with self._lock:
            if self._dead:
                raise EngineDied(self._dead)
            if self._engine is None:
                self._engine = await self._started()
                self._number += 1
            return self._engine, self._number

    async def _started(self) -> Engine:
        """A new engine that says it is well. Raises UserError as it comes, EngineDied for anything else."""
        engine = self._make()
        try:
            await engine.start()
            await engine.check()
        except UserError:
            await _closed(engine)
            raise
        except Exception as error:
            await _closed(engine)
            self._dead = f"the engine did not start: {type(error).__name__}: {error}"[:500]
            raise EngineDied(self._dead) from error
        return engine

    async def _restart(self, number: int, cause: str) -> None:
        async with self._lock:
            if number != self._number or self._engine is None:
                return  # another request has seen to it
            engine, self._engine = self._engine, None
            await _closed(engine)
            if self._left == 0:
                self._dead = f"the engine was restarted {self.restarted} times and failed again: {cause}"[:500]
                raise EngineDied(self._dead)
            self._left -= 1
            self.restarted += 1
            logger.warning("engine restarts (%s)", cause[:300])

    async def close(self) -> None:
        """End the engine, if there is one."""
        async with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None:
                await _closed(engine)

    def drop(self) -> None:
        """End the engine where no event loop runs any more."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.drop()


async def _closed(engine: Engine) -> None:
    try:
        await asyncio.wait_for(engine.close(), 60)
    except Exception:
        logger.exception("an engine did not close in order")
