"""`python -m jobs.doctor [storage=URI] [gpus=N] [cache=FOLDER] [--cluster]`

Looks at this node (with --cluster: at every node of the cluster of RAY_ADDRESS) and says what to mend: versions against the
pins, GPUs and NCCL, shared memory, open files, free disk, the token, host name, and with storage= whether that place
can be written and read, how fast, whether it refuses to overwrite when asked to, and how far the clocks are apart.

gpus=N is the number of GPUs a node should have; cache= the node cache's folder. Exit 0: nothing is broken (there may be
warnings), 1: something is, 2: wrong words.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from typing import Any

from jobs._checks import Finding, examine
from jobs._job import refuse_unknown_flags, run_job, split_words
from reid_dist.config import parse_yaml
from reid_dist.errors import RunError, UserError

logger = logging.getLogger("reid_dist.jobs")
USAGE = __doc__ or ""
LEVELS = {"good": logging.INFO, "warning": logging.WARNING, "broken": logging.ERROR}


def main(argv: list[str]) -> dict[str, Any]:
    """The job. Raises UserError."""
    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, {"--cluster"}, USAGE)
    options: dict[str, Any] = {"storage": "", "gpus": None, "cache": ""}
    for key, _, value in (word.partition("=") for word in values):
        if key not in options:
            raise UserError(f"unknown key {key!r}; known: {', '.join(options)}")
        options[key] = parse_yaml(value, key) if key == "gpus" else value
    if words:
        raise UserError(f"unexpected {words[0]!r}; the job takes storage=, gpus=, cache= and --cluster")
    if options["gpus"] is not None and (not isinstance(options["gpus"], int) or options["gpus"] < 0):
        raise UserError(f"gpus={options['gpus']!r}: a whole number")
    nodes = everywhere(options) if "--cluster" in flags else {os.uname().nodename: examine(options)}
    return report(nodes)


def everywhere(options: dict[str, Any]) -> dict[str, list[Finding]]:
    """`examine` on every node of the cluster, and whether they fit together. Raises UserError, RunError."""
    if not os.environ.get("RAY_ADDRESS"):
        raise UserError("--cluster needs a cluster: set RAY_ADDRESS, or run it through `ray job submit`")
    from jobs._cluster import connect

    with connect():
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        alive = [node for node in ray.nodes() if node["Alive"]]
        task = ray.remote(num_cpus=0)(examine)
        asked = {  # the end of an id tells: on one machine (cluster/laptop.yaml) all begin alike
            f"{node['NodeManagerHostname']} ({node['NodeID'][-8:]})": task.options(
                scheduling_strategy=On(node["NodeID"], soft=False)
            ).remote(options)
            for node in alive
        }
        answers: dict[str, list[Finding]] = {}
        for name, answer in asked.items():
            try:
                answers[name] = ray.get(answer, timeout=300)
            except Exception as error:
                cause = " ".join(str(error).split())[:200]
                answers[name] = [Finding("node", "broken", f"did not answer: {cause}", "look at its logs: `ray logs`")]
    return answers


def report(nodes: dict[str, list[Finding]]) -> dict[str, Any]:
    """The record: {"nodes": {name: [finding]}, "broken", "warnings", "exit_code"}; each finding is a log line."""
    if not nodes:
        raise RunError("the cluster has no node that is alive")
    for name, findings in nodes.items():
        for finding in findings:
            mend = f"; mend: {finding.mend}" if finding.mend else ""
            logger.log(
                LEVELS[finding.state], "%s  %-8s %s: %s%s", name, finding.state, finding.what, finding.found, mend
            )
    every = [finding for findings in nodes.values() for finding in findings]
    broken = sorted({finding.what for finding in every if finding.state == "broken"})
    record: dict[str, Any] = {
        "nodes": {name: [asdict(finding) for finding in findings] for name, findings in nodes.items()},
        "broken": len([finding for finding in every if finding.state == "broken"]),
        "warnings": len([finding for finding in every if finding.state == "warning"]),
        "exit_code": 1 if broken else 0,
    }
    return record | ({"error": f"to be mended: {', '.join(broken)} (see the lines above)"} if broken else {})


if __name__ == "__main__":
    run_job("doctor", main)
