"""vLLM behind one class: the only file that imports it. hosting.py puts it on Ray.

Facts found by trying (vLLM 0.29): head size 32 or more on CPU; its Ray metrics need ray[serve].
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

from PIL import Image

from reid_dist.errors import RunError, UserError
from reid_dist.generation.guard import Guard
from reid_dist.generation.messages import BadInput, Finish, Reply, Request, Sampling
from reid_dist.generation.picture import KEPT, open_picture
from reid_dist.generation.rendering import Rendering

logger = logging.getLogger(__name__)
MARK = "<<<the text of the turn>>>"
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
    one_process: bool = False  # the worker inside the core's process: a third less to start; one thread computes
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
        self._guard: Guard | None = None
        self._numbers = itertools.count()
        self._frames: dict[bool, tuple[str, str]] = {}  # with a picture or without: the turn around a text

    async def start(self) -> None:
        """Load the model. Raises UserError for a folder that cannot be served."""
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self.config.cpu_cache_gb))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if os.path.isdir(self.config.path):
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the folder is whole: ask nobody about it
        # The core's child must see the same environment as we do; fork after threads have started is unsafe.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        c = self.config
        executor = "ray" if c.tensor_parallel > 1 else UniProcExecutor if c.one_process else None
        try:
            arguments = AsyncEngineArgs(
                model=c.path, dtype=c.dtype, max_model_len=c.context, tensor_parallel_size=c.tensor_parallel, seed=c.seed,
                gpu_memory_utilization=c.gpu_memory, max_num_seqs=c.parallel, enforce_eager=c.eager,
                limit_mm_per_prompt={"image": 1, "video": 0}, enable_lora=bool(c.adapter), max_loras=1,
                max_lora_rank=c.adapter_rank, enable_log_requests=False, disable_log_stats=True,
                mm_processor_kwargs={"min_pixels": c.pixels, "max_pixels": c.pixels} if c.pixels else None,
                mm_processor_cache_gb=1.0, distributed_executor_backend=executor,
                # A small model fills the space that JSON allows between values until its answer is cut off.
                structured_outputs_config=StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
            )  # fmt: skip
            started, self._guard = time.monotonic(), Guard()
            self._engine = AsyncLLM.from_engine_args(arguments)
        except ValueError as error:  # vLLM looks at the model's configuration before it starts anything
            raise UserError(f"vLLM cannot serve {c.path} so: {_one_line(error)}") from None
        self._guard.settle()
        self._tokenizer, renderer = self._engine.get_tokenizer(), self._engine.renderer
        self._rendering = Rendering(self._render, renderer.mm_processor_cache)
        await self._warm_up()
        logger.info("vLLM has loaded %s in %.0f s", c.path, time.monotonic() - started)

    async def _warm_up(self) -> None:
        """One question, so that what vLLM prepares at the first is done. Raises UserError when nothing can be asked at all,
        TimeoutError when it is not answered within `stall_s`.
        """
        stream = io.BytesIO()
        Image.new("RGB", (56, 56)).save(stream, "PNG")
        try:
            async with asyncio.timeout(self.config.stall_s):
                await self.generate(Request("?", Sampling(1), stream.getvalue()))
        except BadInput as error:
            raise UserError(f"{self.config.path} answers no question: {_one_line(error)}") from None

    async def generate(self, request: Request) -> Reply:
        """Raises BadInput for a picture or prompt that cannot be served, vLLM's errors when the engine is ill."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineGenerateError

        text, lora = self._text(request), self._lora()
        number, started, last = f"r{next(self._numbers)}", time.monotonic(), None
        try:
            prompt = self._prompt(text, request.image)
            async for output in self._engine.generate(prompt, _sampling(request), number, lora_request=lora):
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

    def _text(self, request: Request) -> str:
        """The whole turn. Raises BadInput when it is too long."""
        before, after = self._frame(request.image is not None)
        text = before + request.text + after
        room = self.config.context - request.sampling.max_tokens
        # A token is a byte at least, so short prompts need not be counted; vLLM refuses what the picture makes too long.
        if len(text.encode()) > room and (length := len(self._tokenizer.encode(text))) > room:
            raise BadInput(
                f"the prompt has {length} tokens without the picture and may answer with {request.sampling.max_tokens}; "
                f"the context is {self.config.context}"
            )
        return text

    def _prompt(self, text: str, image: bytes | None) -> Any:
        """Raises BadInput for a picture that is none, and what vLLM raises."""
        if image is None:
            return self._rendering(text)
        # The digest of the file stands for the picture in vLLM's caches, so its pixels need not be hashed.
        return self._rendering(text, functools.partial(open_picture, image), _digest(image))

    def _render(self, prompt: dict[str, Any]) -> Any:
        """vLLM's own rendering of one prompt."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        (found,) = self._engine.renderer.render_cmpl([parse_model_prompt(self._engine.model_config, prompt)])
        return found

    def _frame(self, picture: bool) -> tuple[str, str]:
        """What the model's chat template puts before and after the text of a single turn, rendered once."""
        if picture not in self._frames:
            content: Any = [{"type": "image"}, {"type": "text", "text": MARK}] if picture else MARK
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            before, mark, after = text.partition(MARK)
            if not mark or MARK in after:
                raise UserError(f"{self.config.path}: its chat template does not hand the text of a turn through once")
            self._frames[picture] = before, after
        return self._frames[picture]

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
        listener = getattr(self._engine, "output_handler", None)
        if listener is not None:  # it would take the end of the core for an accident, and say so at length
            listener.cancel()
        await asyncio.to_thread(self.drop)

    def drop(self) -> None:
        """As close, where no loop runs any more."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.close()


def _sampling(request: Request) -> Any:
    if request.schema is not None:
        return _sampling_of(request.sampling, json.dumps(request.schema), ())
    return _sampling_of(request.sampling, "", request.choice)


@functools.lru_cache(maxsize=KEPT)
def _sampling_of(wanted: Sampling, schema: str, choice: tuple[str, ...]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    guided = None
    if schema:
        guided = StructuredOutputsParams(json=schema)
    elif choice:
        guided = StructuredOutputsParams(choice=list(choice))
    return SamplingParams(
        temperature=wanted.temperature, max_tokens=wanted.max_tokens, seed=wanted.seed, structured_outputs=guided,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


@functools.lru_cache(maxsize=KEPT)
def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
