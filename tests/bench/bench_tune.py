"""`python -m tests.bench.bench_tune [concurrent=N]`: what a sweep costs beside its trials.

Eight one-step trials (training alone, nothing scored beyond one small split), at most N at a time. Wall time of the job beside
the sum of the trials' own times, which the run cards hold (from the attempt's start to its record). With N = 1 the rest of the
wall time is the sweep's own: starting Ray, planning, an actor per trial, the leaderboard. Other load on the machine moves both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from reid_dist import methods
from tests.worlds import small_tables
from tuning.state import SweepState

TRIALS = 8


def sweep_file(folder: Path, concurrent: int) -> Path:
    """Eight seeds of one step each."""
    sweep = {
        "name": f"one-step-{concurrent}", "base": "comoe/tiny", "output": str(folder),
        "set": {"data": {"root": str(folder)}, "training": {"max_steps": 1, "eval_every": 0}},
        "protocol": {"seeds": list(range(1, TRIALS + 1))},
        "resources": {"cpus_per_worker": 0.5, "driver": {"CPU": 0.1}, "max_concurrent": concurrent},
    }  # fmt: skip
    path = folder / f"{sweep['name']}.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def measure(folder: Path, concurrent: int) -> dict[str, float]:
    """Seconds: wall of the job, sum and mean of the trials' own."""
    file = sweep_file(folder, concurrent)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "jobs.tune", str(file)], capture_output=True, text=True, check=True)
    wall = time.perf_counter() - began
    record = json.loads(done.stdout.strip().splitlines()[-1])
    own = [outcome["seconds"] for outcome in SweepState(record["sweep"]).outcomes().values()]
    assert len(own) == TRIALS
    return {"wall": wall, "sum": sum(own), "concurrent": record["concurrent_trials"]}


def main() -> None:
    concurrent = int(next((word.removeprefix("concurrent=") for word in sys.argv[1:]), "2"))
    with tempfile.TemporaryDirectory(prefix="reid-bench-") as place:
        folder = Path(place)
        small_tables(folder, methods.load_recipe("comoe/tiny"))
        found = measure(folder, concurrent)
        lanes = found["sum"] / found["concurrent"]
        print(
            f"{TRIALS} one-step trials, {found['concurrent']:.0f} at a time: wall {found['wall']:.1f} s, their own together "
            f"{found['sum']:.1f} s (over {found['concurrent']:.0f} lanes {lanes:.1f} s), so the sweep adds "
            f"{found['wall'] - lanes:.1f} s, {(found['wall'] - lanes) / TRIALS:.2f} s per trial"
        )


if __name__ == "__main__":
    main()
