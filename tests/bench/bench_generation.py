"""Generation: what our pipeline costs over vLLM alone, the small model's recipe, and what interaction brings.

python -m tests.bench.bench_generation                the same requests to vLLM directly and through jobs.generate, start left out
python -m tests.bench.bench_generation grounding      part masks from the small model's boxes against the exact ones
python -m tests.bench.bench_generation small          train the small model anew; prints its curve (some 15 minutes on one core)
python -m tests.bench.bench_generation interaction    CoMoE on the synthetic world, 3 seeds: before and after interaction with the
                                                      small model, and with the attribute oracle as upper bound (some 20 minutes)
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from reid_dist.config import DataConfig
from reid_dist.data.store import open_view
from reid_dist.data.synthetic import World, world_for
from reid_dist.data.synthetic.identity import ATTRIBUTES, Attributes
from reid_dist.data.synthetic.oracle import shows
from reid_dist.data.synthetic.render import Drawing
from reid_dist.data.synthetic.shots import text_shots
from reid_dist.generation.ledger import Ledger, Maker
from reid_dist.generation.messages import Request, Sampling
from reid_dist.generation.model_folder import find_model
from reid_dist.generation.picture import open_picture
from reid_dist.generation.stages import Answerer, InlineRunner, Job, dialogues
from reid_dist.generation.supervise import Supervised
from reid_dist.generation.tiny.questions import MATCH, attribute_answer, attribute_question, part_boxes
from reid_dist.generation.tiny.samples import GROUPS
from reid_dist.methods.muva.boxes import boxes_to_patches
from reid_dist.methods.muva.exact import exact_masks
from reid_dist.methods.muva.masks import open_masks
from reid_dist.storage import open_store
from tests.scripted import ScriptedEngine
from tests.worlds import small_table

TABLE = "synthetic-cuhk-pedes"


def run_job(*words: str) -> dict[str, Any]:
    """The record of a job in a process of its own."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    record: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {record.get('error')}\n{done.stderr[-2000:]}")
    return record


def direct_rates(requests: list[Request], parallel: int, repeats: int) -> dict[str, list[float]]:
    """Requests per second of vLLM in one process, by its two interfaces, after a warm-up; all are given at once.

    Pictures are decoded once each, and the time for that counts; prompts are rendered beforehand.
    """
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    served: dict[str, Any] = {
        "model": find_model("small").path, "dtype": "float32", "max_model_len": 512, "enforce_eager": True,
        "max_num_seqs": parallel, "limit_mm_per_prompt": {"image": 1, "video": 0}, "seed": 0, "mm_processor_cache_gb": 1.0,
        "distributed_executor_backend": UniProcExecutor,
    }  # fmt: skip
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    sampling = SamplingParams(temperature=0.0, max_tokens=1)

    def prompts(tokenizer: Any) -> list[str]:
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request.text}]}],
                tokenize=False, add_generation_prompt=True,
            )
            for request in requests
        ]  # fmt: skip

    def inputs(texts: list[str]) -> list[dict[str, Any]]:
        open_picture.cache_clear()
        return [
            {"prompt": text, "multi_modal_data": {"image": open_picture(request.image)}}
            for text, request in zip(texts, requests, strict=True)
        ]

    def offline() -> list[float]:
        model = LLM(**served)
        texts, rates = prompts(model.get_tokenizer()), []
        model.generate(inputs(texts)[:64], sampling, use_tqdm=False)
        for _ in range(repeats):
            model.llm_engine.reset_mm_cache()
            model.llm_engine.reset_encoder_cache()
            start = time.perf_counter()
            model.generate(inputs(texts), sampling, use_tqdm=False)
            rates.append(len(requests) / (time.perf_counter() - start))
        model.llm_engine.engine_core.shutdown()
        return rates

    async def online() -> list[float]:
        model = AsyncLLM.from_engine_args(AsyncEngineArgs(**served, disable_log_stats=True, enable_log_requests=False))
        texts, rates = prompts(model.get_tokenizer()), []

        async def one(number: int, prompt: Any) -> None:
            async for _ in model.generate(prompt, sampling, f"{time.perf_counter_ns()}-{number}"):
                pass

        await asyncio.gather(*(one(n, prompt) for n, prompt in enumerate(inputs(texts)[:64])))
        for _ in range(repeats):
            await model.reset_mm_cache()
            await model.reset_encoder_cache()
            start = time.perf_counter()
            await asyncio.gather(*(one(n, prompt) for n, prompt in enumerate(inputs(texts))))
            rates.append(len(requests) / (time.perf_counter() - start))
        model.shutdown()
        return rates

    return {"LLM.generate": offline(), "AsyncLLM": asyncio.run(online())}


