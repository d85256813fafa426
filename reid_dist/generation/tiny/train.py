"""Training of the small model: minutes on two cores, fixed steps, everything from one seed.

1. The vision tower alone learns to tell attributes and boxes, through heads on the visual tokens (heads.py).
2. Both towers together learn to answer; the heads' loss stays with a small weight; then the heads are dropped. At first all
   attributes of a picture are asked at once: the language tower learns to read the visual tokens several times faster
   than from a few questions among others (measured). Then match questions, short ones before long ones.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from reid_dist.data.synthetic.identity import ATTRIBUTES
from reid_dist.generation.tiny.evaluate import evaluate
from reid_dist.generation.tiny.heads import Heads
from reid_dist.generation.tiny.lessons import Teacher, mirror
from reid_dist.generation.tiny.model import make_config, make_tokenizer
from reid_dist.generation.tiny.samples import SIDE, Pictures, draw_pictures
from reid_dist.generation.tiny.towers import pack, parted, say, see

logger = logging.getLogger(__name__)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Matrix products in bfloat16: 1.5 times as fast on CPUs that have them. With it the language tower's own attention must be
# the plain one: the backward pass of the fused one under a mask costs more than all the rest (measured).
HALF = torch.autocast(DEVICE.type, torch.bfloat16)
LENGTH = 72  # tokens of a sequence of questions: attention costs the square


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the weights depend on, beside the code."""

    seed: int = 7
    train_worlds: tuple[int, ...] = tuple(range(101, 165))  # six cameras each: unseen colour casts are the hard part
    people: int = 60  # of each world
    images: int = 4  # of each person
    test_worlds: tuple[int, ...] = (201, 202)
    test_people: int = 150
    vision_steps: int = 1600
    vision_batch: int = 32  # twice as many steps of half the size learn more in the same time
    vision_lr: float = 1.5e-3
    joint_steps: int = 1250
    joint_batch: int = 16
    joint_lr: float = 1.2e-3
    matrix_lr: float = 0.03  # of Muon, for the matrices inside the blocks
    heads_weight: float = 0.3
    read_steps: int = 200  # of the joint steps: all attributes of a picture are asked, nothing else
    easy_steps: int = 200  # then so many whose match questions have few short phrases
    attributes: int = 3  # questions per picture and step, after reading
    matches: int = 3
    grounds: int = 1
    save_every: int = 200  # steps
    evaluate_every: int = 400  # joint steps


@dataclass
class Trained:
    """The model, its tokenizer, and test accuracy along the way."""

    model: Any
    tokenizer: Any
    curve: list[dict[str, Any]]
    seconds: float


def initialise(model: Any, generator: torch.Generator) -> None:
    """Linear maps with deviation fan_in ** -0.5, residual outputs smaller by sqrt(2 depth), embeddings 0.08."""
    depth = {"visual": len(model.model.visual.blocks), "language": len(model.model.language_model.layers)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, 0.08, generator=generator)
            elif parameter.ndim >= 2:
                deviation = parameter[0].numel() ** -0.5
                if name.endswith(("attn.proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")):
                    deviation /= math.sqrt(2 * depth["visual" if "visual" in name else "language"])
                parameter.normal_(0, deviation, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()


def train(
    recipe: Recipe, on_progress: Callable[[Trained], None] | None = None, checkpoint: Path | None = None
) -> Trained:
    """Train from nothing, or go on from `checkpoint`, which is written at every evaluation and gives the same weights as
    a run that was never interrupted. `on_progress` gets the state after every evaluation.
    """
    from transformers import Qwen2VLForConditionalGeneration

    started = time.monotonic()
    pictures = draw_pictures(recipe.train_worlds, recipe.people, "train", recipe.images, 2)
    test = draw_pictures(recipe.test_worlds, recipe.test_people, "test", 2)
    logger.info("%d pictures to learn from, %d to test, %.0f s", len(pictures), len(test), time.monotonic() - started)
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer()
    model = Qwen2VLForConditionalGeneration(make_config(tokenizer)).float()
    model.set_attn_implementation("eager")
    initialise(model, torch.Generator().manual_seed(recipe.seed))
    model.to(DEVICE)
    heads, rng = Heads().to(DEVICE), np.random.default_rng(recipe.seed)
    state = Trained(model, tokenizer, [], 0.0)
    teacher = Teacher(pictures, tokenizer, rng)
    phases = _Phases(recipe, state, heads, teacher, test, checkpoint, on_progress or (lambda trained: None))
    phases.resume()
    phases.started = started - state.seconds
    phases.vision()
    phases.joint()
    return state


class _Optimizer:
    """Muon for the matrices inside the towers' blocks, AdamW for everything else; one rate scales both."""

    def __init__(self, modules: list[nn.Module], lr: float, matrix_lr: float) -> None:
        named = {id(p): (name, p) for module in modules for name, p in module.named_parameters()}
        inner = [p for name, p in named.values() if p.ndim == 2 and ("blocks." in name or "layers." in name)]
        chosen = {id(p) for p in inner}
        self.parameters = [p for _, p in named.values()]
        outer = [p for p in self.parameters if id(p) not in chosen]
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(inner, lr=matrix_lr, weight_decay=0.0), matrix_lr),
            (torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True), lr),
        ]

    def step(self, loss: Tensor, rate: float) -> None:
        """One update at `rate` times the learning rates."""
        for optimizer, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        for optimizer, _ in self.parts:
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer, _ in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for (optimizer, _), state in zip(self.parts, states, strict=True):
            optimizer.load_state_dict(state)


