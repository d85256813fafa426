"""`jobs.doctor`: every check finds its fault, says what to mend, and passes what is in order."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import _checks
from jobs._checks import Finding
from jobs.doctor import main, report
from reid_dist.errors import UserError
from reid_dist.storage import open_store
from tests.s3server import S3Server, s3  # noqa: F401 - the fixture

ROOT = Path(__file__).resolve().parents[2]


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.state for finding in findings}


def test_a_job_of_its_own_says_everything_in_one_record(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_AUTH_TOKEN", None)
    answer = subprocess.run(
        [sys.executable, "-m", "jobs.doctor", f"storage={tmp_path}/place", f"cache={tmp_path}/cache"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    record = json.loads(answer.stdout.splitlines()[-1])
    (findings,) = record["nodes"].values()
    wanted = {
        "python",
        "libraries",
        "shared memory",
        "open files",
        "authentication",
        "host name",
        "clock",
        "storage fence",
    }
    assert wanted <= {finding["what"] for finding in findings}
    assert record["exit_code"] == answer.returncode == (1 if record["broken"] else 0)
    assert "***" not in answer.stderr  # no line of ours is taken for a secret
    assert "0" * 64 not in answer.stdout + answer.stderr
    assert not list((tmp_path / "place").rglob("*probe*"))


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (["--all"], "--cluster"),
        (["store=x"], "unknown key 'store'"),
        (["gpus=two"], "whole number"),
        (["x"], "unexpected 'x'"),
    ],
)
def test_wrong_words(words: list[str], telling: str) -> None:
    with pytest.raises(UserError, match=telling):
        main(words)


def test_cluster_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="RAY_ADDRESS"):
        main(["--cluster"])


def test_what_is_broken_decides_the_exit_code() -> None:
    good, warning, broken = (Finding(state, state, "found") for state in ("good", "warning", "broken"))  # type: ignore[arg-type]
    assert report({"a": [good, warning]})["exit_code"] == 0
    record = report({"a": [good], "b": [broken, warning]})
    assert (record["exit_code"], record["broken"], record["warnings"]) == (1, 1, 1)
    assert "broken" in record["error"]


def test_libraries_against_the_pins(tmp_path: Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text("# comment\npytest==0.0.1   # old\npyyaml==6.0.3\nno-such-thing[extra]==1.0\n")
    (finding,) = _checks.libraries(pins)
    assert finding.state == "broken"
    assert "pytest" in finding.found
    assert "no-such-thing is missing" in finding.found
    assert "pyyaml" not in finding.found
    pins.write_text("pyyaml==6.0.3\n")
    assert states(_checks.libraries(pins)) == {"libraries": "good"}
    assert states(_checks.libraries(tmp_path / "none")) == {"libraries": "warning"}


def fake_smi(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states(_checks.gpus(None)) == states(_checks.gpus(0)) == {"gpu": "good"}
    assert states(_checks.gpus(2)) == {"gpu": "broken"}
    fake_smi(tmp_path, "echo 'Unable to determine the device handle'; exit 9", monkeypatch)
    (finding,) = _checks.gpus(None)
    assert (finding.state, finding.found) == ("broken", "Unable to determine the device handle")
    line = "NVIDIA L40S, 46068, {}, 580.95.05"
    fake_smi(tmp_path, f"echo '{line.format(3)}'; echo '{line.format(40000)}'", monkeypatch)
    monkeypatch.setattr(_checks, "_nccl", lambda count: Finding("nccl", "good", str(count)))
    assert states(_checks.gpus(2)) == {"gpu 0": "good", "gpu 1": "warning", "nccl": "good"}
    assert states(_checks.gpus(8)) == {"gpu": "broken"}


def test_gpus_that_torch_does_not_see() -> None:
    import torch

    if not torch.cuda.is_available():
        assert _checks._nccl(1).state == "broken"


def test_shared_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"free": 64e6}

    class Usage:
        free = 0.0

    def usage(path: object) -> Usage:
        answer = Usage()
        answer.free = free["free"]
        return answer

    assert _checks.shared_memory(str(tmp_path / "none")).state == "broken"
    monkeypatch.setattr(_checks.shutil, "disk_usage", usage)
    expected = {
        64e6: ("broken", "broken"),
        1e9: ("warning", "broken"),
        5e9: ("good", "warning"),
        1e12: ("good", "good"),
    }
    for size, (memory, disk) in expected.items():
        free["free"] = size
        assert _checks.shared_memory(str(tmp_path)).state == memory
        assert set(states(_checks.disks(str(tmp_path / "cache" / "deep"))).values()) == {disk}
    free["free"] = 64e6
    assert "--shm-size" in _checks.shared_memory(str(tmp_path)).mend


def test_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert _checks.token().state == "warning"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert _checks.token().state == "broken"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert _checks.token().state == "broken"
    path.write_text("short")
    assert _checks.token().state == "broken"
    path.write_text("f" * 64)
    path.chmod(0o644)
    assert (_checks.token().state, _checks.token().mend) == ("warning", f"chmod 600 {path}")
    path.chmod(0o600)
    assert _checks.token().state == "good"
    assert "f" * 64 not in str(_checks.token())


def test_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert _checks.host_name().state == "good"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such")
    assert _checks.host_name().state == "broken"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(_checks.socket, "gethostbyname", lambda name: "127.0.1.1")
    assert _checks.host_name().state == "warning"
    monkeypatch.setattr(_checks.socket, "gethostbyname", lambda name: "10.0.0.7")
    assert _checks.host_name().state == "good"


def test_storage_of_both_kinds(s3: S3Server, tmp_path: Path) -> None:  # noqa: F811
    for place in (s3.uri, str(tmp_path / "folder")):
        found = states(_checks.storage(place))
        assert (found["clock"], found["storage fence"]) == ("good", "good")
        assert {"storage write", "storage read"} <= found.keys()
        assert open_store(place).list() == []


def test_storage_that_refuses(s3: S3Server) -> None:  # noqa: F811
    s3.fail(100, "PUT", 403, "AccessDenied")
    (finding,) = _checks.storage(s3.uri)
    assert finding.state == "broken"
    assert "access denied" in finding.found
    assert "test-secret-key" not in finding.found


@pytest.mark.parametrize(
    ("off", "state", "text"),
    [
        (0, "good", "agrees"),
        (-30, "warning", "ahead of"),
        (30, "warning", "behind"),
        (3600, "broken", "behind"),
        (-3600, "broken", "ahead"),
    ],
)
def test_clock(off: float, state: str, text: str) -> None:
    """`off`: how far the storage's clock is ahead of ours."""
    now = time.time()
    finding = _checks._skew(now + off, now - 0.2, now)
    assert finding.state == state
    assert text in finding.found


def test_slow_storage_is_a_warning() -> None:
    assert _checks._speed("storage read", 10.0, "s3://b").state == "warning"
    assert _checks._speed("storage read", 0.1, "s3://b").state == "good"


def test_findings_travel_to_other_nodes() -> None:
    """`--cluster` sends `examine` to workers by name: it must live in an importable module, not in __main__."""
    assert _checks.examine.__module__ == "jobs._checks"
    arguments: dict[str, Any] = {"storage": "", "gpus": None, "cache": ""}
    assert all(isinstance(finding, Finding) for finding in _checks.examine(arguments))
