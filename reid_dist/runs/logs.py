"""Logs that outlive the cluster: every process of a run writes to a local file that is copied into the run every minute
and at its end."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from reid_dist.errors import RunError
from reid_dist.runs.redact import redact
from reid_dist.runs.run import Run
from reid_dist.runs.scratch import Scratch
from reid_dist.storage import Store, check_name

logger = logging.getLogger(__name__)

SHIP_EVERY_S = 60.0


class _Redacting(logging.Formatter):
    """Log lines without secrets; times in UTC, so that the logs of several hosts can be read together."""

    converter = staticmethod(time.gmtime)  # type: ignore[assignment]

    def format(self, record: logging.LogRecord) -> str:
        return str(redact(super().format(record)))


class LogShipper:
    """Copies one growing local file to `key` every SHIP_EVERY_S seconds, in a thread of its own, until closed."""

    def __init__(self, store: Store, key: str, path: Path) -> None:
        self._store, self._key, self._path = store, key, path
        self._sent = -1
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="log-shipper", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while not self._closing.wait(SHIP_EVERY_S):
            self.ship()

    def ship(self) -> None:
        """Copy what is new. A failure is logged and made good next time: a log must never end a run."""
        size = os.path.getsize(self._path)
        if size == self._sent:
            return
        try:
            self._store.write(self._key, self._path.read_bytes())
            self._sent = size
        except (RunError, OSError) as error:
            logger.warning("log %s could not be stored: %s", self._key, error)

    def close(self) -> None:
        """Stop the thread and copy the rest."""
        self._closing.set()
        self._thread.join(timeout=30)
        self.ship()


@contextlib.contextmanager
def ship_logs(run: Run, name: str) -> Iterator[None]:
    """Everything logged inside goes to logs/attempt-0001/<name>.log of the run too, the error that ends it included.

    A process that starts again within an attempt gets <name>.2.log, and so on: nothing is overwritten.
    """
    folder = f"logs/attempt-{run.attempt:04d}"
    taken = {entry.key for entry in run.store.list(f"{folder}/{check_name(name)}.")}
    numbers = [f"{folder}/{name}.log", *(f"{folder}/{name}.{n}.log" for n in range(2, len(taken) + 2))]
    key = next(candidate for candidate in numbers if candidate not in taken)
    with Scratch("log") as local:
        path = local / "log"
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(_Redacting("%(asctime)sZ %(levelname)s %(name)s: %(message)s"))
        root, ours = logging.getLogger(), logging.getLogger("reid_dist")
        root.addHandler(handler)
        level = ours.level
        if ours.getEffectiveLevel() > logging.INFO:  # a Ray worker's root logger passes warnings only
            ours.setLevel(logging.INFO)
        logger.info(
            "%s of attempt %d on %s, process %d, run %s",
            name, run.attempt, os.uname().nodename, os.getpid(), run.uri.rpartition("/")[2],
        )  # fmt: skip
        shipper = LogShipper(run.store, key, path)
        try:
            yield
        except BaseException as error:
            # Into the run's log alone: the caller reports it to the user in its own way.
            record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "ended by %s", (type(error).__name__,),
                                       (type(error), error, error.__traceback__))  # fmt: skip
            handler.handle(record)
            raise
        finally:
            root.removeHandler(handler)
            ours.setLevel(level)
            handler.close()
            shipper.close()