def overhead(root: Path, people: int = 60, parallel: int = 64, repeats: int = 2) -> None:
    """Direct and through the job, in the same run; the start of engines and of Ray left out."""
    small_table(root, TABLE, num_train=people, images_per_id=4)
    view = open_view(DataConfig(root=str(root)), (TABLE,), ("train",))
    images = view.encoded(np.arange(len(view)))
    requests = [Request(attribute_question(name), Sampling(1), image) for image in images for name in ATTRIBUTES]

    def through_the_job(number: int) -> float:
        words = (
            "describe",
            TABLE,
            f"root={root}",
            f"parallel={parallel}",
            "shard=32",
            f"ledger={root}/ledger-{number}",
        )
        done = run_job("jobs.generate", *words)["stages"]["describe"]
        return float(done["calls"] / done["working_seconds"])

    jobs = [through_the_job(0)]  # around the others, so that a machine that grows busier does not decide
    direct = direct_rates(requests, parallel, repeats)
    jobs += [through_the_job(number) for number in range(1, repeats)]
    for name, rates in {**direct, "through the job": jobs}.items():
        print(f"{name}: {', '.join(f'{rate:.0f}' for rate in rates)} requests/s, {len(requests)} each time")
    best = max(statistics.median(rates) for rates in direct.values())
    print(f"the job's median against the faster of the two: {statistics.median(jobs) / best:.3f}")


def grounding(root: Path, people: int = 60) -> None:
    """IoU of part masks with the exact ones, mean over pictures: the small model's boxes through the job, the true boxes,
    and the fixed bands that stand in where there is no box.
    """
    options = {"num_train": people, "num_val": 0, "num_test": 6, "images_per_id": 2}
    small_table(root, TABLE, **options)
    record = run_job("jobs.generate", "masks", TABLE, f"root={root}")
    view = open_view(DataConfig(root=str(root)), (TABLE,), ("train",))
    rows, grid, parts = np.arange(len(view)), (16, 8), ("head", "upper", "legs")
    world = world_for("cuhk-pedes", **options)
    exact_by = {row.digest: row.visible for row in exact_masks(world, "cuhk-pedes", grid)}
    exact = np.stack([exact_by[digest] for digest in view.digests(rows)])
    drawn = {sample.image: drawing for sample, drawing in map(world.sample, text_shots(world))}
    boxes = [true_boxes(drawn[image]) for image in view.encoded(rows)]
    made = {
        "small model": open_masks(DataConfig(root=str(root)), (record["name"],), view, grid, parts).visible(rows),
        "true boxes": np.stack([boxes_to_patches(one, grid).visible for one in boxes]),
        "fixed bands": np.broadcast_to(boxes_to_patches({}, grid).visible, exact.shape),
    }
    print(f"{len(rows)} pictures, {record['with_fallback']} with a part that took its band")
    for name, visible in made.items():
        both, either = (visible & exact).sum(axis=2), (visible | exact).sum(axis=2)
        iou = both / np.maximum(either, 1)
        print(
            f"{name}: IoU {iou[either > 0].mean():.3f}; "
            + ", ".join(f"{p} {v:.3f}" for p, v in zip(parts, iou.mean(axis=0), strict=True))
        )


