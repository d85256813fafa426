"""Several hosts on this machine, reached by ssh: network namespaces with their own processes, names, homes and sshd.

They share the file system but for /tmp, /dev/shm and their homes. Nothing outside the namespaces can be reached from them, and
all of it, whatever was started inside, ends with one process.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.e2e.cluster import BIN, ROOT

NEEDED = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")


def why_not() -> str:
    """Why this machine cannot have such hosts; empty where it can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing:
        return f"missing: {', '.join(missing)} (apt-get install openssh-server rsync iproute2)"
    trial = "mount -t tmpfs tmpfs /mnt && ip link add br0 type bridge && hostname trial"
    apart = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--ipc", "--uts", "--kill-child"]
    tried = subprocess.run([*apart, "bash", "-c", trial], capture_output=True, text=True)
    return f"namespaces are not allowed: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass
class Hosts:
    """Running hosts host-1, host-2, ...; `folder` is seen by all, the operator's home is folder/operator."""

    folder: Path
    names: dict[str, str]  # name: address
    key: Path
    _pid: int

    def operator(self, *command: str, **more: str) -> list[str]:
        """`command` on the operator's machine: among the hosts, but none of them."""
        environment = {
            "HOME": str(self.folder / "operator"),
            "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "USER": pwd.getpwuid(os.geteuid()).pw_name,
            "TERM": "dumb",
            "RAY_USAGE_STATS_ENABLED": "0",
            **more,
        }
        words = [f"{key}={value}" for key, value in environment.items()]
        return ["nsenter", "-t", str(self._pid), "-n", "-m", "-p", f"--wd={ROOT}", "env", "-i", *words, *command]

    def run(self, *command: str, timeout: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
        """`operator`'s command, to its end."""
        return subprocess.run(
            self.operator(*command, **more), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )

    def ssh(self, name: str, line: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """A shell line on a host."""
        quiet = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        return self.run("ssh", *quiet, "-i", str(self.key), self.names[name], line, timeout=timeout)


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Start `count` hosts; end them and all that runs on them."""
    folder = Path(tempfile.mkdtemp(prefix="reid-hosts-", dir="/tmp"))
    names = {f"host-{number}": f"10.77.0.1{number}" for number in range(1, count + 1)}
    _write_homes(folder, names)
    kept = {str(ROOT), str(Path(sys.prefix)), str(Path(sys.prefix).resolve())}
    apart = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    log = (folder / "hosts.log").open("w")
    process = subprocess.Popen(
        [*apart, "bash", str(ROOT / "tests/e2e/hosts.sh"), str(folder), str(count), *sorted(kept)],
        stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    inside: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 30
        while not all((folder / f"{name}.up").exists() for name in names):
            ended = process.poll() is not None or time.monotonic() > deadline
            assert not ended, (folder / "hosts.log").read_text()
            time.sleep(0.1)
        (first,) = psutil.Process(process.pid).children()
        running = Hosts(folder, names, folder / "operator/.ssh/key", first.pid)
        while any(running.ssh(name, "true").returncode for name in names):
            assert time.monotonic() < deadline, (folder / "host-1.log").read_text()
            time.sleep(0.2)
        yield running
        inside = first.children(recursive=True)
    finally:
        process.kill()  # the kernel ends the namespace with its first process
        process.wait()
        log.close()
        _, left = psutil.wait_procs(inside, timeout=10)
        shutil.rmtree(folder, ignore_errors=True)
        assert not left, left


def _write_homes(folder: Path, names: dict[str, str]) -> None:
    operator = folder / "operator"
    (operator / ".ssh").mkdir(parents=True, mode=0o700)
    (operator / ".ray").mkdir()
    token = operator / ".ray/auth_token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    for key in (operator / ".ssh/key", folder / "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {operator}/.ssh/key.pub\nPidFile none\nUsePAM no\nStrictModes no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nMaxStartups 50\n"
    )
    own = pwd.getpwuid(os.geteuid())
    known = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items())
    for name in names:
        home = folder / name
        home.mkdir()
        lines = [f"{own.pw_name}:x:{own.pw_uid}:{own.pw_gid}::{home}:/bin/bash",
                 "sshd:x:105:65534::/run/sshd:/usr/sbin/nologin", "nobody:x:65534:65534::/:/usr/sbin/nologin"]  # fmt: skip
        (folder / f"{name}.passwd").write_text("\n".join(lines) + "\n")
        (folder / f"{name}.hosts").write_text(known)
        (home / ".bash_profile").write_text(f'export PATH="{Path(sys.base_prefix) / "bin"}:$PATH"\n')
        _environment(home / "reid-dist/.venv")


def _environment(venv: Path) -> None:
    """The tests' own environment as one that bootstrap.sh made on that host before, so that it finds nothing to do."""
    venv.mkdir(parents=True)
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith("."):
            (venv / part.name).symlink_to(part)
    cluster = ROOT / "cluster"
    read = [ROOT / "requirements.txt", cluster / "overrides-cpu.txt", cluster / "torchvision_ops.py", cluster / "bootstrap.sh",
            cluster / "requirements-cpu.txt"]  # fmt: skip
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()
    (venv / ".reid-dist-cpu").write_text(digest)
