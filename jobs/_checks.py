"""What `jobs.doctor` looks at on one node. Every check answers with findings and never raises for what it finds."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import stat
import subprocess
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reid_dist.errors import RunError, UserError

PROBE = 32 * 1024**2  # bytes written and read to measure a storage place
SLOW = 20e6  # bytes per second below which training waits for storage
SHM = 2e9  # bytes: loader batches and NCCL's buffers
DISK = 20e9  # bytes free for the node cache; a tenth of it is too little to start
SKEW = (5.0, 300.0)  # seconds: leases and log order suffer; S3 refuses signatures at 900


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    what: str
    state: Literal["good", "warning", "broken"]
    found: str
    mend: str = ""


def examine(options: dict[str, Any]) -> list[Finding]:
    """All checks on this node; `options`: storage (URI or empty), gpus (number wanted or None), cache (folder or empty)."""
    findings = [
        python(),
        *libraries(Path(__file__).resolve().parents[1] / "requirements.txt"),
        *gpus(options["gpus"]),
        shared_memory(),
        open_files(),
        *disks(options["cache"]),
        token(),
        host_name(),
    ]
    return findings + (storage(options["storage"]) if options["storage"] else [])


def python() -> Finding:
    """Python 3.11, the version of the pins."""
    version = platform.python_version()
    if version.startswith("3.11."):
        return Finding("python", "good", version)
    return Finding("python", "broken", version, "make the environment with cluster/bootstrap.sh and Python 3.11")


def libraries(requirements: Path) -> list[Finding]:
    """Installed versions against the pins of requirements.txt; only what differs is a finding of its own."""
    try:
        text = requirements.read_text()
    except OSError:
        return [
            Finding("libraries", "warning", f"{requirements} is missing", "submit with --working-dir of the repository")
        ]
    wrong, count = [], 0
    for name, wanted in re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==(\S+)", text, re.MULTILINE):
        count += 1
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if found.partition("+")[0] != wanted:
            wrong.append(f"{name} {found} instead of {wanted}")
    if wrong:
        return [Finding("libraries", "broken", "; ".join(wrong), "run cluster/bootstrap.sh on this node")]
    return [Finding("libraries", "good", f"{count} pins met")]


def gpus(wanted: int | None) -> list[Finding]:
    """Number, free memory and other people's processes on the GPUs; whether torch and NCCL can use them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
        lines = [line for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []
        trouble = "" if answer.returncode == 0 else (answer.stderr + answer.stdout).strip()[:200]
    except FileNotFoundError:
        lines, trouble = [], ""
    except (OSError, subprocess.SubprocessError) as error:
        lines, trouble = [], f"nvidia-smi does not answer ({type(error).__name__})"
    if trouble:
        return [Finding("gpu", "broken", trouble, "install the driver or reboot the node; look at `dmesg | grep NVRM`")]
    if wanted is not None and len(lines) != wanted:
        mend = "check the machine type, the driver and the container's --gpus" if wanted else "use a CPU node type"
        return [Finding("gpu", "broken", f"{len(lines)} GPUs instead of {wanted}", mend)]
    if not lines:
        return [Finding("gpu", "good", "none (a CPU node)")]
    findings = []
    for number, line in enumerate(lines):
        name, total, used, driver = (part.strip() for part in line.split(","))
        text = f"{name}, {used} of {total} MiB in use, driver {driver}"
        busy = float(used) > 0.05 * float(total)
        mend = "somebody else computes there, or an orphan holds memory: `nvidia-smi` names the process" if busy else ""
        findings.append(Finding(f"gpu {number}", "warning" if busy else "good", text, mend))
    return [*findings, _nccl(len(lines))]


def _nccl(count: int) -> Finding:
    import torch

    if not torch.cuda.is_available():
        found = f"torch {torch.__version__} sees no CUDA although there are {count} GPUs"
        return Finding(
            "nccl", "broken", found, "the driver is older than the CUDA of torch's wheel, or torch is a CPU build"
        )
    if torch.cuda.device_count() != count:
        found = f"torch sees {torch.cuda.device_count()} of {count} GPUs"
        return Finding("nccl", "broken", found, "unset CUDA_VISIBLE_DEVICES on the node")
    if not torch.distributed.is_nccl_available():
        return Finding("nccl", "broken", "this torch has no NCCL", "run cluster/bootstrap.sh --gpu")
    version = ".".join(str(part) for part in torch.cuda.nccl.version())
    return Finding("nccl", "good", f"{version}, CUDA {torch.version.cuda}")


def shared_memory(folder: str = "/dev/shm") -> Finding:  # noqa: S108 - the thing examined
    """Free space of /dev/shm."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return Finding("shared memory", "broken", f"{folder} is missing", "mount a tmpfs there")
    mend = "docker --shm-size=8g; on Kubernetes an emptyDir with medium: Memory at /dev/shm"
    if free < SHM / 10:
        return Finding("shared memory", "broken", f"{free / 1e9:.2f} GB free in {folder}", mend)
    state: Literal["good", "warning"] = "warning" if free < SHM else "good"
    return Finding("shared memory", state, f"{free / 1e9:.2f} GB free in {folder}", mend if state == "warning" else "")


def open_files() -> Finding:
    """The limit of open files; Ray opens several per worker and peer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= 65536 or soft == resource.RLIM_INFINITY:
        return Finding("open files", "good", str(soft))
    mend = "`ulimit -n 65536` before `ray start` (cluster/env.sh does it)"
    if hard != resource.RLIM_INFINITY and hard < 65536:
        mend = f"the hard limit is {hard}: raise it in /etc/security/limits.conf, or `docker --ulimit nofile=65536`"
    return Finding("open files", "warning", str(soft), mend)


def disks(cache: str = "") -> list[Finding]:
    """Free disk where the node cache and Ray's session lie."""
    chosen = cache or os.environ.get("REID_CACHE") or "~/.cache/reid-dist"
    places = {
        "node cache": Path(chosen).expanduser(),
        "ray session": Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()),
    }
    findings = []
    for name, place in places.items():
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        state: Literal["good", "warning", "broken"] = "good"
        if free < DISK or not os.access(there, os.W_OK):
            state = "broken" if free < DISK / 10 or not os.access(there, os.W_OK) else "warning"
        text = f"{free / 1e9:.1f} GB free at {place}" + ("" if os.access(there, os.W_OK) else ", not writable")
        mend = "" if state == "good" else "`python -m jobs.runs gc`, or another place: REID_CACHE=, RAY_TMPDIR="
        findings.append(Finding(f"disk of {name}", state, text, mend))
    return findings