def true_boxes(drawing: Drawing) -> dict[str, list[tuple[float, float, float, float]]]:
    """The box around each part's pixels."""
    areas = [drawing.parts(list(group)).sum(axis=0) for group in GROUPS]
    return {part: [box] if box else [] for part, box in part_boxes(np.stack(areas)).items()}


def small_model(folder: Path) -> None:
    """Train anew and print the curve."""
    from reid_dist.generation.tiny.train import Recipe, train

    for point in train(Recipe(), None, folder / "small.checkpoint").curve:
        print(json.dumps(point))


class Oracle:
    """Truthful answers about a world's pictures, by their bytes."""

    def __init__(self, world: World) -> None:
        self.truth: dict[bytes, tuple[Attributes, frozenset[str]]] = {}
        for shot in text_shots(world):
            if shot.person.split == "test":
                sample, drawing = world.sample(shot)
                self.truth[sample.image] = (shot.person.attributes, drawing.visible())

    def __call__(self, request: Request) -> str:
        wear, seen = self.truth[request.image or b""]
        if request.text.startswith(MATCH):
            raise ValueError("match questions are answered from the caption itself")
        name = next(name for name in ATTRIBUTES if attribute_question(name) == request.text)
        return attribute_answer(name, wear, seen)


def oracle_job(world: World, view: Any, place: Path) -> Job:
    """A job whose search and descriptions are the truth."""
    oracle, speak = Oracle(world), dialogues("tiny")

    class Truthful(type(speak)):  # type: ignore[misc]
        async def locate(self, ask: Any, image: bytes, text: str) -> Any:
            from reid_dist.generation.messages import Outcome

            wear, seen = oracle.truth[image]
            return Outcome(shows(wear, text, seen))

    truthful = Truthful(speak.prompts)
    ask = Supervised(lambda: ScriptedEngine(oracle, []), 60)
    runner = InlineRunner(Answerer(truthful, ask, lambda row: view.encoded([row])[0]))
    return Job(Ledger(open_store(place)).take(), Maker("oracle"), truthful, runner, runner)


def interaction(root: Path, seeds: int = 3, threshold: float = 0.6) -> None:
    """Per seed: R1 and mAP before, with the small model, with the oracle."""
    from jobs.demo import make_data
    from jobs.interact import encode, refine
    from reid_dist.generation.interaction import Policy
    from reid_dist.training.loaded import load_run

    make_data(str(root), TABLE)
    world = world_for("cuhk-pedes")
    for seed in range(1, seeds + 1):
        run = run_job("jobs.train", "comoe/synthetic", f"data.root={root}", f"output={root}/runs", f"name=s{seed}",
                      f"seed={seed}")["run"]  # fmt: skip
        record = run_job("jobs.interact", run, f"threshold={threshold}")
        loaded = load_run(run)
        view = open_view(loaded.recipe.data, loaded.recipe.data.test)
        truth = refine(encode(loaded, view), oracle_job(world, view, root / f"oracle-{seed}"), Policy(5, threshold), 60)
        for name, found in (("small model", record), ("oracle", truth)):
            before, after = found["before"], found["after"]
            print(
                f"seed {seed}, {name}: R1 {before['rank1']:.3f} -> {after['rank1']:.3f}, mAP {before['mAP']:.3f} -> "
                f"{after['mAP']:.3f}; {found['accepted']} anchors, right {found['anchors_right']}; asked "
                f"{found['asked']} of {found['asked_by_released_loop']}"
            )


if __name__ == "__main__":
    part = sys.argv[1] if len(sys.argv) > 1 else "overhead"
    with tempfile.TemporaryDirectory() as folder:
        {"overhead": overhead, "grounding": grounding, "small": small_model, "interaction": interaction}[part](
            Path(folder)
        )
