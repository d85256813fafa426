"""cluster/slurm.sh on two hosts: Slurm's own commands are stand-ins over ssh, `ray symmetric-run` and the job are real.

Over two minutes on two busy cores, so by hand: `make chaos`.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from reid_dist import methods
from reid_dist.runs import Run
from tests.e2e.cluster import ROOT
from tests.e2e.hosts import Hosts, hosts, why_not
from tests.e2e.test_faults import command
from tests.worlds import small_tables

REASON = why_not()

# srun starts the step once per node, in the submit folder, with the environment of the batch script.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export -p > {folder}/step.env
steps=()
for host in $(scontrol); do
  ssh -i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$host" \
    "cd $PWD; . {folder}/step.env; $(printf '%q ' "$@")" &
  steps+=($!)
done
code=0
for step in "${{steps[@]}}"; do wait "$step" || code=$?; done
exit $code
"""


def stand_ins(machines: Hosts) -> Path:
    """A folder with `scontrol` and `srun`."""
    folder = machines.folder / "slurm-bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f"#!/bin/sh\nprintf '%s\\n' {' '.join(machines.names)}\n")
    (folder / "srun").write_text(SRUN.format(folder=machines.folder, key=machines.key))
    for path in folder.iterdir():
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_job_on_two_nodes() -> None:
    with hosts(2) as machines:
        small_tables(machines.folder, methods.load_recipe("comoe/tiny"))
        place = machines.folder / "submit"
        place.mkdir()
        for part in ("cluster", "jobs", "reid_dist", "tuning", "requirements.txt", ".venv"):
            (place / part).symlink_to(ROOT / part)
        wide = f"training.cpus_per_worker={(os.cpu_count() or 1) // 2 + 1}"
        short = ("training.threads_per_worker=1", "training.max_steps=4")
        words = command(machines.folder, "slurm", f"{machines.folder}/runs", wide, *short)
        given = {
            "SLURM_SUBMIT_DIR": place,
            "SLURM_JOB_ID": 4711,
            "SLURM_JOB_NODELIST": "host-[1-2]",
            "SLURM_JOB_NUM_NODES": 2,
        }
        environment = " ".join(f"{name}={value}" for name, value in given.items())
        line = f"env {environment} PATH={stand_ins(machines)}:$PATH bash {place}/cluster/slurm.sh {' '.join(words)}"
        done = machines.ssh("host-1", line, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        run = machines.folder / "runs/slurm"
        assert Run.read(str(run)).card()["status"] == "done"
        logs = [(run / f"logs/attempt-0001/rank-{rank}.log").read_text() for rank in (0, 1)]
        assert {host for text in logs for host in re.findall(r"rank-\d of attempt 1 on (\S+),", text)} == set(
            machines.names
        )
        assert not list(place.glob(".slurm-*"))  # the job's token is gone
