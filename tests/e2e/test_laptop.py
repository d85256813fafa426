"""The autoscaling cluster of one machine, as README starts it: from no worker to several under a pack job, and back to none."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from tests.e2e.cluster import ROOT, Head, free_port
from tests.e2e.test_submit import succeeded

IMAGES = 2500  # three chunks of a pack, each a task of one CPU


def draw_tree(folder: Path) -> None:
    """A data set in the csv form, of noise."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["path,pid,camid,split"]
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (16, 8, 3), dtype=np.uint8)).save(folder / f"images/{i:05d}.jpg")
        lines.append(f"images/{i:05d}.jpg,{i // 2},{i % 2},train")
    (folder / "dataset.csv").write_text("\n".join(lines) + "\n")


@contextmanager
def laptop(folder: Path) -> Iterator[Head]:
    """`cluster/laptop.sh` with a home, ports and a folder of its own, ended as Ctrl-C ends it."""
    port, token = free_port(), folder / "home/.ray/auth_token"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "REID_"))}
    ports = {name: str(free_port()) for name in ("REID_HEAD_PORT", "REID_CLIENT_PORT", "REID_AGENT_PORT")}
    places = {"HOME": str(folder / "home"), "REID_RAY_FOLDER": str(folder / "ray"), "REID_DASHBOARD_PORT": str(port)}
    log = folder / "laptop.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "cluster/laptop.sh"], cwd=ROOT, env={**clean, **ports, **places}, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    client = {**clean, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    running = Head(f"http://127.0.0.1:{port}", client, f"127.0.0.1:{ports['REID_HEAD_PORT']}")
    try:
        deadline = time.monotonic() + 180
        while not running.alive():
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, "the head did not come up in 180 s"
            time.sleep(0.5)
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        finally:
            left = session(folder)
            for one in left:
                with suppress(psutil.Error):
                    one.kill()
        assert [one.name() for one in left] == []


def session(folder: Path) -> list[psutil.Process]:
    """Processes whose command line names the cluster's folder."""
    return [
        one for one in psutil.process_iter(["cmdline"]) if str(folder / "ray") in " ".join(one.info["cmdline"] or [])
    ]


def submitted(head: Head, *words: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, again while the head, which is up, has not yet its agent."""
    for _ in range(20):
        result = head.submit(*words)
        if "No available agent" not in result.stderr + result.stdout:
            break
        time.sleep(2)
    return result


def draw_features(path: Path) -> None:
    """A feature file of 60 people, two pictures each, seen by two cameras."""
    pid = np.repeat(np.arange(60), 2)
    feat = np.random.default_rng(0).normal(size=(120, 16)).astype(np.float32) + pid[:, None]
    np.savez(path, feat=feat, pid=pid, camid=np.tile([0, 1], 60), split=np.tile(["query", "gallery"], 60))


@contextmanager
def counted(head: Head) -> Iterator[list[int]]:
    """How many workers there are, each half second; ends when there is none."""
    counts: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            counts.append(len(head.alive()) - 1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield counts
        deadline = time.monotonic() + 90
        while counts[-1] > 0 and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        done.set()
        watcher.join()


def test_scales_from_none_to_as_many_as_are_asked_for_and_back() -> None:
    folder = Path(tempfile.mkdtemp(prefix="reid-lap-", dir="/tmp"))  # short: Ray's sockets lie below it
    try:
        draw_tree(folder / "lab")
        draw_features(folder / "features.npz")
        with laptop(folder) as head:
            with counted(head) as counts:
                words = ["jobs.pack", "csv", f"{folder}/lab", f"root={folder}/data", "name=lab"]
                packed = succeeded(submitted(head, *words), "pack")
                assert packed["rows"] == IMAGES
                assert counts[0] == 0
                assert max(counts) >= 1  # Ray Data asks for more as long as there is work
                evaluate = ["jobs.evaluate", "--features", f"{folder}/features.npz", "--protocol", "image"]
                words = [*evaluate, f"store={folder}", "shards=3"]
                scored = succeeded(head.submit(*words), "evaluate")
                assert scored["num_queries"] == 60
                assert max(counts) >= 2  # three tasks at once
            assert counts[-1] == 0, counts
            succeeded(head.submit(*words), "evaluate")
            assert len(head.alive()) > 1  # so that Ctrl-C comes while there are workers
    finally:
        shutil.rmtree(folder, ignore_errors=True)
