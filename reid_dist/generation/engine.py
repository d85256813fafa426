"""vLLM behind one class, and the Ray actors that host it: the only file that imports vLLM, and generation's Ray file.

One engine per actor, on its own GPUs (or the node's CPUs). Ray Data's autoscaling pool hosts the actors under
`map_batches`; a row of the dataset is a shard of units, every unit a coroutine, so vLLM batches over rows and shards, and
no list waits for its slowest. What an actor had published is not asked again when Ray restarts it.

Facts found by trying (vLLM 0.29): head size 32 or more on CPU; its Ray metrics need ray[serve].
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from reid_dist.config import DataConfig
from reid_dist.errors import RunError, UserError
from reid_dist.generation.guard import children, guard
from reid_dist.generation.ledger import Ledger, Maker, Unit
from reid_dist.generation.messages import BadInput, Finish, Reply, Request
from reid_dist.generation.model_folder import find_model
from reid_dist.generation.shards import Outline, Stage, work_shard
from reid_dist.generation.stages import Answerer, dialogues
from reid_dist.generation.supervise import Supervised
from reid_dist.storage import open_store

logger = logging.getLogger(__name__)
LEAST_SIDE = 8  # pixels
ADAPTER = 1  # vLLM's number of our one adapter


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is served. Everything that can change an answer is in `settings`."""

    path: str  # model folder on every node, or hub name
    adapter: str = ""
    dtype: str = "auto"
    context: int = 4096  # tokens of prompt and answer
    tensor_parallel: int = 1
    gpu_memory: float = 0.85
    pixels: int = 0  # budget of every picture (min = max); 0: the model's own
    parallel: int = 64  # sequences under way in one engine
    seed: int = 0
    eager: bool = False  # no graph capture: starts faster, runs slower
    cpu_cache_gb: int = 1
    stall_s: float = 300.0
    adapter_rank: int = 64  # highest rank that adapters may have

    @property
    def settings(self) -> dict[str, Any]:
        """For the content keys."""
        return {"dtype": self.dtype, "pixels": self.pixels, "seed": self.seed}


