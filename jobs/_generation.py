"""What `jobs.generate` and `jobs.interact` share: who answers, on how many engines, and the ledger."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from reid_dist.config import DataConfig
from reid_dist.errors import UserError

logger = logging.getLogger("reid_dist.jobs.generation")
CONTEXT = 4096  # tokens of prompt and answer, where the model reads that many


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Who answers, and where."""

    model: str = "small"  # `small` (built in), a folder, an s3:// prefix, OWNER/NAME of the hub
    revision: str = ""
    adapter: str = ""  # LoRA folder
    prompts: str = ""  # prompt family; empty: the one that fits the model
    answers: Literal["strict", "legacy"] = "strict"  # how descriptions are read (legacy: as the released code does)
    dtype: str = "auto"
    context: int = 0  # tokens; 0: 4096, or what the model reads
    pixels: int = -1  # picture budget; -1: 50176, or the small model's own
    tensor_parallel: int = 1
    engines: int = 1  # most
    engines_min: int = 1
    parallel: int = 64  # sequences under way per engine
    stall_s: float = 300.0
    seed: int = 0
    ledger: str = ""  # folder or s3:// prefix; empty: <root>/ledger/<tables>
    retry_errors: bool = False  # ask again about rows that ended in an error
    shard: int = 256  # units that are published together
    root: str = "data"
    cache: str = ""
    cache_gb: float = 50.0

    def __post_init__(self) -> None:
        for name in ("engines", "engines_min", "tensor_parallel", "parallel", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: from 1")
        if self.engines_min > self.engines:
            raise ValueError(f"engines_min={self.engines_min} is more than engines={self.engines}")

    @property
    def data(self) -> DataConfig:
        """How tables are opened."""
        return DataConfig(root=self.root, cache=self.cache, cache_gb=self.cache_gb)


@dataclass(frozen=True)
class Answering:
    """A checked model and everything that answers are keyed by."""

    options: ModelOptions
    model: Any  # ModelFolder
    maker: Any
    speak: Any
    engine: Any  # EngineConfig
    ledger: str

    def source(self, stages: Sequence[str]) -> str:
        """What a side table says about its making: equal sources give comparable tables."""
        versions = [f"{stage}={self.speak.versions[stage]}" for stage in stages]
        adapter = f" adapter {self.maker.adapter[:12]}" if self.maker.adapter else ""
        return f"model {self.model.digest[:12]}{adapter} {' '.join(versions)}"


def prepare(options: ModelOptions, tables: Sequence[str]) -> Answering:
    """Find and check the model; nothing is started. Raises UserError."""
    from reid_dist.generation.engine import EngineConfig
    from reid_dist.generation.image_budget import PIXELS
    from reid_dist.generation.ledger import Maker
    from reid_dist.generation.model_folder import adapter_digest, adapter_rank, find_model
    from reid_dist.generation.stages import dialogues
    from reid_dist.storage import open_store

    # Workers stand in other folders than the driver: what was typed relative means the same there.
    folders = {
        name: os.path.abspath(path) for name in ("model", "adapter") if os.path.isdir(path := getattr(options, name))
    }
    options = replace(options, root=open_store(options.root).uri, **folders)
    model = find_model(options.model, options.revision)
    adapter = adapter_digest(options.adapter, model) if options.adapter else ""
    small = model.prompts == "tiny"
    context = options.context or min(CONTEXT, model.context)
    if context > model.context:
        raise UserError(f"context={context}: {options.model} reads at most {model.context} tokens")
    pixels = (0 if small else PIXELS) if options.pixels < 0 else options.pixels
    # vLLM's "auto" makes bfloat16 of float32 weights, in which near-ties of the small model fall the other way.
    dtype = "float32" if small and options.dtype == "auto" else options.dtype
    engine = EngineConfig(
        path=model.path, adapter=options.adapter, dtype=dtype, context=context,
        tensor_parallel=options.tensor_parallel, pixels=pixels, parallel=options.parallel, seed=options.seed,
        eager=small, one_process=small, stall_s=options.stall_s,
        adapter_rank=adapter_rank(options.adapter) if options.adapter else 1,
    )  # fmt: skip
    place = options.ledger or f"{options.root.rstrip('/')}/ledger/{'+'.join(tables)}"
    speak = dialogues(options.prompts or model.prompts, options.answers)
    maker = Maker(model.digest, adapter, engine.settings)
    return Answering(options, model, maker, speak, engine, open_store(place).uri)


def make_job(
    answering: Answering,
    tables: Sequence[str],
    splits: Sequence[str],
    view: Any,
    connect: Callable[[], Any] = lambda: None,
    take: bool = True,
) -> Any:
    """The stages over a view, on Ray, which `connect` reaches when something must be asked. `take`: as the ledger's writer.

    Raises FencedOut.
    """
    from reid_dist.generation.hosting import Hosting, RayRunner
    from reid_dist.generation.ledger import Ledger
    from reid_dist.generation.stages import Answerer, InlineRunner, Job
    from reid_dist.storage import open_store

    options = answering.options
    hosting = Hosting(
        engine=answering.engine, model=options.model, revision=options.revision, data=options.data,
        tables=tuple(tables), splits=tuple(splits), prompts=answering.speak.family, answers=options.answers,
        ledger=answering.ledger, attempt=0, stage="", version="", maker=answering.maker,
    )  # fmt: skip
    runner = RayRunner(hosting, options.engines_min, options.engines, connect=connect)
    rules = InlineRunner(Answerer(answering.speak, _nobody, lambda row: view.encoded([row])[0]))
    ledger = Ledger(open_store(answering.ledger))
    return Job(
        ledger.take() if take else ledger, answering.maker, answering.speak, runner, rules,
        options.retry_errors, options.shard, lambda progress: logger.info("%s", progress.line()),
    )  # fmt: skip


async def _nobody(request: Any) -> Any:
    raise AssertionError("a rule asked a model")


def unique_images(view: Any) -> dict[str, int]:
    """digest -> first row of a view that shows it."""
    import numpy as np

    found: dict[str, int] = {}
    for row, image in enumerate(view.digests(np.arange(len(view)))):
        found.setdefault(image, row)
    return found


def store_rates(place: str, summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep what was measured, for the plans of later jobs."""
    from reid_dist.storage import open_store

    for stage, done in summaries.items():
        if done["calls"] and done["working_seconds"] > 0:
            rate = done["calls"] / done["working_seconds"] / done["workers"]
            open_store(place).write(f"measured/{stage}.json", json.dumps({"calls_per_s": rate, **done}).encode())


def measured_rate(place: str, stage: str) -> float | None:
    """Calls per second and engine of the last job that ran this stage; None when none did."""
    from reid_dist.storage import open_store

    try:
        return float(json.loads(open_store(place).read(f"measured/{stage}.json"))["calls_per_s"])
    except FileNotFoundError:
        return None


def refuse_other_source(root: str, name: str, source: str) -> None:
    """Raises UserError when the side table exists and was made by another model or other prompts."""
    from reid_dist.data.side import open_side_table

    try:
        table = open_side_table(root, name)
    except UserError:
        return
    if table.facts.get("source") != source:
        raise UserError(
            f"side table {name} holds answers of another maker ({table.facts.get('source')}; this job: {source}): "
            "choose another name="
        )
