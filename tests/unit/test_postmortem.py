"""`jobs.postmortem` on runs told by hand: who failed first, in which order, from storage alone."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.postmortem import main, parse, stamp
from reid_dist.errors import UserError
from reid_dist.runs import Run, ship_logs
from tests.s3server import s3  # noqa: F401 - the fixture
from tests.unit.test_runs import start

T0 = 1_795_000_000.0  # an hour ago or in a year: only differences matter
GLOO = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:4711"


def log(run: Run, name: str, *lines: tuple[float, str, str]) -> None:
    """Store a log; a line is (seconds after T0, level, text)."""
    text = "".join(f"{_utc(T0 + after)}Z {level} reid_dist.x: {words}\n" for after, level, words in lines)
    run.store.write(f"logs/attempt-{run.attempt:04d}/{name}.log", text.encode())


def _utc(moment: float) -> str:
    return stamp(moment).replace(".", ",")


def ended(after: float, kind: str, message: str) -> tuple[float, str, str]:
    return (
        after,
        "ERROR",
        f'ended by {kind}\nTraceback (most recent call last):\n  File "a.py", line 1, in b\n{message}',
    )


@pytest.fixture(params=["folder", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    place = str(tmp_path / "runs") if request.param == "folder" else request.getfixturevalue("s3").uri
    return start(f"{place}/r1")


def causes(run: Run) -> Sequence[tuple[int, int, int | None]]:
    return [(f["attempt"], f["start"], f["rank"]) for f in main([run.uri])["failures"]]


def test_rank_with_an_error_of_its_own_before_those_that_died_of_it(run: Run) -> None:
    log(run, "rank-0", (1, "INFO", "rank-0 begins"), ended(8.5, "RuntimeError", GLOO))
    log(run, "rank-1", (1, "INFO", "rank-1 begins"), ended(9, "OSError", "OSError: [Errno 28] No space left on device"))
    run.note_restart(reason="OSError", step=4)
    record = main([run.uri])
    first = record["first_failing"]
    assert (first["rank"], first["certain"]) == (1, True)
    assert first["cause"] == "OSError: [Errno 28] No space left on device"
    assert first["utc"] == stamp(T0 + 9)


def test_rank_that_fell_silent_is_the_first_when_others_died_of_its_absence(run: Run) -> None:
    log(run, "rank-0", (1, "INFO", "a"), (5, "INFO", "step 5"), ended(8.5, "RuntimeError", GLOO))
    log(run, "rank-1", (1, "INFO", "a"), (4, "INFO", "step 4"))
    log(run, "rank-2", (1, "INFO", "a"), (5, "INFO", "step 5"), ended(8.6, "RuntimeError", GLOO))
    run.note_restart(reason="ActorDiedError", step=4)
    first = main([run.uri])["first_failing"]
    assert (first["rank"], first["certain"]) == (1, True)
    assert "fell silent" in first["cause"]
    assert "step 4" in first["cause"]


def test_every_start_of_the_workers_is_told_apart(run: Run) -> None:
    for number, rank in ((1, 0), (2, 1)):
        suffix = "" if number == 1 else ".2"
        for name in (0, 1):
            end = (
                ended(10 * number, "ValueError", "ValueError: own")
                if name == rank
                else ended(10 * number + 1, "RuntimeError", GLOO)
            )
            log(run, f"rank-{name}{suffix}", (10 * number - 5, "INFO", "begins"), end)
        run.note_restart(reason="x", step=number)
    log(run, "rank-0.3", (30, "INFO", "begins"), (31, "INFO", "done"))
    log(run, "rank-1.3", (30, "INFO", "begins"), (31, "INFO", "done"))
    run.write_record({"exit_code": 0})
    assert causes(run) == [(1, 1, 0), (1, 2, 1)]
    assert main([run.uri])["status"] == "done"


def test_ranks_that_left_no_word_are_told_by_the_driver(run: Run) -> None:
    log(run, "rank-0", (1, "INFO", "begins"))
    log(run, "rank-1", (1, "INFO", "begins"))
    run.note_restart(reason="the node died unexpectedly", step=0)
    first = main([run.uri])["first_failing"]
    assert (first["rank"], first["certain"], first["cause"]) == (None, False, "the node died unexpectedly")


def test_a_hang_is_told_by_the_watchdog(run: Run) -> None:
    log(run, "rank-0", (1, "INFO", "begins"))
    log(run, "rank-1", (1, "INFO", "begins"))
    key = "logs/attempt-0001/stacks-rank-{}.1.txt"
    for rank, waiting in ((0, True), (1, False)):
        facts = {"start": 1, "step": 7, "seconds": 300.0, "stacks": key.format(rank), "where": f"in f{rank} (x.py:1)"}
        run.note("hang", rank=rank, waiting=waiting, **facts)
        run.store.write(key.format(rank), b"...")
    run.note_restart(reason="rank 1 stopped answering in f1 (x.py:1)", step=6)
    record = main([run.uri])
    first = record["first_failing"]
    assert (first["rank"], first["certain"], first["cause"]) == (1, True, "rank 1 stopped answering in f1 (x.py:1)")
    told = " | ".join(event["what"] for event in record["timeline"])
    assert "rank 0 hangs after step 7: waits for the others in f0 (x.py:1)" in told
    assert "rank 1 hangs after step 7: stands in f1 (x.py:1); logs/attempt-0001/stacks-rank-1.1.txt" in told
    assert record["notices"] == []


def test_healthy_and_stopped_runs_name_nobody(run: Run) -> None:
    log(run, "rank-0", (1, "INFO", "begins"), (2, "INFO", "done"))
    assert main([run.uri])["first_failing"] is None
    run.request_stop("Ctrl-C")
    run.write_record({"exit_code": 1, "error": "interrupted"})
    record = main([run.uri])
    assert record["first_failing"] is None
    assert any("asked to stop: Ctrl-C" in event["what"] for event in record["timeline"])


def test_one_time_line_of_all_that_is_stored(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.note_checkpoint("checkpoints/step-00000004", 4, {}, 12_000_000)
    run.note("drain", node="abc", deadline_s=30)
    run.describe(hosts=2)
    log(run, "driver", (-50, "INFO", "driver begins"), (60, "WARNING", "failure 1, continuing from step 4"))
    log(run, "rank-0", (-40, "INFO", "rank begins"), (-30, "INFO", "between"), (-20, "INFO", "last"))
    run.store.write("logs/attempt-0001/stacks.txt", b"...")
    with caplog.at_level(logging.INFO):
        record = main([run.uri])
    times = [event["time"] for event in record["timeline"]]
    assert times == sorted(times)
    told = " | ".join(f"{event['who']}: {event['what']}" for event in record["timeline"])
    for wanted in ("attempt begins on", "checkpoint of step 4 committed, 12.0 MB", 'drain {"node": "abc", "deadline_s": 30}',
                   "driver: log begins: driver begins", "driver: warning: failure 1", "rank 0: last line: last"):  # fmt: skip
        assert wanted in told
    assert "between" not in told
    assert "hosts" not in told
    assert any("stacks.txt" in notice for notice in record["notices"])
    assert "checkpoint of step 4 committed" in caplog.text


def test_a_clock_that_runs_ahead_is_noticed(run: Run) -> None:
    now = time.time() - T0
    log(run, "rank-0", (now + 3600, "INFO", "from the future"))
    log(run, "rank-1", (now - 60, "INFO", "behind or late: cannot be told"))
    (notice,) = main([run.uri])["notices"]
    assert "rank 0" in notice
    ahead = re.search(r"(\d+) s ahead", notice)
    assert ahead
    assert int(ahead[1]) == pytest.approx(3600, abs=30)  # the test itself takes a moment


def test_damaged_objects_do_not_hide_the_rest(run: Run) -> None:
    run.store.write("attempts/0001-end.json", b"{torn")
    run.store.write(
        "logs/attempt-0001/rank-0.log",
        b"\xff\xfe no date\n" + f"{_utc(T0)}Z ERROR x: ended by ValueError\nValueError: v\n".encode(),
    )
    assert main([run.uri])["first_failing"]["cause"] == "ValueError: v"


def test_logs_are_read_as_they_are_written(run: Run) -> None:
    """The format of `ship_logs`, not a copy of it."""
    with pytest.raises(ZeroDivisionError), ship_logs(run, "rank-1"):
        _ = 1 // 0
    with ship_logs(run, "rank-0"):
        logging.getLogger("reid_dist").warning("look out")
    first = main([run.uri])["first_failing"]
    assert (first["rank"], first["certain"]) == (1, True)
    assert first["cause"].startswith("ZeroDivisionError")
    assert abs(first["time"] - time.time()) < 60


def test_records_that_continue_over_lines() -> None:
    text = "torn beginning\n2026-11-20 17:00:00,250Z ERROR a.b: one\n two\n2026-11-20 17:00:01,000Z INFO a: three\n"
    assert list(parse(text)) == [(1795194000.25, "ERROR", "one\n two"), (1795194001.0, "INFO", "three")]


@pytest.mark.parametrize("words", [[], ["a", "b"], ["nowhere/run"], ["r", "x=1"]])
def test_wrong_words(words: list[str]) -> None:
    with pytest.raises(UserError):
        main(words)


def test_record_can_be_written_as_json(run: Run) -> None:
    run.note_restart(reason="x", step=1)
    json.dumps(main([run.uri]))
