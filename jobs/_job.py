"""What every entry point does the same: logging, signals, exit codes, and the record on the last line of stdout.

Exit 0: done. Exit 2: the user's input was wrong, one readable line says what, where and the remedy. Exit 1: anything else.
The record is one JSON object; it is also stored beside the run (`record_in`), with its exit code, because `ray job submit`
prints after the log and turns every failure into exit 1.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from reid_dist.errors import RunError, UserError
from reid_dist.runs.redact import redact

logger = logging.getLogger("reid_dist.jobs")
OURS = ("reid_dist", "jobs", "tuning")


class Terminated(RunError):
    """SIGTERM or Ctrl-C ended the job before it was done."""


_store_record: list[Callable[[dict[str, Any]], None]] = []


def record_in(store: Callable[[dict[str, Any]], None]) -> None:
    """From now on the record of this job is also given to `store` (a run's write_record), whatever the outcome."""
    _store_record[:] = [store]


def finish_record(record: dict[str, Any]) -> None:
    """Give `record` to the current store now, and nothing more: a job of several runs goes on with the next one."""
    for store in _store_record:
        store({**record, "exit_code": 0})
    _store_record.clear()


class _Redacting(logging.Formatter):
    """Log lines without secrets: Ray keeps a job's stderr and shows it to everybody who may look at the cluster."""

    def format(self, record: logging.LogRecord) -> str:
        return str(redact(super().format(record)))


def set_up_logging() -> None:
    """One line per event on stderr; REID_LOG sets the level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    level = os.environ.get("REID_LOG", "INFO").upper()
    logging.basicConfig(level=level, handlers=[handler])
    # A private Ray cluster lifts the root's level (jobs/_cluster.py): without levels of their own these would fall silent.
    for ours in OURS:
        logging.getLogger(ours).setLevel(level)
    for noisy in ("botocore", "boto3", "urllib3", "s3transfer", "filelock", "matplotlib", "PIL", "fsspec", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def run_job(verb: str, main: Callable[[list[str]], dict[str, Any]]) -> NoReturn:
    """Run `main(argv)`, print its record as the last line of stdout, store it, and exit."""
    set_up_logging()
    signal.signal(signal.SIGTERM, _terminate)
    started = time.time()
    record: dict[str, Any] = {"job": verb}
    try:
        record |= main(sys.argv[1:])
        record["exit_code"] = int(record.get("exit_code", 0))
    except UserError as error:
        record |= {"exit_code": 2, "error": _one_line(error)}
    except (Terminated, KeyboardInterrupt) as error:
        record |= {"exit_code": 1, "error": _one_line(error) or "interrupted"}
    except RunError as error:
        record |= {"exit_code": 1, "error": _one_line(error)}
    except BrokenPipeError:
        record["exit_code"] = 1
    except Exception as error:
        logger.exception("unexpected failure")
        record |= {"exit_code": 1, "error": f"{type(error).__name__}: {_one_line(error)}"}
    record.setdefault("seconds", round(time.time() - started, 1))
    _finish(verb, record)


def _finish(verb: str, record: dict[str, Any]) -> NoReturn:
    record = redact(record)
    for store in _store_record:
        try:
            store(record)
        except (RunError, UserError, OSError) as error:
            logger.error("the record could not be stored: %s", _one_line(error))
    if "error" in record:
        sys.stderr.write(f"\n{verb}: {record['error']}\n")  # a progress bar may have left its line open
    sys.stderr.flush()
    print(json.dumps(record, default=str), flush=True)
    sys.exit(record["exit_code"])


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(f"ended by signal {signal.Signals(signum).name}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def split_words(argv: list[str], usage: str) -> tuple[list[str], list[str], set[str]]:
    """(positional words, key=value words, --flags). `--help` prints `usage` and exits 0."""
    if "-h" in argv or "--help" in argv:
        sys.stderr.write(usage.strip() + "\n")
        sys.exit(0)
    flags = {word for word in argv if word.startswith("--")}
    values = [word for word in argv if not word.startswith("--") and "=" in word and not word.split("=")[0].count("/")]
    words = [word for word in argv if word not in flags and word not in values]
    return words, values, flags


def refuse_unknown_flags(flags: set[str], known: set[str], usage: str) -> None:
    """Raises UserError for a --flag that the job does not have."""
    unknown = sorted(flags - known)
    if unknown:
        raise UserError(
            f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known)) or 'none'}. {usage.strip().splitlines()[0]}"
        )
