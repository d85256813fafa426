"""Tuning of a multimodal language model as a job: does the picture show the person described (THI of ICL, CVPR 2025)?

One stage: cross-entropy on the tokens of the answer (methods/icl.md section 6, "LoRA fine-tuning"). What we changed and why:
the mean is over all answer tokens of the global batch, so it does not depend on how rows are cut (LLaMA-Factory averages
over devices and accumulation steps); no dropout in the adapter, and the rows follow from a plan of the global batch.

It is no retrieval method: nothing is encoded, and what is evaluated while it trains are answers about held-out people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from reid_dist import losses as shared
from reid_dist.config import Recipe
from reid_dist.data.samplers import EpochPlan, ShufflePlan
from reid_dist.errors import UserError
from reid_dist.methods.spec import (
    Batch,
    Context,
    MethodSpec,
    ModelFacts,
    Outputs,
    ParamGroup,
    PlanPart,
    RecipeStage,
    Reference,
    Stage,
    Terms,
    TrainingData,
)
from reid_dist.methods.vlm.chat import Chat
from reid_dist.methods.vlm.config import Config
from reid_dist.methods.vlm.model import TunedMllm, base_folder, load_base
from reid_dist.methods.vlm.questions import Question, questions_of

if TYPE_CHECKING:
    from reid_dist.data.store import TableView

FIELDS = ("ids", "labels", "length", "pixels", "grid")


class AnswerStage(RecipeStage):
    """The only stage: questions with their answers."""

    name = "tune"

    def __init__(self, recipe: Recipe, data: TrainingData) -> None:
        super().__init__(recipe, data.train)
        self.config: Config = recipe.model
        self.chat = Chat(base_folder(self.config), self.config.pixels)
        self.questions = questions_of(self.config, data.train, "train", recipe.seed)
        if not self.questions:
            raise UserError(
                f"nothing to ask about tables {', '.join(recipe.data.train)}: captions of two people are needed"
            )
        self._plan = ShufflePlan(len(self.questions), self.global_batch, recipe.seed)

    def plan(self) -> EpochPlan:
        """Items are numbers of questions."""
        return self._plan

    def load(self, part: PlanPart) -> Batch:
        """Chat.batch of this rank's questions."""
        return load_questions(self.chat, self.view, [self.questions[item] for item in part.items.tolist()])

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        """The adapter."""
        names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        return [ParamGroup(names, self.recipe.optim.lr, self.recipe.optim.weight_decay)]

    def forward(self, model: nn.Module, batch: Batch, ctx: Context) -> Outputs:
        return answers(model, batch)

    def losses(self, model: nn.Module, out: Outputs, batch: Batch, ctx: Context) -> Terms:
        total = ctx.reduce(out["count"].sum().float())
        return {"answer": shared.masked_lm_ce(out["nll"], out["count"], total=total, world_size=ctx.world_size)}


def load_questions(chat: Chat, view: TableView, questions: Sequence[Question]) -> Batch:
    """The tensors of some questions; of none, tensors of zero rows with the right last axes."""
    if not questions:
        pictures = chat.batch(["a"], ["b"], [np.zeros((56, 56, 3), np.uint8)])
        return {name: value[:0] for name, value in pictures.items()}
    images = view.images([question.row for question in questions])
    return dict(chat.batch([q.question for q in questions], [q.answer for q in questions], images))


def answers(model: nn.Module, batch: Batch) -> Outputs:
    """What the model makes of a batch."""
    out: Outputs = model(**{name: batch[name] for name in FIELDS})
    return out


def judge(recipe: Recipe, data: TrainingData) -> Callable[[nn.Module, Context], dict[str, float]] | None:
    """Answers about the held-out people: share of right ones, their cross-entropy per token. None without such people."""
    if data.val is None:
        return None
    config: Config = recipe.model
    view, chat = data.val, Chat(base_folder(config), config.pixels)
    questions = questions_of(config, view, "val", recipe.seed)
    if not questions:
        return None

    def evaluate(model: nn.Module, ctx: Context) -> dict[str, float]:
        found = ctx.extract(
            model, np.arange(len(questions)), lambda index: load_questions(chat, view, [questions[i] for i in index]),
            answers, recipe.evaluation.batch,
        )  # fmt: skip
        return scores(found, np.array([question.answer == config.answers[0] for question in questions]))

    return evaluate


def scores(found: Outputs, positive: np.ndarray) -> dict[str, float]:
    """accuracy, of both kinds of questions too, and cross-entropy per answer token. positive: bool [N]."""
    right, yes = found["right"].numpy(), torch.from_numpy(positive).numpy()
    kinds = {"accuracy": right, "accuracy_yes": right[yes], "accuracy_no": right[~yes]}
    loss = found["nll"].sum() / found["count"].sum()
    return {**{name: float(values.mean()) for name, values in kinds.items() if len(values)}, "answer_nll": float(loss)}


def check(recipe: Recipe) -> None:
    """Refuse what cannot be served afterwards or has no meaning here. Raises UserError."""
    if recipe.training.select_on == "test":
        raise UserError("training.select_on=test: this method ranks nothing; choose val or none")


def stages(recipe: Recipe, data: TrainingData) -> Sequence[Stage]:
    """One stage. Raises UserError."""
    check(recipe)
    return [AnswerStage(recipe, data)]


def build(config: Config, facts: ModelFacts) -> nn.Module:
    """The base with a fresh adapter (which changes nothing yet). Raises UserError."""
    folder = base_folder(config)
    chat = Chat(folder, config.pixels)
    verdicts = chat.answer_ids(config.answers[0])[0], chat.answer_ids(config.answers[1])[0]
    if verdicts[0] == verdicts[1]:
        raise UserError(f"model.answers={list(config.answers)} begin with the same token of {config.base}")
    return TunedMllm(load_base(folder, config.dtype), config, verdicts)


METHOD = MethodSpec(
    name="vlm",
    task="answers",
    protocol="",
    Config=Config,
    build=build,
    stages=stages,
    eval_batch=None,
    encode=None,
    similarity={},
    reference=Reference(
        paper="Human-centered interactive learning via MLLMs for text-to-image person re-identification (THI: tuned localiser)",
        repository="",
        commit="",
    ),
    facts=lambda data: ModelFacts(),
    judge=judge,
    check=check,
)
