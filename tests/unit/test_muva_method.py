"""MUVA as a method: sizes of the real model, who trains when, batches, stages, refusals, recipes, figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from reid_dist import methods
from reid_dist.config import DataConfig, OptimConfig, Recipe, RecipeError, TrainingConfig
from reid_dist.data.text import clip_tokenizer
from reid_dist.errors import UserError
from reid_dist.evaluation.domains import DOMAIN_SPLITS
from reid_dist.methods import muva
from reid_dist.methods.muva import METHOD, losses
from reid_dist.methods.muva.config import Config, PromptStageConfig
from reid_dist.methods.muva.figures import mask_iou
from reid_dist.methods.muva.masks import MaskRow, write_masks
from reid_dist.methods.muva.model import Muva
from reid_dist.methods.muva.prompts import people_keys, prompt_templates
from reid_dist.methods.muva.stages import FinetuneStage, PromptStage, parameter_groups
from reid_dist.methods.spec import EvalSide, ModelFacts, PlanPart, TrainingData
from reid_dist.models.clip import ClipTowers, resize_position_table
from tests.dist.muva_cells import LAW_ARCH, PEOPLE, law_recipe, law_view
from tests.unit.muva_names import ArrayView

ROWS = 20
RECIPES = Path(muva.__file__).parent / "recipes"


def stages_for(root: Path, view: ArrayView | None = None, **model: Any) -> tuple[Any, ...]:
    view = view or law_view()
    write_masks(
        str(root), "law", [MaskRow(d, np.eye(3, 8) > 0) for d in view.digests(np.arange(len(view)))], (4, 2), "test"
    )
    return tuple(METHOD.stages(law_recipe(str(root), **model), TrainingData(train=view, val=None)))  # type: ignore[arg-type]


def real_model() -> Muva:
    """ViT-B/16 for Market-1501 without storage."""
    with torch.device("meta"):
        model = METHOD.build(Config(), ModelFacts(num_classes=751))
    assert isinstance(model, Muva)
    return model


def millions(model: Muva, *prefixes: str, without: str = "-") -> float:
    return (
        sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefixes) and not n.startswith(without))
        / 1e6
    )


def test_sizes_of_the_real_model() -> None:
    """methods/muva.md section 3.7, N = 751."""
    model = real_model()
    assert model.grid == (16, 8)
    assert model.image.embed.positions.shape == (132, 768)
    assert millions(model, "image.", without="image.predictors") == pytest.approx(86.1, abs=0.05)
    assert millions(model, "image.embed.patches") == pytest.approx(0.6, abs=0.05)
    assert millions(model, "image.predictors.0.") == pytest.approx(2.48, abs=0.005)
    assert millions(model, "image.predictors") == pytest.approx(29.8, abs=0.05)
    assert millions(model, "text.", without="text.embed.tokens") == pytest.approx(38.1, abs=0.05)
    assert millions(model, "prompts") == 8192 * 751 / 1e6
    assert millions(model, "classifier") == 2048 * 751 / 1e6
    assert millions(model, "", without="text.embed.tokens") == pytest.approx(161.7, abs=0.05)


def test_who_trains_in_which_stage() -> None:
    model = real_model()
    names = [name for name, _ in model.named_parameters()]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    optim = OptimConfig(lr=5e-6, weight_decay=1e-4)
    (prompts,) = parameter_groups(names, "prompts", optim)
    assert prompts.names == ("prompts.context",)
    base, masks = parameter_groups(names, "finetune", optim)
    assert (base.lr, base.weight_decay) == (5e-6, 1e-4)
    assert (masks.lr, masks.weight_decay) == pytest.approx((5e-5, 0.0))
    assert sum(sizes[n] for n in masks.names) == 12 * sum(p.numel() for p in model.image.predictors[0].parameters())
    frozen = set(names) - set(base.names) - set(masks.names)
    outside = ("text.", "prompts.", "neck.bias", "image.embed.patches.")
    assert all(name.startswith(outside) for name in frozen)
    assert {name.split(".")[0] for name in base.names} == {"image", "neck", "classifier"}
    assert len(base.names) + len(masks.names) + len(frozen) == len(names)


def batch_for(stage: Any, step: int = 0, rows: slice = slice(None), epoch: int = 0) -> dict[str, Any]:
    items, first = stage.plan().batch(epoch, step)
    positions = np.arange(first, first + len(items))
    batch: dict[str, Any] = stage.load(PlanPart(items=items[rows], positions=positions[rows], epoch=epoch, seed=1))
    return batch


def test_batches_do_not_depend_on_who_loads_them(tmp_path: Path) -> None:
    prompts, finetune = stages_for(tmp_path)
    assert isinstance(prompts, PromptStage)
    assert isinstance(finetune, FinetuneStage)
    whole = batch_for(finetune)
    assert whole["image"].shape == (6, 3, 32, 16)
    assert whole["visible"].shape == (6, 3, 8)
    assert whole["visible"].dtype == torch.bool
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 6)):
        own = batch_for(finetune, rows=rows)
        for name, value in own.items():
            assert torch.equal(value, whole[name][rows]), name
    labels = batch_for(prompts)["label"].reshape(3, 2)
    assert (labels == labels[:, :1]).all()
    assert len(set(labels[:, 0].tolist())) == 3


def test_flips_move_image_and_mask_together(tmp_path: Path) -> None:
    _, finetune = stages_for(tmp_path, flip=1.0)
    _, plain = stages_for(tmp_path, flip=0.0)
    flipped, straight = batch_for(finetune), batch_for(plain)
    assert torch.equal(flipped["image"], straight["image"].flip(-1))
    unfolded = straight["visible"].unflatten(-1, (4, 2))
    assert torch.equal(flipped["visible"], unfolded.flip(-1).flatten(2))


def test_text_is_computed_once_per_identity_and_on_few_tokens() -> None:
    model = METHOD.build(law_recipe("x").model, ModelFacts(num_classes=PEOPLE))
    assert isinstance(model, Muva)
    seen: list[tuple[int, ...]] = []
    model.text.embed.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    labels = torch.tensor([3, 3, 1, 1, 3])
    short = model.text_features(labels)
    assert seen == [(2 * 4, model.templates.length, 16)]
    assert model.templates.length < LAW_ARCH.context_length
    literal = model.encode_prompts(labels, LAW_ARCH.context_length)  # every row, all positions
    torch.testing.assert_close(short, literal, rtol=1e-4, atol=1e-6)
    grads = []
    for feat in (short, literal):
        model.zero_grad()
        feat.square().sum().backward()
        grads.append(model.prompts.context.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)


def test_towers_start_from_clip() -> None:
    config = Config(arch="muva-law", image_size=(32, 16), prompt_words=2)
    model = METHOD.build(config, ModelFacts(num_classes=2))
    assert isinstance(model, Muva)
    towers = ClipTowers(LAW_ARCH)
    before = model.image.embed.part_tokens.detach().clone()
    model.take_towers(towers)
    positions = model.image.embed.positions
    assert torch.equal(positions[:4], towers.image.embed.positions[:1].expand(4, -1))  # class and three parts
    assert torch.equal(positions[4:], towers.image.embed.positions[1:])
    assert torch.equal(model.image.blocks[1].mlp.fc.weight, towers.image.blocks[1].mlp.fc.weight)
    assert torch.equal(model.text.embed.tokens.weight, towers.text.embed.tokens.weight)
    assert torch.equal(model.image.embed.part_tokens, before)
    assert resize_position_table(torch.zeros(197, 4), (16, 8)).shape == (129, 4)


def test_empty_parts_and_no_rows_give_numbers() -> None:
    model = METHOD.build(Config(arch="muva-law", image_size=(32, 16), prompt_words=2), ModelFacts(num_classes=2)).eval()
    assert isinstance(model, Muva)
    image = torch.rand(2, 3, 32, 16)
    hidden = model.image.features(image, torch.zeros(2, 3, 8, dtype=torch.bool))
    assert hidden.feat.isfinite().all()
    none = model.image.features(image[:0])
    assert none.feat.shape == (0, 32)
    assert none.logits is not None
    assert none.logits.shape == (0, 2, 3, 8)
    bare = METHOD.build(
        Config(arch="muva-law", image_size=(32, 16), parts=(), prompt_words=2), ModelFacts(num_classes=2)
    )
    assert isinstance(bare, Muva)
    found = bare.image.features(image)
    assert found.logits is None
    assert found.feat.shape == (2, 8)


def test_a_part_token_sees_its_patches_alone() -> None:
    """A pixel of a patch outside a part does not move that part's vector in the first layer's worth of mixing."""
    arch = dataclasses.replace(LAW_ARCH, image_layers=1)
    templates = prompt_templates(("head",), 2, "universal", "", clip_tokenizer(600), 64)
    config = Config(arch="muva-law", image_size=(32, 16), parts=("head",), prompt_words=2)
    torch.manual_seed(0)
    model = Muva(arch, config, 2, templates).eval()
    visible = torch.zeros(1, 1, 8, dtype=torch.bool)
    visible[0, 0, :2] = True  # the grid's first row
    image = torch.rand(1, 3, 32, 16)
    changed = image.clone()
    changed[:, :, 16:] += 1.0
    with torch.no_grad():
        a, b = (model.image.features(x, visible, attention=True) for x in (image, changed))
    torch.testing.assert_close(a.feat[:, 8:], b.feat[:, 8:])
    assert not torch.allclose(a.feat[:, :8], b.feat[:, :8])
    assert a.attention is not None
    assert a.attention[0, 0, 2:].abs().max() == 0
    assert a.attention[0, 0, :2].min() > 0


def learn(prompts: PromptStage, model: Muva) -> None:
    """What the stage writes after its last step."""
    model.prompts.sign(prompts.people, prompts.settings)


def test_prompts_of_other_people_are_refused(tmp_path: Path) -> None:
    prompts, finetune = stages_for(tmp_path)
    model = METHOD.build(finetune.config, ModelFacts(num_classes=PEOPLE))
    assert isinstance(model, Muva)
    with pytest.raises(UserError, match=r"hold no learnt prompts .*init=run:URI"):
        finetune.begin_stage(model, None)
    learn(prompts, model)
    finetune.begin_stage(model, None)  # the same people
    other = ArrayView([i.transpose(2, 0, 1) for i in law_view().images(np.arange(ROWS))], law_view().pid + 1)
    _, elsewhere = stages_for(tmp_path, other)
    with pytest.raises(UserError, match="another label map: 5 of 5 labels"):
        elsewhere.begin_stage(model, None)
    painted = ArrayView([255 - i.transpose(2, 0, 1) for i in law_view().images(np.arange(ROWS))], law_view().pid)
    _, lookalike = stages_for(tmp_path, painted)
    with pytest.raises(UserError, match="5 of 5 labels stand for other people or other images"):
        lookalike.begin_stage(model, None)  # numbers and domain agree
    few = ArrayView([i.transpose(2, 0, 1) for i in law_view().images(np.arange(16))], law_view().pid[:16])
    _, fewer = stages_for(tmp_path, few)
    with pytest.raises(UserError, match="another label map: 4 of 4"):
        fewer.begin_stage(model, None)
    _, free = stages_for(tmp_path, other, weight_i2t=0.0)
    free.begin_stage(model, None)  # no prompts, nothing to check


@pytest.mark.parametrize(
    ("key", "value"),
    [("prompt_words", 3), ("template", "part-agnostic"), ("domain_text", "at night"), ("parts", ("head",))],
)
def test_prompts_learnt_otherwise_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    """A seed's tensors of another shape are not loaded, so its settings must be compared."""
    prompts, _ = stages_for(tmp_path)
    model = METHOD.build(prompts.config, ModelFacts(num_classes=PEOPLE))
    assert isinstance(model, Muva)
    learn(prompts, model)
    _, finetune = stages_for(tmp_path, **{key: value})
    with pytest.raises(UserError, match=rf"learnt with another value of model\.{key}: use"):
        finetune.begin_stage(model, None)