def _rate(step: int, steps: int, warmup: int = 30) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _take(
    pictures: Pictures, rows: np.ndarray, mirrored: np.ndarray, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (as another camera would see them; some mirrored), answers and boxes of some pictures."""
    pixels, boxes, count = pictures.pixels[rows], pictures.boxes[rows], len(rows)
    pixels[mirrored], boxes[mirrored] = pixels[mirrored, :, ::-1], mirror(boxes[mirrored])
    cast = np.eye(3) + rng.normal(0, 0.03, (count, 3, 3)) + np.eye(3) * rng.normal(0, 0.06, (count, 1, 3))
    cast *= rng.uniform(0.9, 1.1, (count, 1, 1)) / 255
    curve = np.exp(rng.uniform(-0.15, 0.15, (count, 1, 1)))
    cast, curve = (torch.from_numpy(values).float().to(DEVICE) for values in (cast, curve))
    light = torch.from_numpy(pixels).to(DEVICE).float().flatten(1, 2) @ cast
    seen = (light.clamp(0, 1).pow(curve) * 255).round().to(torch.uint8).unflatten(1, SIDE)
    return seen, torch.from_numpy(pictures.answers[rows]).to(DEVICE), torch.from_numpy(boxes).to(DEVICE)


@dataclass
class _Phases:
    """Both phases with what they share; `done` counts the steps of vision and joint phase together."""

    recipe: Recipe
    state: Trained
    heads: Heads
    teacher: Teacher
    test: Pictures
    checkpoint: Path | None
    on_progress: Callable[[Trained], None]
    started: float = 0.0

    def __post_init__(self) -> None:
        recipe, model = self.recipe, self.state.model
        self.optimizers = {
            "vision": _Optimizer([model.model.visual, self.heads], recipe.vision_lr, recipe.matrix_lr),
            "joint": _Optimizer([model, self.heads], recipe.joint_lr, recipe.matrix_lr),
        }
        self.done = 0

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one of this recipe. Raises ValueError for another recipe's."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        saved = torch.load(self.checkpoint, weights_only=True)
        if saved["recipe"] != json.dumps(asdict(self.recipe)):
            raise ValueError(f"{self.checkpoint} belongs to another recipe: remove it or give that recipe")
        self.state.model.load_state_dict(saved["model"])
        self.heads.load_state_dict(saved["heads"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[name])
        self.teacher.rng.bit_generator.state = json.loads(saved["rng"])
        self.state.curve = json.loads(saved["curve"])
        self.done, self.state.seconds = saved["done"], saved["seconds"]
        logger.info("goes on after step %d", self.done)

    def _save(self) -> None:
        self.state.seconds = time.monotonic() - self.started
        if self.checkpoint is None:
            return
        content = {
            "recipe": json.dumps(asdict(self.recipe)), "model": self.state.model.state_dict(),
            "heads": self.heads.state_dict(), "rng": json.dumps(self.teacher.rng.bit_generator.state),
            "curve": json.dumps(self.state.curve), "done": self.done, "seconds": self.state.seconds,
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }  # fmt: skip
        beside = self.checkpoint.with_suffix(".new")
        torch.save(content, beside)
        beside.replace(self.checkpoint)

    def vision(self) -> None:
        """The vision tower and the heads alone."""
        recipe, pictures, rng = self.recipe, self.teacher.pictures, self.teacher.rng
        while self.done < recipe.vision_steps:
            rows = rng.integers(len(pictures), size=recipe.vision_batch)
            pixels, answers, boxes = _take(pictures, rows, rng.random(len(rows)) < 0.5, rng)
            with HALF:
                loss = self.heads(see(self.state.model.model.visual, pixels), answers, boxes)
            self.optimizers["vision"].step(loss, _rate(self.done, recipe.vision_steps))
            if self.done % 50 == 0:
                logger.info("vision step %d: loss %.3f", self.done, loss.item())
            self.done += 1
            if self.done % recipe.save_every == 0:
                self._save()
        if self.done == recipe.vision_steps:
            logger.info("heads: %s", self._seen())

    @torch.inference_mode()
    def _seen(self) -> dict[str, float]:
        """What the heads tell about the test pictures."""
        pieces = torch.from_numpy(self.test.pixels).to(DEVICE).split(100)
        seen = torch.cat([see(self.state.model.model.visual, piece) for piece in pieces])
        return self.heads.accuracy(seen, torch.from_numpy(self.test.answers).to(DEVICE))

    def joint(self) -> None:
        """Both towers, answers and heads."""
        recipe, teacher, model = self.recipe, self.teacher, self.state.model
        pad = model.config.text_config.pad_token_id
        while (step := self.done - recipe.vision_steps) < recipe.joint_steps:
            rows = teacher.rng.integers(len(teacher.pictures), size=recipe.joint_batch)
            mirrored = teacher.rng.random(len(rows)) < 0.5
            pixels, answers, boxes = _take(teacher.pictures, rows, mirrored, teacher.rng)
            counts, easy = (
                (recipe.attributes, recipe.matches, recipe.grounds),
                step < recipe.read_steps + recipe.easy_steps,
            )
            if step < recipe.read_steps:
                counts = len(ATTRIBUTES), 0, recipe.grounds
            asked = zip(rows.tolist(), mirrored.tolist(), strict=True)
            drawn = [teacher.draw(row, turned, counts, easy) for row, turned in asked]
            sequences = [(place, some) for place, lessons in enumerate(drawn) for some in parted(lessons, LENGTH)]
            packed = pack([some for _, some in sequences], pad).to(DEVICE)
            about = torch.tensor([place for place, _ in sequences], device=DEVICE)
            wanted = packed.targets >= 0
            with HALF:
                seen = see(model.model.visual, pixels)
                loss = functional.cross_entropy(say(model, seen[about], packed)[wanted].float(), packed.targets[wanted])
                total = loss + recipe.heads_weight * self.heads(seen, answers, boxes)
            self.optimizers["joint"].step(total, _rate(step, recipe.joint_steps))
            if step % 50 == 0:
                logger.info("joint step %d: loss %.3f", step, loss.item())
            self.done += 1
            if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.joint_steps:
                found = evaluate(model, self.state.tokenizer, self.test)
                self.state.seconds = time.monotonic() - self.started
                self.state.curve.append({"step": step + 1, "seconds": round(self.state.seconds), **found})
                logger.info("%s", self.state.curve[-1])
                self.on_progress(self.state)
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.joint_steps:
                self._save()


def facts(recipe: Recipe, trained: Trained) -> dict[str, Any]:
    """What `recipe.json` in the model folder says."""
    return {"recipe": asdict(recipe), "curve": trained.curve, "seconds": round(trained.seconds),
            "threads": torch.get_num_threads(), "device": DEVICE.type}  # fmt: skip
