"""What a failure of the workers says, and when the same one again means that another try would not help."""

from __future__ import annotations

import re
from typing import Any

import pytest

from reid_dist.runs.failures import Failure, collateral, explain, signature
from reid_dist.training.watchdog import standing

GLOO = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:31337"


def note(kind: str, rank: int, step: int, time: float, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "rank": rank, "step": step, "time": time, "start": 1, **more}


def raised(value: int, deeper: bool = False) -> BaseException:
    try:
        if deeper:
            int("x")
        raise ValueError(f"bad value {value}")
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    "text",
    [
        GLOO,
        "ActorDiedError: The actor died unexpectedly before finishing this task.",
        "DistBackendError: NCCL error: remote process exited",
        "PreemptionError: Training was interrupted by node preemption",
    ],
)
def test_deaths_are_no_faults_of_the_code_and_never_repeat(text: str) -> None:
    assert collateral(text)
    assert not explain([], text, 8).repeats(explain([], text, 8))


def test_same_traceback_at_the_same_step_repeats_and_nothing_else_does() -> None:
    def failure(step: int, trace: str) -> Failure:
        notes = [
            note("failure", 1, step, 2.0, error="ValueError: bad value 3", trace=trace),
            note(
                "failure", 0, step, 1.0, error=GLOO, trace="of the other"
            ),  # first by the clock, but of the other's death
        ]
        return explain(notes, "what Ray says", 4)

    first = failure(7, signature(raised(3)))
    assert first.text == "rank 1 at step 7: ValueError: bad value 3"
    assert failure(7, signature(raised(4))).repeats(first)  # its message may carry a value that differs
    assert not failure(9, signature(raised(3))).repeats(first)
    assert not failure(7, signature(raised(3, deeper=True))).repeats(first)
    assert not first.repeats(None)


def test_an_error_that_no_rank_noted_repeats_by_its_text() -> None:
    first = explain([], "ImportError: cannot load libx.so in process 4711", 0)
    assert explain([], "ImportError: cannot load libx.so in process 4802", 0).repeats(first)
    assert not explain([], "ImportError: cannot load libx.so in process 4802", 5).repeats(first)


def test_a_hang_names_the_rank_that_nobody_waits_with() -> None:
    stacks = "logs/attempt-0001/stacks-rank-1.1.txt"
    notes = [
        note("hang", 0, 6, 1.0, seconds=10.0, waiting=True, where="in all_reduce (c10d.py:1)", stacks="other"),
        note("hang", 1, 6, 2.0, seconds=10.0, waiting=False, where="in load (store.py:9)", stacks=stacks),
    ]
    failure = explain(notes, "ActorDiedError", 4)
    assert "rank 1 stopped answering in load (store.py:9): no progress for 10 s after step 6" in failure.text
    assert f"stacks of ranks 0, 1 are in {stacks}" in failure.text
    assert failure.step == 6
    assert not failure.repeats(failure)
    assert "all ranks wait" in explain(notes[:1], "ActorDiedError", 4).text


STACK = """process 7, state S (sleeping)
Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/x/reid_dist/training/launch.py", line 355 in watch

Current thread 0x00007f02 (most recent call first):
  File "/venv/torch/distributed/distributed_c10d.py", line 2942 in all_reduce
  File "/venv/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/x/reid_dist/training/loop.py", line 180 in _run_epoch
  File "/x/reid_dist/training/launch.py", line 216 in _worker
"""


def test_where_a_rank_stands_is_read_from_its_training_thread() -> None:
    assert standing(STACK) == (True, "in all_reduce (distributed_c10d.py:2942)")
    called = (
        STACK + '  File "/venv/ray/train/v2/_internal/execution/thread_runner.py", line 90 in run\n'
    )  # so is every rank
    own = re.sub(r".*torch/distributed.*\n", "", called)
    assert standing(own) == (False, "in _run_epoch (loop.py:180)")
    assert standing(STACK.replace("S (sleeping)", "T (stopped)")) == (False, "because its process was stopped")
    assert standing("process 7, state D (disk sleep)\nno stack was written\n")[0] is False
