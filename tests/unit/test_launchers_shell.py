"""The shell parts of the launchers, run for real with stand-ins for Slurm's and Ray's commands."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_syntax(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


def sourced(tmp_path: Path, **environment: str) -> dict[str, str]:
    """The environment after `. cluster/env.sh`."""
    answer = subprocess.run(
        ["bash", "-c", f". {CLUSTER}/env.sh; env -0"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return dict(line.split("=", 1) for line in answer.stdout.split("\0") if "=" in line)


def test_environment_of_a_node(tmp_path: Path) -> None:
    found = sourced(tmp_path)
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/.ray/auth_token"
    assert found["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    assert found["PATH"].startswith(f"{ROOT}/.venv/bin:")
    mine = sourced(tmp_path, RAY_AUTH_TOKEN_PATH="/elsewhere", REID_VENV="/opt/venv", GLOO_SOCKET_IFNAME="eth7")
    assert (mine["RAY_AUTH_TOKEN_PATH"], mine["GLOO_SOCKET_IFNAME"]) == ("/elsewhere", "eth7")
    assert mine["PATH"].startswith("/opt/venv/bin:")
    assert "RAY_AUTH_TOKEN_PATH" not in sourced(tmp_path, RAY_AUTH_TOKEN="given")


def command(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_interface_of_the_first_address(tmp_path: Path) -> None:
    command(tmp_path, "hostname", "echo 10.1.2.3 172.17.0.1")
    command(
        tmp_path,
        "ip",
        "printf '%s\\n' '1: lo    inet 127.0.0.1/8' '2: docker0    inet 172.17.0.1/16' '3: ens5    inet 10.1.2.3/24'",
    )
    assert sourced(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")["GLOO_SOCKET_IFNAME"] == "ens5"


@pytest.fixture
def slurm(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """(submit folder, environment of the batch script): srun runs the step here, ray runs the entrypoint."""
    binaries, place = tmp_path / "bin", tmp_path / "submit"
    binaries.mkdir()
    (place / "cluster").mkdir(parents=True)
    (place / "cluster/env.sh").write_text((CLUSTER / "env.sh").read_text())
    command(binaries, "scontrol", "echo node-a; echo node-b")
    command(binaries, "srun", 'echo "srun $1" >> calls; shift; exec "$@"')
    command(binaries, "ray", 'echo "ray $*" >> calls\n'
            'stat -c %a "$RAY_AUTH_TOKEN_PATH" >> calls; wc -c < "$RAY_AUTH_TOKEN_PATH" >> calls\n'
            'while [ "$1" != -- ]; do shift; done; shift; "$@"')  # fmt: skip
    command(binaries, "python", 'echo "python $* at $RAY_ADDRESS" >> calls\ntrap "echo asked to stop >> calls; exit 1" TERM\n'
            'if [ "$2" = jobs.long ]; then for i in $(seq 100); do sleep 0.1; done; fi; exit ${EXIT:-0}')  # fmt: skip
    environment = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "REID_VENV": str(tmp_path / "none"),
        "SLURM_SUBMIT_DIR": str(place),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
    }
    return place, environment


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_job(slurm: tuple[Path, dict[str, str]], code: int) -> None:
    place, environment = slurm
    words = [str(CLUSTER / "slurm.sh"), "jobs.train", "comoe/tiny", "name=a b"]
    done = subprocess.run(["bash", *words], env={**environment, "EXIT": str(code)}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    calls = (place / "calls").read_text().splitlines()
    assert calls[1].startswith("ray symmetric-run --address node-a:32345 --min-nodes 2 --disable-usage-stats -- ")
    assert calls[2:4] == ["600", "64"]  # the token file: ours alone, 32 random bytes in hex
    assert calls[4] == "python -m jobs.train comoe/tiny name=a b at node-a:32345"
    assert [path.name for path in place.iterdir() if path.name.startswith(".slurm")] == []


def test_slurm_time_limit_asks_the_job_itself_to_stop(slurm: tuple[Path, dict[str, str]]) -> None:
    place, environment = slurm
    batch = subprocess.Popen(["bash", str(CLUSTER / "slurm.sh"), "jobs.long"], env=environment)
    deadline = time.monotonic() + 20
    while "python" not in ((place / "calls").read_text() if (place / "calls").exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(timeout=20) == 1
    assert (place / "calls").read_text().splitlines()[-1] == "asked to stop"


def test_slurm_refuses_an_empty_line(slurm: tuple[Path, dict[str, str]]) -> None:
    done = subprocess.run(["bash", str(CLUSTER / "slurm.sh")], env=slurm[1], capture_output=True, text=True)
    assert done.returncode == 2
    assert "name the job" in done.stderr


def test_python_script_does_nothing_where_python_is_there(tmp_path: Path) -> None:
    command(tmp_path, "python3.11", "exit 0")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert subprocess.run(["bash", str(CLUSTER / "python.sh")], env=environment).returncode == 0
