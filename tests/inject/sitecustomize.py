"""Faults inside the processes of a run, put there from outside: Python runs this file at the start of every process that has
this folder in PYTHONPATH. It does something only where REID_FAULTS names a folder with a plan (tests/injection.py), or
REID_SKEW says by how many seconds the clock is ahead."""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time


def strike(at, rank, number):
    """Whatever the plan has for this place: `at` is "step" (before that optimizer step), "extract" (in mid-pass of that epoch) or
    "commit" (a checkpoint of that step is uploaded and not committed)."""
    folder = os.environ["REID_FAULTS"]
    with open(os.path.join(folder, "plan.json")) as stream:
        plan = json.load(stream)
    for fault in plan:
        if fault["at"] != at or fault["rank"] not in (None, rank):
            continue
        if fault["number"] != number and not (fault["onwards"] and number >= fault["number"]):
            continue
        if fault["do"] in ("pace", "wait") or fault["always"] or _first_time(folder, f"{fault['name']}-{rank}"):
            _do(fault, folder, rank)


def _first_time(folder, name):
    try:
        os.close(os.open(os.path.join(folder, f"{name}.struck"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _do(fault, folder, rank):
    do = fault["do"]
    opened = os.path.join(folder, f"{fault['name']}.open")
    if do == "pace":
        time.sleep(0 if os.path.exists(opened) else 1)
    elif do == "wait":
        open(os.path.join(folder, f"{fault['name']}.reached"), "a").close()
        while not os.path.exists(opened):
            time.sleep(0.05)
    elif do == "raise":
        raise RuntimeError(f"injected {fault['name']}")
    elif do == "hang":
        time.sleep(10**6)
    else:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[do])


def patch_loop(module):
    original = module.run_step

    def run_step(engine, step_module, batch):
        ctx = step_module._ctx
        with open(os.path.join(os.environ["REID_FAULTS"], f"steps-{ctx.rank}"), "a") as stream:
            stream.write(f"{time.time()} {ctx.step} {os.getpid()}\n")
        strike("step", ctx.rank, ctx.step)
        return original(engine, step_module, batch)

    module.run_step = run_step


def patch_context(module):
    original = module.RunContext.extract

    def extract(self, model, items, load, encode, *more, **named):
        batches = [0]

        def counted(*words):
            out = encode(*words)
            batches[0] += 1
            if batches[0] == 1:
                strike("extract", self.rank, self.epoch)
            return out

        return original(self, model, items, load, counted, *more, **named)

    module.RunContext.extract = extract


def patch_checkpoint(module):
    original = module.publish_folder

    def publish_folder(store, prefix, folder, *, facts=None, guard=None):
        def last():
            guard()
            strike("commit", 0, int(prefix.rpartition("-")[2]))

        return original(store, prefix, folder, facts=facts, guard=last)

    module.publish_folder = publish_folder


PATCHES = {
    "reid_dist.training.loop": patch_loop,
    "reid_dist.training.context": patch_context,
    "reid_dist.training.checkpoint": patch_checkpoint,
}


class Finder(importlib.abc.MetaPathFinder):
    """Lets the usual finders find, and patches a module of PATCHES when it has been executed."""

    def find_spec(self, name, path, target=None):
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("REID_SKEW"):
    right, ahead = time.time, float(os.environ["REID_SKEW"])
    time.time = lambda: right() + ahead

if os.environ.get("REID_FAULTS"):
    sys.meta_path.insert(0, Finder())
