"""Training of the small model: minutes on two cores, fixed steps, everything from one seed.

1. The vision tower alone learns to tell attributes and boxes, through linear heads on the visual tokens.
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
from reid_dist.data.synthetic.words import SLOTS
from reid_dist.generation.tiny.lessons import Teacher, mirror
from reid_dist.generation.tiny.model import TOKENS, WIDTH, make_config, make_tokenizer
from reid_dist.generation.tiny.questions import BINS, HIDDEN, NO, PARTS, YES, words_of
from reid_dist.generation.tiny.samples import SIDE, UNCLEAR, Pictures, draw_pictures
from reid_dist.generation.tiny.towers import pack, say, see

logger = logging.getLogger(__name__)
# Matrix products in bfloat16: 1.5 times as fast on CPUs that have them. With it the language tower's own attention must be
# the plain one: the backward pass of the fused one under a mask costs more than all the rest (measured).
HALF = torch.autocast("cpu", torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the weights depend on, beside the code."""

    seed: int = 7
    train_worlds: tuple[int, ...] = tuple(range(101, 133))  # six cameras each: unseen colour casts are the hard part
    people: int = 120  # of each world
    images: int = 4  # of each person
    test_worlds: tuple[int, ...] = (201, 202)
    test_people: int = 150
    vision_steps: int = 1700
    vision_batch: int = 32  # twice as many steps of half the size learn more in the same time
    vision_lr: float = 1.5e-3
    joint_steps: int = 800
    joint_batch: int = 16
    joint_lr: float = 1.2e-3
    matrix_lr: float = 0.03  # of Muon, for the matrices inside the blocks
    heads_weight: float = 0.3
    read_steps: int = 280  # of the joint steps: all attributes of a picture are asked, nothing else
    easy_steps: int = 200  # then so many whose match questions have few short phrases
    attributes: int = 4  # questions per picture and step, after reading
    matches: int = 5
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


