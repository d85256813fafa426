"""Generation: what our pipeline costs over vLLM alone, part masks, and the small model's recipe.

python -m tests.bench.bench_generation                the same requests to vLLM directly and through jobs.generate, start left out
python -m tests.bench.bench_generation grounding      part masks from the small model's boxes against the exact ones
python -m tests.bench.bench_generation small          train the small model anew; prints its curve (some 15 minutes on one core)
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reid_dist.config import DataConfig
from reid_dist.data.store import open_view
from reid_dist.data.synthetic import world_for
from reid_dist.data.synthetic.identity import ATTRIBUTES
from reid_dist.data.synthetic.render import Drawing
from reid_dist.data.synthetic.shots import text_shots
from reid_dist.generation.messages import Request, Sampling
from reid_dist.generation.model_folder import find_model
from reid_dist.generation.picture import open_picture
from reid_dist.generation.tiny.questions import attribute_question, part_boxes
from reid_dist.generation.tiny.samples import GROUPS
from reid_dist.methods.muva.boxes import boxes_to_patches
from reid_dist.methods.muva.exact import exact_masks
from reid_dist.methods.muva.masks import open_masks
from tests.worlds import small_table

TABLE = "synthetic-cuhk-pedes"


def run_job(*words: str) -> dict[str, Any]:
    """The record of a job in a process of its own."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    record: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {record.get('error')}\n{done.stderr[-2000:]}")
    return record


def direct_rates(model: str, requests: list[Request], parallel: int, repeats: int) -> dict[str, list[float]]:
    """Requests per second of vLLM in one process, by its two interfaces, after a warm-up; all are given at once.

    Pictures are decoded once each, and the time for that counts; prompts are rendered beforehand.
    """
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    served: dict[str, Any] = {
        "model": find_model(model).path, "dtype": "float32", "max_model_len": 512, "enforce_eager": True,
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
        engine = LLM(**served)
        texts, rates = prompts(engine.get_tokenizer()), []
        engine.generate(inputs(texts)[:64], sampling, use_tqdm=False)
        for _ in range(repeats):
            engine.llm_engine.reset_mm_cache()
            engine.llm_engine.reset_encoder_cache()
            start = time.perf_counter()
            engine.generate(inputs(texts), sampling, use_tqdm=False)
            rates.append(len(requests) / (time.perf_counter() - start))
        engine.llm_engine.engine_core.shutdown()
        return rates

    async def online() -> list[float]:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**served, disable_log_stats=True, enable_log_requests=False))
        texts, rates = prompts(engine.get_tokenizer()), []

        async def one(number: int, prompt: Any) -> None:
            async for _ in engine.generate(prompt, sampling, f"{time.perf_counter_ns()}-{number}"):
                pass

        await asyncio.gather(*(one(n, prompt) for n, prompt in enumerate(inputs(texts)[:64])))
        for _ in range(repeats):
            await engine.reset_mm_cache()
            await engine.reset_encoder_cache()
            start = time.perf_counter()
            await asyncio.gather(*(one(n, prompt) for n, prompt in enumerate(inputs(texts))))
            rates.append(len(requests) / (time.perf_counter() - start))
        engine.shutdown()
        return rates

    return {"LLM.generate": offline(), "AsyncLLM": asyncio.run(online())}


def widened(folder: Path, width: int) -> str:
    """The small model with hidden layers of `width` in its text part, the new units with weights of 0: the same answers, each
    at the cost of a larger model.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(find_model("small").path, folder)
    weights = load_file(folder / "model.safetensors")
    for name, values in weights.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            weights[name] = torch.cat([values, values.new_zeros(width - len(values), values.shape[1])])
        elif name.endswith("down_proj.weight"):
            weights[name] = torch.cat([values, values.new_zeros(len(values), width - values.shape[1])], dim=1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = width
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def overhead(root: Path) -> None:
    """At the small model's rate, where a request costs about 1 ms, and with requests as long as a real model's."""
    compared(root / "short", "small", people=150)
    compared(root / "long", widened(root / "wide", 24576), people=12)


def compared(root: Path, model: str, people: int, parallel: int = 64, repeats: int = 2) -> None:
    """Direct and through the job, in the same run; the start of engines and of Ray left out."""
    small_table(root, TABLE, num_train=people, images_per_id=4)
    view = open_view(DataConfig(root=str(root)), (TABLE,), ("train",))
    images = view.encoded(np.arange(len(view)))
    requests = [Request(attribute_question(name), Sampling(1), image) for image in images for name in ATTRIBUTES]

    def through_the_job(number: int) -> float:
        record = run_job("jobs.generate", "describe", TABLE, f"root={root}", f"model={model}", f"parallel={parallel}",
                         f"ledger={root}/ledger-{number}")  # fmt: skip
        done = record["stages"]["describe"]
        assert done["calls"] == len(requests), "an answer was malformed: more was asked than directly"
        return float(done["calls"] / done["working_seconds"])

    jobs = [through_the_job(0)]  # around the others, so that a machine that grows busier does not decide
    direct = direct_rates(model, requests, parallel, repeats)
    jobs += [through_the_job(number) for number in range(1, repeats)]
    print(
        f"{len(requests)} requests each time, {1000 / statistics.median(direct['LLM.generate']):.1f} ms of wall time each"
    )
    for name, rates in {**direct, "through the job": jobs}.items():
        print(f"  {name}: {', '.join(f'{rate:.1f}' for rate in rates)} requests/s")
    best = max(statistics.median(rates) for rates in direct.values())
    print(f"  the job's median against the faster of the two: {statistics.median(jobs) / best:.3f}", flush=True)


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


if __name__ == "__main__":
    part = sys.argv[1] if len(sys.argv) > 1 else "overhead"
    with tempfile.TemporaryDirectory() as folder:
        {"overhead": overhead, "grounding": grounding, "small": small_model}[part](Path(folder))