def test_prompts_are_signed_by_the_last_step_of_their_stage(tmp_path: Path) -> None:
    prompts, finetune = stages_for(tmp_path)
    model = METHOD.build(prompts.config, ModelFacts(num_classes=PEOPLE))
    assert isinstance(model, Muva)
    steps = [prompts.plan().steps(epoch) for epoch in range(prompts.epochs)]
    assert min(steps) > 1
    for step in range(sum(steps)):
        with pytest.raises(UserError, match="reached its end"):
            finetune.begin_stage(model, None)
        epoch = int(np.searchsorted(np.cumsum(steps), step, side="right"))
        prompts.after_step(model, {}, {}, SimpleNamespace(epoch=epoch, step=step))
    finetune.begin_stage(model, None)


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    label = np.array([0, 0, 2])
    with pytest.raises(UserError, match=r"classes without images: \[1\]"):
        people_keys(np.array(["d", "d", "d"]), np.array([5, 5, 7]), label, ["1", "2", "3"])
    with pytest.raises(ValueError, match=r"classes without rows: \[1\]"):
        losses.class_centroids(torch.ones(3, 2), torch.from_numpy(label))
    with pytest.raises(ValueError, match="classes without rows: all"):
        losses.class_centroids(torch.ones(0, 2), torch.zeros(0, dtype=torch.int64))
    view = law_view()
    view.label = np.where(view.label == 1, 7, view.label)
    with pytest.raises(UserError, match=r"classes without images: \[1, 5, 6\]; labels must run from 0"):
        stages_for(tmp_path, view)


