"""Training of the small model: minutes on two cores, fixed steps, everything from one seed.

1. The vision tower alone learns to tell attributes and boxes, through linear heads on the visual tokens.
2. Both towers together learn to answer; the heads' loss stays with a small weight; then the heads are dropped.
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
from reid_dist.generation.tiny.lessons import Teacher
from reid_dist.generation.tiny.model import TOKENS, WIDTH, make_config, make_tokenizer
from reid_dist.generation.tiny.questions import BINS, HIDDEN, NO, PARTS, YES, words_of
from reid_dist.generation.tiny.samples import Pictures, draw_pictures
from reid_dist.generation.tiny.towers import pack, say, see

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the weights depend on, beside the code."""

    seed: int = 7
    train_worlds: tuple[int, ...] = tuple(range(101, 109))
    people: int = 600  # of each world
    images: int = 3  # of each person
    test_worlds: tuple[int, ...] = (201, 202)
    test_people: int = 150
    vision_steps: int = 900
    vision_batch: int = 64
    vision_lr: float = 1.5e-3
    joint_steps: int = 500
    joint_batch: int = 24
    joint_lr: float = 1.2e-3
    heads_weight: float = 0.3
    attributes: int = 4  # questions per picture and step
    matches: int = 4
    grounds: int = 1
    evaluate_every: int = 250  # joint steps


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

    def forward(self, seen: Tensor, answers: Tensor, boxes: Tensor) -> Tensor:
        """Mean loss of visual tokens [B, T, D] against answers [B, A] and boxes [B, 3, 4] (-1: not seen)."""
        flat = seen.flatten(1)
        split = self.attributes(flat).split(self.classes, dim=1)
        loss = torch.stack([functional.cross_entropy(s, answers[:, i]) for i, s in enumerate(split)]).mean()
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


def _optimizer(modules: list[nn.Module], lr: float) -> torch.optim.AdamW:
    unique = {id(p): p for module in modules for p in module.parameters()}
    return torch.optim.AdamW(unique.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


def _rate(step: int, steps: int, warmup: int = 30) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _step(optimizer: torch.optim.AdamW, loss: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def _take(pictures: Pictures, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (brightness and contrast a little changed), answers and boxes of some pictures."""
    pixels = pictures.pixels[rows].astype(np.float32)
    gain, shift = rng.uniform(0.9, 1.1, (len(rows), 1, 1, 1)), rng.uniform(-10, 10, (len(rows), 1, 1, 1))
    changed = np.clip(pixels * gain + shift, 0, 255).astype(np.uint8)
    return torch.from_numpy(changed), torch.from_numpy(pictures.answers[rows]), torch.from_numpy(pictures.boxes[rows])


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
        visual, lr = self.state.model.model.visual, self.recipe.vision_lr
        self.optimizers = {
            "vision": _optimizer([visual, self.heads], lr),
            "joint": _optimizer([self.state.model, self.heads], self.recipe.joint_lr),
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
            pixels, answers, boxes = _take(pictures, rng.integers(len(pictures), size=recipe.vision_batch), rng)
            loss = self.heads(see(self.state.model.model.visual, pixels), answers, boxes)
            _step(self.optimizers["vision"], loss, recipe.vision_lr * _rate(self.done, recipe.vision_steps))
            if self.done % 50 == 0:
                logger.info("vision step %d: loss %.3f", self.done, loss.item())
            self.done += 1
            if self.done % recipe.evaluate_every == 0:
                self._save()

    def joint(self) -> None:
        """Both towers, answers and heads."""
        recipe, teacher, model = self.recipe, self.teacher, self.state.model
        pad = model.config.text_config.pad_token_id
        while (step := self.done - recipe.vision_steps) < recipe.joint_steps:
            rows = teacher.rng.integers(len(teacher.pictures), size=recipe.joint_batch)
            pixels, answers, boxes = _take(teacher.pictures, rows, teacher.rng)
            packed = pack([teacher.draw(int(r), recipe.attributes, recipe.matches, recipe.grounds) for r in rows], pad)
            seen = see(model.model.visual, pixels)
            wanted = packed.targets >= 0
            loss = functional.cross_entropy(say(model, seen, packed)[wanted], packed.targets[wanted])
            total = loss + recipe.heads_weight * self.heads(seen, answers, boxes)
            _step(self.optimizers["joint"], total, recipe.joint_lr * _rate(step, recipe.joint_steps))
            if step % 50 == 0:
                logger.info("joint step %d: loss %.3f", step, loss.item())
            self.done += 1
            if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.joint_steps:
                found = evaluate(model, self.state.tokenizer, self.test)
                self.state.seconds = time.monotonic() - self.started
                self.state.curve.append({"step": step + 1, "seconds": round(self.state.seconds), **found})
                logger.info("%s", self.state.curve[-1])
                self._save()
                self.on_progress(self.state)


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, test: Pictures) -> dict[str, Any]:
    """Accuracy on pictures of people never learned from: per attribute where the picture shows it, "hidden" over all
    attributes that it does not show, match questions by number of phrases, boxes' IoU.
    """
    teacher = Teacher(test, tokenizer, np.random.default_rng(1))
    right: dict[str, list[bool]] = {}
    overlaps: list[float] = []
    for start in range(0, len(test), 50):
        rows = range(start, min(start + 50, len(test)))
        lessons = []
        kinds: list[list[str]] = []
        for row in rows:
            asked = [(_kind(test, row, name), teacher.attribute(row, name)) for name in ATTRIBUTES]
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
    """The attribute's name where the picture shows it (or that its thing is not there), else "hidden"."""
    value = list(words_of(name))[pictures.answers[row, list(ATTRIBUTES).index(name)]]
    return HIDDEN if value == HIDDEN else name


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