class Heads(nn.Module):
    """Linear heads on the visual tokens of a picture: a softmax per attribute, one per coordinate of each part's box."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = [len(words_of(name)) for name in ATTRIBUTES]
        self.attributes = nn.Linear(TOKENS * WIDTH, sum(self.classes))
        self.boxes = nn.Linear(TOKENS * WIDTH, len(PARTS) * 4 * (BINS + 1))

    @torch.inference_mode()
    def accuracy(self, seen: Tensor, answers: Tensor) -> dict[str, float]:
        """Per attribute, where the picture shows it: what there is to see for the language tower."""
        found = {}
        for i, (name, said) in enumerate(
            zip(ATTRIBUTES, self.attributes(seen.flatten(1)).split(self.classes, 1), strict=True)
        ):
            shown = (answers[:, i] != UNCLEAR) & (answers[:, i] != list(words_of(name)).index(HIDDEN))
            found[name] = round((said.argmax(1) == answers[:, i])[shown].float().mean().item(), 4)
        return found

    def forward(self, seen: Tensor, answers: Tensor, boxes: Tensor) -> Tensor:
        """Mean loss of visual tokens [B, T, D] against answers [B, A] and boxes [B, 3, 4] (-1: not seen)."""
        flat = seen.flatten(1)
        split = self.attributes(flat).split(self.classes, dim=1)
        losses = [functional.cross_entropy(s, answers[:, i], ignore_index=UNCLEAR) for i, s in enumerate(split)]
        loss = torch.stack(losses).mean()
        said = self.boxes(flat).unflatten(1, (-1, BINS + 1)).flatten(0, 1)
        return loss + 0.5 * functional.cross_entropy(said, boxes.flatten(), ignore_index=-1)


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
    pictures = draw_pictures(recipe.train_worlds, recipe.people, "train", recipe.images)
    test = draw_pictures(recipe.test_worlds, recipe.test_people, "test", 2)
    logger.info("%d pictures to learn from, %d to test, %.0f s", len(pictures), len(test), time.monotonic() - started)
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer()
    model = Qwen2VLForConditionalGeneration(make_config(tokenizer)).float()
    model.set_attn_implementation("eager")
    initialise(model, torch.Generator().manual_seed(recipe.seed))
    heads, rng = Heads(), np.random.default_rng(recipe.seed)
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
    light = torch.from_numpy(pixels).float().flatten(1, 2) @ torch.from_numpy(cast).float()
    seen = (light.clamp(0, 1).pow(torch.from_numpy(curve).float()) * 255).round().to(torch.uint8)
    return seen.unflatten(1, SIDE), torch.from_numpy(pictures.answers[rows]), torch.from_numpy(boxes)


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
        pieces = torch.from_numpy(self.test.pixels).split(100)
        seen = torch.cat([see(self.state.model.model.visual, piece) for piece in pieces])
        return self.heads.accuracy(seen, torch.from_numpy(self.test.answers))

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
            packed = pack([teacher.draw(row, turned, counts, easy) for row, turned in asked], pad)
            wanted = packed.targets >= 0
            with HALF:
                seen = see(model.model.visual, pixels)
                loss = functional.cross_entropy(say(model, seen, packed)[wanted].float(), packed.targets[wanted])
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


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, test: Pictures) -> dict[str, Any]:
    """Accuracy on pictures of people never learned from: per attribute where the picture shows it, "hidden" over all
    attributes of which no pixel is seen, match questions by number of phrases, boxes' IoU.
    """
    teacher = Teacher(test, tokenizer, np.random.default_rng(1))
    right: dict[str, list[bool]] = {}
    overlaps: list[float] = []
    for start in range(0, len(test), 50):
        rows = range(start, min(start + 50, len(test)))
        lessons = []
        kinds: list[list[str]] = []
        for row in rows:
            asked = [(kind, teacher.attribute(row, name)) for name in ATTRIBUTES if (kind := _kind(test, row, name))]
            asked += [(f"match{count}", teacher.match(row, count)[0]) for count in (1, 2, 3, len(SLOTS))]
            asked += [("box", lesson) for part in range(len(PARTS)) if (lesson := teacher.ground(row, part))]
            lessons.append([lesson for _, lesson in asked])
            kinds.append([kind for kind, _ in asked])
        packed = pack(lessons, model.config.text_config.pad_token_id)
        seen = see(model.model.visual, torch.from_numpy(test.pixels[start : start + 50]))
        logits = say(model, seen, packed)
        _score(logits.argmax(2), packed, kinds, tokenizer, right, overlaps)
    attributes = {name: float(np.mean(right[name])) for name in ATTRIBUTES}
    matches = {f"match{count}": float(np.mean(right[f"match{count}"])) for count in (1, 2, 3, len(SLOTS))}
    matches["match"] = float(
        np.mean([*right["match1"], *right["match2"], *right["match3"], *right[f"match{len(SLOTS)}"]])
    )
    hidden = {"hidden": float(np.mean(right["hidden"]))}
    rounded = {name: round(value, 4) for name, value in (attributes | hidden | matches).items()}
    return {
        **rounded,
        "lowest_attribute": min(rounded[n] for n in ATTRIBUTES),
        "box_iou": round(float(np.mean(overlaps)), 4),
    }


def _kind(pictures: Pictures, row: int, name: str) -> str:
    """The attribute's name where the picture shows it (or that its thing is not there), "hidden" where no pixel does, ""
    in between.
    """
    answer = pictures.answers[row, list(ATTRIBUTES).index(name)]
    if answer == UNCLEAR:
        return ""
    return HIDDEN if list(words_of(name))[answer] == HIDDEN else name


def _score(
    said: Tensor,
    packed: Any,
    kinds: list[list[str]],
    tokenizer: Any,
    right: dict[str, list[bool]],
    overlaps: list[float],
) -> None:
    """Compare what is said at the last question token (attributes, matches) or at four places (boxes, each given the
    true numbers before it).
    """
    verdicts = {tokenizer.encode(word)[0] for word in (YES, NO)}
    for b, names in enumerate(kinds):
        for number, kind in enumerate(names, start=1):
            places = torch.nonzero((packed.segment[b] == number) & (packed.targets[b] >= 0)).flatten()[:-1]
            if kind == "box":
                pair = [[int(tokenizer.decode([int(v)])) if tokenizer.decode([int(v)]).strip().isdigit() else 0 for v in row]
                        for row in (said[b, places], packed.targets[b, places])]  # fmt: skip
                overlaps.append(_iou(*pair))
                continue
            last = places[-1]
            assert not kind.startswith("match") or int(packed.targets[b, last]) in verdicts
            right.setdefault(kind, []).append(bool(said[b, last] == packed.targets[b, last]))


def _iou(one: list[int], other: list[int]) -> float:
    def area(box: list[int]) -> int:
        return max(0, box[2] - box[0]) * max(0, box[3] - box[1])

    low = [max(a, b) for a, b in zip(one[:2], other[:2], strict=True)]
    high = [min(a, b) for a, b in zip(one[2:], other[2:], strict=True)]
    both = area([*low, *high])
    return both / max(1, area(one) + area(other) - both)


def facts(recipe: Recipe, trained: Trained) -> dict[str, Any]:
    """What `recipe.json` in the model folder says."""
    return {"recipe": asdict(recipe), "curve": trained.curve, "seconds": round(trained.seconds),
            "threads": torch.get_num_threads()}  # fmt: skip
