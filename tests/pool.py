"""A warm pool of gloo processes: imports and the first engine cost 10 s per process, so tests share one pool.

`pool.run(function, world, *args)` runs `function(*args)` on `world` ranks inside a fresh process group and returns the ranks'
results in order. Functions and arguments travel by pickle, so functions live in importable modules.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def _reset_deepspeed() -> None:
    """DeepSpeed keeps process groups in module globals; a new group needs them gone."""
    import sys

    if "deepspeed" not in sys.modules:
        return
    import deepspeed.comm.comm as comm
    import deepspeed.utils.groups as groups

    comm.cdb = None
    for name, value in vars(groups).items():
        if name.startswith("_") and name.isupper() and name not in ("__ALL__",):
            setattr(groups, name, {} if isinstance(value, dict) else None)


def _serve(rank: int, pipe: Connection, backend: str) -> None:
    if backend == "gloo":
        os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="")
    else:
        os.environ.update(OMP_NUM_THREADS="1", LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES=str(rank))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            return
        function, world, store, args = task
        try:
            dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            _reset_deepspeed()


class Pool:
    """Processes are started on first use and ended by `close`. Each world size has its own: DeepSpeed keeps state (groups,
    sharded parameters) that does not survive a change of world size in a process."""

    def __init__(self, backend: str = "gloo") -> None:
        """`backend`: gloo on CPUs, or nccl with one GPU for each rank."""
        self._context, self._backend = mp.get_context("spawn"), backend
        self._groups: dict[int, list[tuple[Any, Connection]]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="reid-pool-")
        self._count = 0

    def run(self, function: Callable[..., Any], world: int, *args: Any, timeout: float = 300) -> list[Any]:
        """Results by rank. Raises AssertionError with the first failing rank's traceback."""
        members = self._groups.setdefault(world, [])
        while len(members) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(len(members), theirs, self._backend), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is seen at this side
            members.append((process, ours))
        self._count += 1
        store = os.path.join(self._folder.name, f"store-{self._count}")
        for _, pipe in members:
            pipe.send((function, world, store, args))
        results = []
        for rank, (_, pipe) in enumerate(members):
            if not pipe.poll(timeout):
                self._end(world)
                raise AssertionError(
                    f"rank {rank} of {world} did not answer in {timeout} s in {function.__name__}{args}"
                )
            try:
                results.append(pipe.recv())
            except (EOFError, ConnectionError):
                results.append((False, "its process died"))
        failed = [(rank, text) for rank, (good, text) in enumerate(results) if not good]
        if failed:
            self._end(world)  # the other ranks may be stuck in a collective
            raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in failed))
        return [value for _, value in results]

    def _end(self, world: int) -> None:
        members = self._groups.pop(world, [])
        for process, pipe in members:
            pipe.close()
            process.terminate()
        for process, _ in members:
            process.join(timeout=10)

    def close(self) -> None:
        for world in list(self._groups):
            self._end(world)
