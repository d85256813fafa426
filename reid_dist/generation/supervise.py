"""An engine that is watched: when it answers nobody for too long it is stalled, is restarted, and is asked again.

Engines are started once per worker and closed in order. `ScriptedEngine`s of the tests and vLLM (engine.py) look alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
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

    `stall_s`: seconds in which nobody got an answer, after which the engine counts as stalled; it is restarted, and what
    was under way is asked again. `queue`: most requests inside the engine at a time (0: no bound); the others wait here,
    which is no sign of a stall.
    """

    def __init__(self, make: Callable[[], Engine], stall_s: float, restarts: int = 3, queue: int = 0) -> None:
        self._make, self._stall_s, self._left = make, stall_s, restarts
        self._room = asyncio.Semaphore(queue) if queue else contextlib.nullcontext()
        self._engine: Engine | None = None
        self._number = 0  # of the engine; a request that failed on an older one does not restart the newer
        self._lock = asyncio.Lock()
        self._dead = ""  # why no engine is started any more
        self._waiting: set[asyncio.Timeout] = set()  # one per request inside the engine: how it is told to give up
        self._sign = 0.0  # when somebody last got an answer, or began to wait while nobody did
        self._watch: asyncio.TimerHandle | None = None  # one for all requests, because a request may take only 1 ms
        self.restarted = 0

    async def ready(self) -> None:
        """Start the engine if there is none. Raises UserError, EngineDied."""
        await self._current()

    async def __call__(self, request: Request) -> Reply:
        """Raises BadInput, UserError, EngineDied."""
        async with self._room:
            while True:
                engine, number = await self._current()
                try:
                    return await self._answer(engine, request)
                except BadInput:
                    raise
                except Exception as error:
                    stalled = isinstance(error, TimeoutError)
                    cause = f"no answer in {self._stall_s:.0f} s" if stalled else f"{type(error).__name__}: {error}"
                    await self._restart(number, cause)

    async def _answer(self, engine: Engine, request: Request) -> Reply:
        """Raises TimeoutError when nobody got an answer for too long or the engine was ended meanwhile, and what the engine
        raises.
        """
        async with asyncio.timeout(None) as waiting:
            if not self._waiting:
                self._sign = time.monotonic()
            self._waiting.add(waiting)
            if self._watch is None:
                self._look_at(self._sign + self._stall_s)
            try:
                reply = await engine.generate(request)
            finally:
                self._waiting.discard(waiting)
        self._sign = time.monotonic()
        return reply

    def _look_at(self, due: float) -> None:
        self._watch = asyncio.get_running_loop().call_later(due - time.monotonic(), self._look)

    def _look(self) -> None:
        """Is the engine stalled? If not, look again when it could be."""
        self._watch = None
        due = self._sign + self._stall_s
        if self._waiting and due <= time.monotonic():
            self._give_up()
        elif self._waiting:
            self._look_at(due)

    def _give_up(self) -> None:
        """Whoever waits for the engine waits no longer."""
        for waiting in self._waiting:
            waiting.reschedule(0)
        self._waiting.clear()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

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
            self._give_up()
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
                self._give_up()
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