def token() -> Finding:
    """Whether Ray's token authentication is on and its token is the owner's alone."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode != "token":
        found = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is not set"
        return Finding(
            "authentication",
            "broken" if mode else "warning",
            found,
            "export RAY_AUTH_MODE=token (cluster/env.sh does it)",
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding("authentication", "good", "given in RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        size, mode_bits = len(path.read_text().strip()), stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        mend = "`ray get-auth-token --generate`, or copy the cluster's token there"
        return Finding("authentication", "broken", f"{path}: {error.strerror}", mend)
    if size < 32:
        return Finding(
            "authentication", "broken", f"{path} holds {size} signs", "a token is 64 hexadecimal signs: make it anew"
        )
    if mode_bits & 0o077:
        return Finding(
            "authentication", "warning", f"{path} can be read by others (mode {mode_bits:o})", f"chmod 600 {path}"
        )
    return Finding("authentication", "good", str(path))


def host_name() -> Finding:
    """gloo and Ray look their own address up by the host's name; 127.0.0.1 there breaks jobs over several hosts."""
    name = os.uname().nodename
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        known = [interface for _, interface in socket.if_nameindex()]
        if chosen in known:
            return Finding("host name", "good", f"{name}, gloo on {chosen}")
        return Finding("host name", "broken", f"GLOO_SOCKET_IFNAME={chosen}", f"there are: {', '.join(known)}")
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return Finding(
            "host name", "warning", f"{name} has no address", "set GLOO_SOCKET_IFNAME for jobs over several hosts"
        )
    if address.startswith("127."):
        mend = "set GLOO_SOCKET_IFNAME for jobs over several hosts on CPUs"
        return Finding("host name", "warning", f"{name} is {address}", mend)
    return Finding("host name", "good", f"{name} is {address}")


def storage(uri: str) -> list[Finding]:
    """Write, read, verify and remove a probe; conditional write; the two clocks. Raises UserError for a URI that is none."""
    from reid_dist.storage import AlreadyExists, open_store

    store = open_store(uri)
    key = f"doctor-{uuid.uuid4().hex}"
    try:
        with tempfile.TemporaryDirectory(prefix="reid-doctor-") as folder:
            source, copy = Path(folder, "source"), Path(folder, "copy")
            source.write_bytes(os.urandom(PROBE))
            began = time.time()
            store.upload(f"{key}/probe", str(source))
            written = time.time()
            store.download(f"{key}/probe", str(copy))
            read = time.time()
            if copy.read_bytes() != source.read_bytes():
                return [Finding("storage", "broken", f"{store.uri}: other bytes came back", "do not use this place")]
            skew = _skew(store.stat(f"{key}/probe").modified, began, written)
        findings = [
            _speed("storage write", written - began, store.uri),
            _speed("storage read", read - written, store.uri),
            skew,
        ]
        store.write(f"{key}/once", b"1", if_absent=True)
        try:
            store.write(f"{key}/once", b"2", if_absent=True)
            findings.append(Finding("storage fence", "broken", f"{store.uri} overwrites", "keep runs somewhere else"))
        except AlreadyExists:
            findings.append(Finding("storage fence", "good", "refuses to overwrite when asked to"))
        return findings
    except (RunError, FileNotFoundError) as error:
        return [
            Finding(
                "storage", "broken", " ".join(str(error).split()), "check the AWS_* variables, the role and the bucket"
            )
        ]
    finally:
        _remove(store, key)


def _remove(store: object, key: str) -> None:
    try:
        store.delete_tree(key)  # type: ignore[attr-defined]
    except (RunError, UserError, OSError):
        return  # the place is broken and was reported so


def _speed(what: str, seconds: float, uri: str) -> Finding:
    speed = PROBE / max(seconds, 1e-6)
    if speed < SLOW:
        mend = "a bucket in the nodes' own region, or a faster network; training reads through the node cache"
        return Finding(what, "warning", f"{speed / 1e6:.0f} MB/s at {uri}", mend)
    return Finding(what, "good", f"{speed / 1e6:.0f} MB/s at {uri}")


def _skew(stamp: float, began: float, ended: float) -> Finding:
    """The place's clock against ours: its stamp lies between beginning and end of the upload, to a second."""
    skew = stamp - ended if stamp > ended else min(0.0, stamp + 1 - began)
    text = (
        f"{abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the storage's"
        if abs(skew) >= 1
        else "agrees with the storage's"
    )
    if abs(skew) < SKEW[0]:
        return Finding("clock", "good", text)
    mend = "set this node's clock (chrony or systemd-timesyncd)"
    return Finding("clock", "broken" if abs(skew) > SKEW[1] else "warning", text, mend)
