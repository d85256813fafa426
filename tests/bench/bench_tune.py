"""`python -m tests.bench.bench_tune [concurrent=N] [trials=8]`: what a sweep costs beside its trials.

One-step trials (training alone, nothing scored beyond one small split), at most N at a time. Wall time of the job beside the
sum of the trials' own times, which the run cards hold (from the attempt's start to its record). With N = 1 the rest of the wall
time is the sweep's own: starting Ray, planning, an actor per trial, the leaderboard. Other load on the machine moves both; CPU
time, of the job and all that it started, it moves less.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from reid_dist import methods
from tests.worlds import small_tables
from tuning.state import SweepState


def sweep_file(folder: Path, concurrent: int, trials: int) -> Path:
    """Seeds of one step each."""
    sweep = {
        "name": f"one-step-{concurrent}", "base": "comoe/tiny", "output": str(folder),
        "set": {"data": {"root": str(folder)}, "training": {"max_steps": 1, "eval_every": 0}},
        "protocol": {"seeds": list(range(1, trials + 1))},
        "resources": {"cpus_per_worker": 0.5, "driver": {"CPU": 0.1}, "max_concurrent": concurrent},
    }  # fmt: skip
    path = folder / f"{sweep['name']}.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def measure(folder: Path, concurrent: int, trials: int) -> dict[str, float]:
    """Seconds: wall and CPU of the job, sum of the trials' own."""
    file = sweep_file(folder, concurrent, trials)
    began = time.perf_counter()
    job = subprocess.Popen([sys.executable, "-m", "jobs.tune", str(file)], stdout=subprocess.PIPE, text=True)
    # Ray's processes are no one's children once they end, so they are asked before.
    used: dict[psutil.Process, float] = {}
    while job.poll() is None:
        note_cpu(job.pid, used)
        time.sleep(0.5)
    wall = time.perf_counter() - began
    out, _ = job.communicate()
    assert job.returncode == 0, out
    record = json.loads(out.strip().splitlines()[-1])
    own = [outcome["seconds"] for outcome in SweepState(record["sweep"]).outcomes().values()]
    assert len(own) == trials
    return {"wall": wall, "cpu": sum(used.values()), "sum": sum(own), "concurrent": record["concurrent_trials"]}


def note_cpu(pid: int, used: dict[psutil.Process, float]) -> None:
    """CPU seconds so far of a process and all below it."""
    with contextlib.suppress(psutil.Error):
        job = psutil.Process(pid)
        for process in [job, *job.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                used[process] = times.user + times.system


def main() -> None:
    words = {"concurrent": "2", "trials": "8"} | dict(word.split("=", 1) for word in sys.argv[1:])
    concurrent, trials = int(words["concurrent"]), int(words["trials"])
    with tempfile.TemporaryDirectory(prefix="reid-bench-") as place:
        folder = Path(place)
        small_tables(folder, methods.load_recipe("comoe/tiny"))
        found = measure(folder, concurrent, trials)
        lanes = found["sum"] / found["concurrent"]
        print(
            f"{trials} one-step trials, {found['concurrent']:.0f} at a time: wall {found['wall']:.1f} s, their own together "
            f"{found['sum']:.1f} s (over {found['concurrent']:.0f} lanes {lanes:.1f} s), so the sweep adds "
            f"{found['wall'] - lanes:.1f} s, {(found['wall'] - lanes) / trials:.2f} s per trial; "
            f"CPU {found['cpu']:.0f} s, {found['cpu'] / trials:.1f} s per trial"
        )


if __name__ == "__main__":
    main()
