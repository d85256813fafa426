"""Connecting to Ray: the cluster that RAY_ADDRESS names (as under `ray job submit`), else a private one on this machine.

The private one has its own temp folder, loopback address, ports and token, so that several of them, and foreign Ray
processes, live beside each other; it ends with the job. Nothing here ever calls `ray stop`, which would kill every Ray
process of the machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

QUIET = {
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative folder means the same on a worker as in the terminal
}

PRIVATE = {
    # Nobody drains the one machine of a private cluster, and each of Ray Train's actors imports torch: 7 s of CPU less.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A worker waits at the end of its epoch until Ray Train took the last report, which it does at this interval (Ray's: 2 s).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


@contextlib.contextmanager
def connect(num_cpus: float | None = None) -> Iterator[None]:
    """A Ray connection for the length of a job. `num_cpus` sizes a private cluster (default: what the machine has).

    A private cluster may be told more CPUs than there are, so that a job's fixed parts (drivers, two workers) fit on a laptop.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    # Ray turns token authentication on by itself only sometimes; said explicitly, and before Ray is imported: it reads the
    # mode then.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        yield
        return
    # ray.init replaces the process's SIGTERM handler by one that exits at once, without a checkpoint or a record.
    ours = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.WARNING)
        signal.signal(signal.SIGTERM, ours)
        try:
            yield
        finally:
            ray.shutdown()
        return
    folder = Path(tempfile.mkdtemp(prefix="reid-ray-", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    for key, value in PRIVATE.items():
        os.environ.setdefault(key, value)
    saved = os.environ.get("RAY_AUTH_TOKEN_PATH")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    _reread_environment()
    try:
        _start_private(folder, max(1, round(num_cpus or os.cpu_count() or 1)))
        signal.signal(signal.SIGTERM, ours)
        logger.info("private Ray cluster started (%s)", folder)
        yield
    finally:
        ray.shutdown()
        if saved is None:
            del os.environ["RAY_AUTH_TOKEN_PATH"]
        else:
            os.environ["RAY_AUTH_TOKEN_PATH"] = saved
        _reread_environment()
        shutil.rmtree(folder, ignore_errors=True)


def _start_private(folder: Path, cpus: int) -> None:
    """Ray gives its own processes 30 s to come up, which they exceed on a busy machine: up to three tries."""
    import ray

    for tries_left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                logging_level=logging.WARNING,
                object_store_memory=256 * 1024**2,
                _temp_dir=str(folder),
                # A job that somebody waits for, not a guest (Ray's default is 15).
                _system_config={"worker_niceness": 0},
                _node_ip_address="127.0.0.1",
                # A private cluster has no dashboard, so Ray Train's clean-up actor cannot ask the state API and would say
                # so every second; our own loggers set their levels themselves.
                logging_config=ray.LoggingConfig(log_level="ERROR"),
            )
            return
        except Exception as error:
            if tries_left == 0 or "timed out during startup" not in str(error):
                raise
            logger.warning("this machine is busy: Ray did not come up in time, trying again")
            ray.shutdown()


def _reread_environment() -> None:
    """Ray's C++ side read the authentication mode when it was imported and keeps the token it read last."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