def test_people_are_known_by_domain_number_and_images() -> None:
    pid, label = np.array([5, 7, 7]), np.array([0, 1, 1])

    def keys(domain: str, *digests: str) -> list[int]:
        return people_keys(np.array([domain] * 3), pid, label, digests).tolist()  # type: ignore[no-any-return]

    usual = keys("d", "x", "y", "z")
    assert keys("d", "x", "z", "y") == usual  # the order of images says nothing
    assert len({*usual, *keys("e", "x", "y", "z")}) == 4  # the same numbers in another domain are other people
    assert [a == b for a, b in zip(usual, keys("d", "x", "y", "w"), strict=True)] == [True, False]
    assert people_keys(np.array(["d"]), np.array([6]), np.array([0]), ["x"]).tolist() != usual[:1]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"parts": ("head", "head")}, "at most once"),
        ({"stages": ("finetune", "prompts")}, "choose"),
        ({"memory_temperature": 0.0}, "must be positive"),
        ({"mask_temperature": 2.0}, "needs mask_loss=mse"),
        ({"gating": "online", "gate_scale": 0.0}, "masks nothing"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"prompts": PromptStageConfig(epochs=0)}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Config(**wrong)


def test_models_that_cannot_be_built_are_refused() -> None:
    facts = ModelFacts(num_classes=2)
    with pytest.raises(UserError, match="mask_heads=5"):
        METHOD.build(Config(mask_heads=5), facts)
    with pytest.raises(UserError, match=r"part_tokens=patches: 4 rows of patches cannot be cut into 3 bands"):
        METHOD.build(Config(arch="muva-law", image_size=(32, 16), part_tokens="patches", prompt_words=2), facts)
    with pytest.raises(UserError, match=r"lower model.prompt_words"):
        METHOD.build(Config(arch="muva-law", image_size=(32, 16), prompt_words=60), facts)
    with pytest.raises(UserError, match="encodes images, not texts"):
        METHOD.eval_batch(Config(), law_view(), EvalSide("text", np.arange(2), np.arange(2)), np.arange(1))  # type: ignore[arg-type]


