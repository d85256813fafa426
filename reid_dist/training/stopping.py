"""A request to stop, on its way from the driver to rank 0: through the run in storage, which both can reach."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from reid_dist.errors import RunError
from reid_dist.runs import Run

logger = logging.getLogger(__name__)

STOP_POLL_S = 2.0  # how often rank 0 looks for a request to stop


def stoppable(call: Callable[[], Any], run: Run) -> Any:
    """Run Ray's fit beside the main thread, which stays free for signals (Ray's own Ctrl-C handler would kill the workers).

    The first interrupt asks the workers of `run` to stop with a checkpoint, a second one is raised.
    """
    box: dict[str, Any] = {}
    done = threading.Event()

    def target() -> None:
        try:
            box["value"] = call()
        except BaseException as error:
            box["error"] = error
        finally:
            done.set()

    threading.Thread(target=target, name="ray-train-fit", daemon=True).start()
    asked = False
    while not done.is_set():
        try:
            time.sleep(0.5)  # not Thread.join: interrupted by a signal it may take the thread for ended
        except (KeyboardInterrupt, RunError) as interrupt:
            if asked:
                raise
            asked = True
            logger.warning("%s: asking the workers to checkpoint and stop", str(interrupt) or "interrupted")
            run.request_stop(str(interrupt) or "interrupted")
    if "error" in box:
        raise box["error"]
    return box["value"]


@contextlib.contextmanager
def stop_watch(run: Run, rank: int) -> Iterator[threading.Event]:
    """On rank 0: an event that is set once somebody asked this attempt to stop (`Run.request_stop`)."""
    wanted, closing = threading.Event(), threading.Event()

    def watch() -> None:
        while not closing.wait(STOP_POLL_S):
            with contextlib.suppress(RunError):
                if run.stop_requested():
                    wanted.set()
                    return

    thread = threading.Thread(target=watch, name="stop-watch", daemon=True)
    if rank == 0:
        thread.start()
    try:
        yield wanted
    finally:
        closing.set()
        if thread.is_alive():
            thread.join(timeout=5)