class VllmEngine:
    """One vLLM engine in this process (its core runs in a child that a guard ends with it)."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._engine: Any = None
        self._guard: Any = None
        self._numbers = itertools.count()

    async def start(self) -> None:
        """Load the model. Raises UserError for a folder that cannot be served."""
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self.config.cpu_cache_gb))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if os.path.isdir(self.config.path):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the folder is whole: ask nobody about it
        # The core's child must see the same environment as we do; fork after threads have started is unsafe.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        c = self.config
        arguments = AsyncEngineArgs(
            model=c.path, dtype=c.dtype, max_model_len=c.context, tensor_parallel_size=c.tensor_parallel, seed=c.seed,
            gpu_memory_utilization=c.gpu_memory, max_num_seqs=c.parallel, enforce_eager=c.eager,
            limit_mm_per_prompt={"image": 1, "video": 0}, enable_lora=bool(c.adapter), max_loras=1,
            max_lora_rank=c.adapter_rank, enable_log_requests=False, disable_log_stats=True,
            mm_processor_kwargs={"min_pixels": c.pixels, "max_pixels": c.pixels} if c.pixels else None,
            distributed_executor_backend="ray" if c.tensor_parallel > 1 else None,
        )  # fmt: skip
        started, before = time.monotonic(), children(os.getpid())
        self._engine = AsyncLLM.from_engine_args(arguments)
        self._guard = guard(children(os.getpid()) - before)
        self._tokenizer = self._engine.get_tokenizer()
        logger.info("vLLM has loaded %s in %.0f s", c.path, time.monotonic() - started)

    async def generate(self, request: Request) -> Reply:
        """Raises BadInput for a picture or prompt that cannot be served, vLLM's errors when the engine is ill."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineGenerateError

        prompt = self._prompt(request)
        lora = self._lora()
        number, started, last = f"r{next(self._numbers)}", time.monotonic(), None
        try:
            async for output in self._engine.generate(prompt, self._sampling(request), number, lora_request=lora):
                last = output
        except (VLLMClientError, ValueError) as error:
            raise BadInput(f"vLLM refuses the request: {error}") from None
        except EngineGenerateError as error:
            if isinstance(error.__cause__, ValueError):
                raise BadInput(f"vLLM refuses the request: {error.__cause__}") from None
            raise
        if last is None:
            raise RunError("vLLM ended a request without an answer")
        said = last.outputs[0]
        finish: Finish = {"stop": "stop", "length": "length"}.get(said.finish_reason, "abort")  # type: ignore[assignment]
        return Reply(
            said.text, finish, len(last.prompt_token_ids or ()), len(said.token_ids), time.monotonic() - started
        )

    def _prompt(self, request: Request) -> dict[str, Any]:
        parts: list[dict[str, str]] = [{"type": "text", "text": request.text}]
        if request.image is not None:
            parts.insert(0, {"type": "image"})
        content: Any = parts if request.image is not None else request.text
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        length = len(self._tokenizer.encode(text))
        if length + request.sampling.max_tokens > self.config.context:
            raise BadInput(
                f"the prompt has {length} tokens without the picture and may answer with {request.sampling.max_tokens}; "
                f"the context is {self.config.context}"
            )
        prompt: dict[str, Any] = {"prompt": text}
        if request.image is not None:
            prompt["multi_modal_data"] = {"image": open_picture(request.image)}
        return prompt

    def _sampling(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        guided = None
        if request.schema is not None:
            guided = StructuredOutputsParams(json=dict(request.schema))
        elif request.choice:
            guided = StructuredOutputsParams(choice=list(request.choice))
        wanted = request.sampling
        return SamplingParams(
            temperature=wanted.temperature, max_tokens=wanted.max_tokens, seed=wanted.seed, structured_outputs=guided
        )

    def _lora(self) -> Any:
        if not self.config.adapter:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("adapter", ADAPTER, self.config.adapter)

    async def check(self) -> None:
        """Raises when the engine's core is dead."""
        await self._engine.check_health()

    async def close(self) -> None:
        """End the core; may be called twice."""
        await asyncio.to_thread(self.drop)

    def drop(self) -> None:
        """As close, where no loop runs any more."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()
            self._guard.terminate()
            self._guard.wait(10)


def open_picture(data: bytes) -> Any:
    """A PIL image. Raises BadInput for bytes that are none, or a picture under 8 pixels."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"the image cannot be decoded: {' '.join(str(error).split())[:200]}") from None
    if min(picture.size) < LEAST_SIDE:
        raise BadInput(f"the image has {picture.height} x {picture.width} pixels; {LEAST_SIDE} each way are needed")
    return picture


# ---- hosting on Ray


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """What an actor needs to answer. Plain data, sent to every actor."""

    engine: EngineConfig
    model: str  # as the user named it: every node finds it for itself
    revision: str
    data: DataConfig
    tables: tuple[str, ...]
    splits: tuple[str, ...]
    prompts: str
    answers: str
    ledger: str
    attempt: int
    stage: str
    version: str
    maker: Maker


class Host:
    """The actor: one engine, any number of shards at a time."""

    def __init__(self, hosting: Hosting) -> None:
        from reid_dist.data.store import open_view

        logging.basicConfig(level=logging.INFO)
        self.hosting = hosting
        self.stage = Stage(hosting.stage, hosting.version, hosting.maker)
        self.ledger = Ledger(open_store(hosting.ledger), hosting.attempt)
        view = open_view(hosting.data, hosting.tables, hosting.splits)
        engine = replace(hosting.engine, path=find_model(hosting.model, hosting.revision, hosting.maker.model).path)
        self.ask = Supervised(lambda: VllmEngine(engine), engine.stall_s)
        speak = dialogues(hosting.prompts, hosting.answers)
        self.answerer = Answerer(speak, self.ask, lambda row: view.encoded([row])[0], engine.pixels)

    def __del__(self) -> None:
        """Ray Data drops the object when the actor ends in order."""
        if (ask := getattr(self, "ask", None)) is not None:
            ask.drop()

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Rows of "shard" (units as JSON) -> rows of "outlines" (JSON)."""
        for text in batch["shard"]:
            units = [Unit(*fields) for fields in json.loads(str(text))]
            work = lambda unit: self.answerer(self.stage.name, unit)  # noqa: E731
            records = await work_shard(self.ledger, self.stage, units, work, self.hosting.engine.parallel * 2)
            yield {"outlines": [json.dumps([asdict(Outline.of(record)) for record in records])]}


@dataclass(frozen=True)
class RayRunner:
    """Shards on a pool of engines that grows from `least` to `most` with the queue."""

    hosting: Hosting
    least: int = 1
    most: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    shards_under_way: int = 4  # per engine

    def run(self, ledger: Ledger, stage: Stage, shards: Sequence[list[Unit]]) -> Iterator[list[Outline]]:
        """As Runner says. Raises UserError and RunError of the actors as themselves."""

        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        hosting = replace(
            self.hosting, attempt=ledger.attempt, stage=stage.name, version=stage.version, maker=stage.maker
        )
        rows = [{"shard": json.dumps([[u.key, dict(u.inputs), dict(u.payload)] for u in shard])} for shard in shards]
        most = max(1, min(self.most, len(rows)))
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Host, fn_constructor_args=(hosting,), batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(self.least, most), max_size=most, max_tasks_in_flight_per_actor=self.shards_under_way,
                max_concurrent_calls_per_actor=self.shards_under_way,
            ),
            num_cpus=self.cpus, num_gpus=self.gpus if hosting.engine.tensor_parallel == 1 else 0,
            **({"ray_remote_args_fn": _placement(hosting.engine)} if hosting.engine.tensor_parallel > 1 else {}),
        )  # fmt: skip
        with _readable():
            for row in done.iter_rows():
                yield [Outline(**fields) for fields in json.loads(row["outlines"])]


def _placement(config: EngineConfig) -> Any:
    """Every actor with a placement group of its own: one GPU per rank on one node, children in it."""

    def arguments() -> dict[str, Any]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = ray.util.placement_group([{"CPU": 1, "GPU": 1}] * config.tensor_parallel, strategy="STRICT_PACK")
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
        }

    return arguments


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """What an actor raised, as itself and in one line."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (UserError, RunError)):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise type(cause)(str(cause).splitlines()[0]) from None