def test_recipes_cover_the_published_protocols() -> None:
    loaded = {name.split("/")[1]: methods.load_recipe(name) for name in methods.recipes("muva")}
    made = {
        (recipe.data.train, recipe.data.test, recipe.data.train_splits, recipe.evaluation.protocol or METHOD.protocol)
        for recipe in loaded.values()
    }
    for split in DOMAIN_SPLITS.values():
        if split.name.split("/")[0] in ("ss", "loo4-train", "small4"):
            splits = ("train",) if split.images == "train" else ("train", "query", "gallery")
            assert (split.sources, (split.target,), splits, split.protocol) in made, split.name
    for name, recipe in loaded.items():
        assert isinstance(recipe.model, Config), name
        assert not set(recipe.data.train) & set(recipe.data.test) or name == "tiny"
        if name not in ("tiny", "synthetic"):
            assert (recipe.training.epochs, recipe.model.prompts.epochs, recipe.training.global_batch) == (60, 120, 64)
            assert recipe.model.mask_heads == (8 if recipe.data.train == ("msmt17",) else 2)
            assert recipe.training.select_on == "none"
            assert recipe.model.masks == tuple(f"{table}-masks" for table in recipe.data.train)
        if name not in ("tiny", "synthetic"):
            text = " ".join((RECIPES / f"{name}.yaml").read_text().replace("\n# ", " ").split())
            single = recipe.data.train in (("market-1501",), ("msmt17",))
            said = ("published for", "published settings for", "whose settings the authors published")
            no_value = "published no settings for this source", "published no configuration"
            assert any(phrase in text for phrase in (said if single else no_value)), name
            assert single or "our choice" in text, name
    with pytest.raises(RecipeError, match="memory_momentum"):
        methods.load_recipe("muva/market1501_to_msmt17", ["model.memory_momentums=0.3"])


def test_mask_iou() -> None:
    predicted = np.array([[[True, True, False, False]], [[False, False, False, False]]])
    target = np.array([[[True, False, True, False]], [[False, False, False, False]]])
    assert mask_iou(predicted, target).tolist() == [pytest.approx(1 / 3)]  # an image without either does not count


def test_the_stage_of_a_recipe_without_training_rows_for_a_batch(tmp_path: Path) -> None:
    view = law_view()
    write_masks(
        str(tmp_path), "law", [MaskRow(d, np.eye(3, 8) > 0) for d in view.digests(np.arange(ROWS))], (4, 2), "t"
    )
    recipe = Recipe(
        name="r", method="muva", model=law_recipe("x").model, data=DataConfig(root=str(tmp_path)),
        training=TrainingConfig(global_batch=12),
    )  # fmt: skip
    with pytest.raises(UserError, match="needs 6 identities, the training data has 5"):
        METHOD.stages(recipe, TrainingData(train=view, val=None))  # type: ignore[arg-type]
