"""Runs: who a run is, what it leaves in storage, and how it survives being killed and started twice."""

from reid_dist.runs.identity import Identity, code_version, identity_of, library_versions
from reid_dist.runs.logs import ship_logs
from reid_dist.runs.redact import redact
from reid_dist.runs.run import FencedOut, Run

__all__ = ["FencedOut", "Identity", "Run", "code_version", "identity_of", "library_versions", "redact", "ship_logs"]
