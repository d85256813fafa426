"""Evaluator beside a textbook implementation: CPU seconds and added peak memory, one thread, each run in its own child
process.

    python -m tests.bench.bench_evaluation [market text msmt17 rerank rerank-market]

Features are class centres plus noise (512-d, float32), so that ranks spread as those of a half-trained model; sizes are
those of the data sets. "Added" is the process's high-water mark above its level just before the call, features
excluded. The MSMT17 size runs under an address-space limit of 8 GB; there the textbook code is also timed on an eighth
of the queries, because the whole does not fit. The last line is one JSON record.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CAP = 8 * 10**9


@dataclass(frozen=True)
class Case:
    queries: int
    gallery: int
    ids: int
    cameras: int  # 0: no camera rule
    distractors: float  # share of the gallery that belongs to nobody
    target_s: float
    target_mb: float
    noise: float = 2.8
    kind: str = "rank"
    cap: int | None = None


CASES = {
    "market": Case(3368, 15913, 750, 6, 0.17, 2.0, 120),
    "text": Case(6156, 3074, 1000, 0, 0.0, 0.5, 50),
    "msmt17": Case(11659, 82161, 3060, 15, 0.0, 43.0, 300, cap=CAP),
    "rerank": Case(1000, 8000, 750, 6, 0.17, 2.3, 500, kind="rerank"),
    "rerank-market": Case(3368, 15913, 750, 6, 0.17, 12.0, 800, kind="rerank"),
}


def world(case: Case, share: float = 1.0) -> tuple[np.ndarray, ...]:
    """(query, gallery, q_pid, g_pid, q_cam, g_cam)."""
    rng = np.random.default_rng(0)
    centre = rng.standard_normal((case.ids, 512), dtype=np.float32)
    nobody = rng.standard_normal((int(case.gallery * case.distractors), 512), dtype=np.float32)
    q_pid = rng.integers(0, case.ids, int(case.queries * share))
    g_pid = rng.integers(0, case.ids, case.gallery)
    where = centre[g_pid]
    alone = rng.permutation(case.gallery)[: len(nobody)]
    g_pid[alone], where[alone] = case.ids, nobody
    q_cam, g_cam = (rng.integers(0, max(case.cameras, 1), len(pid)) for pid in (q_pid, g_pid))
    query = centre[q_pid] + case.noise * rng.standard_normal((len(q_pid), 512), dtype=np.float32)
    where += case.noise * rng.standard_normal(where.shape, dtype=np.float32)
    return query, where, q_pid, g_pid, q_cam, g_cam


def ours(case: Case, share: float) -> Callable[[], dict[str, Any]]:
    from reid_dist.evaluation.ranking import Labels, Scoring, rank_blocks, rank_features
    from reid_dist.evaluation.rerank import KReciprocal

    query, gallery, q_pid, g_pid, q_cam, g_cam = world(case, share)
    labels = Labels(q_pid, q_cam), Labels(g_pid, g_cam)
    scoring = Scoring(same_camera=case.cameras > 0)

    def run() -> dict[str, Any]:
        if case.kind == "rank":
            return rank_features(query, gallery, *labels, scoring).record()
        return rank_blocks((-block for block in KReciprocal(query, gallery).blocks()), *labels, scoring).record()

    return run


def theirs(case: Case, share: float) -> Callable[[], dict[str, Any]]:
    from tests.bench import textbook

    query, gallery, q_pid, g_pid, q_cam, g_cam = world(case, share)
    cameras = (q_cam, g_cam) if case.cameras else (None, None)

    def run() -> dict[str, Any]:
        if case.kind == "rank":
            return textbook.rank(query, gallery, q_pid, g_pid, *cameras)
        return textbook.rank_distance(textbook.rerank(query, gallery), q_pid, g_pid, *cameras)

    return run


def child(pipe: Any, make: Callable[[Case, float], Callable[[], Any]], case: Case, share: float, warm: Case) -> None:
    """Measure in a fresh process; a run out of memory is a result too."""
    run = make(case, share)
    make(warm, 1.0)()  # imports and the BLAS buffer are nobody's cost
    if case.cap:
        resource.setrlimit(resource.RLIMIT_AS, (case.cap, case.cap))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the high-water mark so far
    before, start = status("VmRSS"), os.times()
    try:
        record = run()
    except MemoryError:
        pipe.send({"out_of_memory": True})
        return
    end = os.times()
    seconds = end.user + end.system - start.user - start.system
    metrics = {key: round(record[key], 6) for key in ("rank1", "mAP", "mINP")}
    pipe.send({"cpu_s": round(seconds, 3), "added_mb": round((status("VmHWM") - before) / 1024, 1), **metrics})


def status(field: str) -> int:
    """KiB of a field of this process's status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def measure(make: Callable[..., Any], case: Case, share: float = 1.0, runs: int = 1) -> dict[str, Any]:
    """Best CPU time of `runs` child processes."""
    warm = Case(64, 512, 20, case.cameras, 0.0, 0, 0, kind=case.kind)
    results = []
    for _ in range(runs):
        context = multiprocessing.get_context("spawn")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(send, make, case, share, warm))
        process.start()
        send.close()
        try:
            results.append(receive.recv())
        except EOFError:
            results.append({"died": True})
        process.join()
    return min(results, key=lambda result: result.get("cpu_s", float("inf")))


def main(names: list[str]) -> None:
    record: dict[str, Any] = {}
    for name in names or list(CASES):
        case = CASES[name]
        line = {"ours": measure(ours, case, runs=3 if case.target_s < 10 else 1)}
        if name == "rerank-market":
            line["textbook"] = {"left_out": "minutes, and 7 GB"}
        else:
            line["textbook"] = measure(theirs, case)
        if "cpu_s" not in line["textbook"] and case.cap:
            eighth = measure(theirs, case, 0.125)
            line["textbook_eighth"] = eighth
            line["textbook_cpu_s_calculated"] = round(8 * eighth["cpu_s"], 1)
        line["target"] = {"cpu_s": case.target_s, "added_mb": case.target_mb}
        record[name] = line
        print(f"{name:14} {json.dumps(line)}", file=sys.stderr)
    print(json.dumps(record))


if __name__ == "__main__":
    os.environ.update(dict.fromkeys(THREADS, "1"))  # children load BLAS with it
    main(sys.argv[1:])
