"""`python -m tests.bench.bench_survival [megabytes=256]`: what it costs that a run can be killed at any moment.

Three measurements against an S3 server (moto's, in a process of its own on this machine, so its CPU is part of all times):

1. training of the synthetic recipe with checkpoints: seconds that training stands still per checkpoint, seconds of the upload
   beside it, bytes against the sum of parameters and optimizer state, seconds to continue from storage alone;
2. the same writer with a state of `megabytes`, a step of a fixed length beside it;
3. an upload of that state: ours (parallel parts, checksums, manifest, commit) against Ray's default copy, same run.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from reid_dist import methods
from reid_dist.runs import Run, identity_of
from reid_dist.storage import open_store, ray_storage
from reid_dist.storage.publish import fetch, publish_folder
from reid_dist.training import checkpoint as checkpoints
from reid_dist.training.checkpoint import Progress, Snapshot
from reid_dist.training.loop import Hooks
from reid_dist.training.worker import make_worker, prepare
from tests.e2e.cluster import free_port
from tests.worlds import small_table

STEPS, EVERY = 24, 6
MINUTE = 60.0  # one checkpoint per minute is what the share is stated for


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A moto server in a process of its own; the URI of an empty bucket on it."""
    import boto3

    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    variables = {
        "AWS_ACCESS_KEY_ID": "bench-access-key", "AWS_SECRET_ACCESS_KEY": "bench-secret-key", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    try:
        with mock.patch.dict(os.environ, variables):
            client = boto3.session.Session().client("s3")
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.create_bucket(Bucket="bench")
                    break
                except Exception:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.5)
            yield "s3://bench"
    finally:
        process.terminate()
        process.wait()


class Watch:
    """Seconds of every call of a method, by wrapping it."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds: list[float] = []
        inner = getattr(owner, name)

        def timed(*words: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*words, **named)
            finally:
                self.seconds.append(time.perf_counter() - began)

        setattr(owner, name, timed)


def size_of(snapshot: Snapshot) -> int:
    """Bytes of the weights and of the optimizer's and the method's tensors."""
    tensors = [
        *snapshot.model.values(),
        *snapshot.method.values(),
        *(t for d in snapshot.optimizer.values() for t in d.values()),
    ]
    return sum(t.numel() * t.element_size() for t in tensors)


def training(folder: Path, uri: str) -> dict[str, Any]:
    """Blocked and upload seconds of a real training, world size one, ZeRO-1."""
    small_table(folder, "synthetic-cuhk-pedes", num_train=160, images_per_id=3)
    words = [f"data.root={folder}", f"output={uri}/runs", "name=bench", "training.num_workers=1", f"training.max_steps={STEPS}",
             "training.eval_every=0", "training.checkpoint_every=0", f"training.checkpoint_every_steps={EVERY}",
             "training.log_every=1", "training.epochs=20"]  # fmt: skip
    recipe = methods.load_recipe("comoe/synthetic", words)
    prepared = prepare(recipe)
    run = Run.open(recipe.uri, identity_of(recipe, prepared.data.train.versions), recipe)
    worker = make_worker(recipe, prepared, run, Hooks())
    blocked, upload = Watch(worker, "_checkpoint"), Watch(worker.writer, "_publish")
    worker.train()
    assert worker.snapshot is not None
    steps = [record["rows"] / record["rows_per_s"] for record in worker.losses[4:]]
    began = time.perf_counter()
    newest = checkpoints.newest(run)
    assert newest is not None
    read = time.perf_counter() - began
    stored = run.checkpoints()[-1]["size"]
    tensors = size_of(worker.snapshot)
    return {
        "step_s": round(median(steps), 3),
        "blocked_s": round(median(blocked.seconds), 3),
        "upload_s": round(median(upload.seconds), 3),
        "share_of_a_minute": round(median(blocked.seconds) / MINUTE, 4),
        "checkpoint_mb": round(stored / 1e6, 2),
        "bytes_against_tensors": round(stored / tensors, 4),
        "read_and_verify_s": round(read, 3),
        "checkpoints": len(blocked.seconds),
    }


def state(megabytes: int) -> Snapshot:
    """Weights and two moments, a third of the size each, in 1 MB tensors."""
    count = megabytes // 3
    names = [f"w{i}" for i in range(count)]
    generator = torch.Generator().manual_seed(1)
    weights, first, second = ({name: torch.randn(262144, generator=generator) for name in names} for _ in range(3))
    return Snapshot(Progress(step=1), weights, {"exp_avg": first, "exp_avg_sq": second}, {})


def big_state(uri: str, snapshot: Snapshot) -> dict[str, Any]:
    """Blocked seconds of the writer alone: the first save only hands over, the second waits when it comes too early."""
    recipe = methods.load_recipe("comoe/tiny", [f"output={uri}/runs", "name=big"])
    run = Run.open(recipe.uri, identity_of(recipe, {}), recipe)
    writer = checkpoints.Writer(run, keep_last=2, keep_best=0, score="rank1")
    upload = Watch(writer, "_publish")
    began = time.perf_counter()
    writer.save(snapshot)
    handed = time.perf_counter() - began
    writer.close()
    began = time.perf_counter()
    assert checkpoints.newest(run) is not None
    return {
        "handed_over_s": round(handed, 3),
        "upload_s": round(upload.seconds[0], 2),
        "read_and_verify_s": round(time.perf_counter() - began, 2),
        "bytes_against_tensors": round(run.checkpoints()[-1]["size"] / size_of(snapshot), 4),
    }


def uploads(folder: Path, uri: str, snapshot: Snapshot) -> dict[str, Any]:
    """MB/s of ours (with checksums, manifest and commit) and of Ray's default, twice each in turn; the better one."""
    from ray.train._internal.storage import _pyarrow_fs_copy_files

    checkpoints.write_folder(folder, snapshot)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    store = open_store(f"{uri}/uploads")
    path, filesystem = ray_storage(f"{uri}/uploads")
    best = {"ours": 0.0, "ray": 0.0, "ours_read_and_verified": 0.0}
    for number in range(2):
        began = time.perf_counter()
        publish_folder(store, f"ours-{number}", folder)
        best["ours"] = max(best["ours"], size / (time.perf_counter() - began))
        began = time.perf_counter()
        _pyarrow_fs_copy_files(str(folder), f"{path}/ray-{number}", destination_filesystem=filesystem)
        best["ray"] = max(best["ray"], size / (time.perf_counter() - began))
        with tempfile.TemporaryDirectory() as back:
            began = time.perf_counter()
            fetch(store, f"ours-{number}", back)
            best["ours_read_and_verified"] = max(best["ours_read_and_verified"], size / (time.perf_counter() - began))
        store.delete_tree(f"ours-{number}")
        store.delete_tree(f"ray-{number}")
    return {"size_mb": round(size, 1), **{f"{k}_mb_per_s": round(v, 1) for k, v in best.items()},
            "ratio": round(best["ours"] / best["ray"], 2)}  # fmt: skip


def main(argv: list[str]) -> None:
    megabytes = int(dict(word.split("=", 1) for word in argv).get("megabytes", "256"))
    with tempfile.TemporaryDirectory(prefix="reid-bench-") as place, server() as uri:
        (Path(place) / "state").mkdir()
        print("training, synthetic recipe:", json.dumps(training(Path(place), uri)), flush=True)
        snapshot = state(megabytes)
        print(f"writer, {megabytes} MB:", json.dumps(big_state(uri, snapshot)), flush=True)
        print(
            "upload against Ray's default copy:", json.dumps(uploads(Path(place) / "state", uri, snapshot)), flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
