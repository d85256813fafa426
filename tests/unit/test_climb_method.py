"""CLIMB as a method: batches of images and clips, memory, law on gathered rows, evaluation, weights, recipes, refusals."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reid_dist import methods
from reid_dist.config import OptimConfig, Recipe
from reid_dist.data.samplers import rank_slice
from reid_dist.errors import UserError
from reid_dist.methods.climb import METHOD, bank
from reid_dist.methods.climb.config import Config
from reid_dist.methods.climb.figures import heat, patch_ranks, token_order
from reid_dist.methods.climb.losses import batch_hard_triplet
from reid_dist.methods.climb.method import ClimbStage
from reid_dist.methods.climb.model import Climb
from reid_dist.methods.climb.plan import CameraPlan
from reid_dist.methods.climb.weights import import_weights, our_parameter
from reid_dist.methods.spec import EvalSide, ModelFacts
from tests.unit.climb_names import TINY, VIDEO, Alone, FakeView, batch_of, model_for, recipe, stage_of


def bare_stage(config: Config, optim: OptimConfig) -> ClimbStage:
    """A stage without data, for steps on given batches."""
    stage = ClimbStage.__new__(ClimbStage)
    stage.config, stage.recipe = config, Recipe(name="t", method="climb", model=config, optim=optim)
    return stage


VIDEO_VIEW = {"people": 4, "frames": (1, 3, 9), "each": 2}


@pytest.mark.parametrize(("model", "view"), [({"cameras": 2}, {}), (VIDEO, VIDEO_VIEW)], ids=["image", "video"])
def test_a_slice_loads_what_the_whole_batch_loads(model: dict[str, Any], view: dict[str, Any]) -> None:
    stage = stage_of(FakeView(**view), **model)
    whole, part, empty = batch_of(stage), batch_of(stage, rows=slice(2, 5)), batch_of(stage, rows=slice(3, 3))
    for name, value in whole.items():
        assert torch.equal(part[name], value[2:5]), name
        assert empty[name].shape == (0, *value.shape[1:])
    other = batch_of(stage, epoch=1)
    assert not torch.equal(whole["image"], other["image"])


@pytest.mark.parametrize(("model", "view"), [({"cameras": 2}, {}), (VIDEO, VIDEO_VIEW)], ids=["image", "video"])
def test_rows_do_not_depend_on_their_batch_and_steps_run(model: dict[str, Any], view: dict[str, Any]) -> None:
    stage = stage_of(FakeView(**view), **model)
    network, ctx, batch = model_for(stage), Alone(), batch_of(stage)
    stage.begin_epoch(network, ctx)  # type: ignore[arg-type]
    whole = stage.forward(network, batch, ctx)  # type: ignore[arg-type]
    piece = stage.forward(network, {n: t[1:4] for n, t in batch.items()}, ctx)  # type: ignore[arg-type]
    empty = stage.forward(network, {n: t[:0] for n, t in batch.items()}, ctx)  # type: ignore[arg-type]
    for name, value in whole.items():
        torch.testing.assert_close(piece[name], value[1:4], rtol=1e-4, atol=1e-5)
        assert empty[name].shape == (0, *value.shape[1:])
    terms = stage.losses(network, whole, batch, ctx)  # type: ignore[arg-type]
    assert set(terms) == {"memory", "id", "head_id", "triplet"}
    assert all(bool(term.isfinite()) for term in terms.values())
    before = stage.banks.clone()
    stage.after_step(network, whole, batch, ctx)  # type: ignore[arg-type]
    changed = (stage.banks != before).any(2).any(0)
    assert changed.nonzero()[:, 0].tolist() == sorted(set(batch["label"].tolist()))
    torch.testing.assert_close(stage.banks.norm(dim=2), torch.ones(stage.banks.shape[:2]))


def test_head_losses_never_reach_the_tower() -> None:
    stage = stage_of(FakeView(), id_weight=0.0, memory_weight=0.0)
    network, ctx, batch = model_for(stage), Alone(), batch_of(stage)
    stage.begin_epoch(network, ctx)  # type: ignore[arg-type]
    out = stage.forward(network, batch, ctx)  # type: ignore[arg-type]
    sum(stage.losses(network, out, batch, ctx).values()).backward()  # type: ignore[union-attr, arg-type]
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and name.startswith("tower."):
            assert parameter.grad is None or not parameter.grad.any(), name
    assert network.head.mixer.in_proj.weight.grad.any()  # type: ignore[union-attr]
    assert not network.neck.bias.requires_grad
    assert not network.tower.embed.patches.weight.requires_grad


def test_memory_is_rebuilt_every_epoch_or_once() -> None:
    for rebuilt in (True, False):
        stage = stage_of(FakeView(), rebuild_every_epoch=rebuilt)
        network, ctx = model_for(stage), Alone()
        stage.begin_epoch(network, ctx)  # type: ignore[arg-type]
        first = stage.banks.clone()
        with torch.no_grad():
            network.tower.project.weight.mul_(-1)
        ctx.epoch = 1
        stage.begin_epoch(network, ctx)  # type: ignore[arg-type]
        assert torch.equal(stage.banks, first) is not rebuilt
    fresh = stage_of(FakeView())
    fresh.load_state(stage.state())
    assert torch.equal(fresh.banks, stage.banks)


def test_memory_refuses_missing_and_foreign_labels() -> None:
    feat = torch.randn(4, 3)
    with pytest.raises(UserError, match=r"classes \[1\] of 3 have no image"):
        bank.prototypes(feat, torch.tensor([0, 2, 2, -1]), 3)
    with pytest.raises(UserError, match="label 3 with 3 classes"):
        bank.prototypes(feat, torch.tensor([0, 1, 2, 3]), 3)


def textbook_update(banks: Tensor, feat: Tensor, label: Tensor, mu: float, rule: str) -> Tensor:
    """Specification 4.3, one class and one sample after the other."""
    mean, hard = banks.clone()

    def n(v: Tensor) -> Tensor:
        return v / v.norm()

    for c in sorted(set(label.tolist())):
        samples = feat[label == c]
        if rule == "official":
            for x in samples:
                mean[c] = n(mu * mean[c] + (1 - mu) * x)
        chosen = samples[(samples @ (mean if rule == "official" else hard)[c]).argmin()]
        mean[c] = n(mu * mean[c] + (1 - mu) * samples.mean(0))
        hard[c] = n(mu * hard[c] + (1 - mu) * chosen)
    return torch.stack([mean, hard])


@pytest.mark.parametrize("rule", ["official", "paper"])
def test_vectorised_update_is_the_sequential_one(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    banks = unit(torch.randn(2, 7, 5, generator=generator, dtype=torch.float64), dim=2)
    label = torch.tensor([3, 1, 3, 3, 0, 1, 6, 3, 1])  # unequal counts, interleaved
    feat = unit(torch.randn(9, 5, generator=generator, dtype=torch.float64), dim=1)
    expected = textbook_update(banks, feat, label, 0.2, rule)
    bank.update_dual(banks, feat, label, 0.2, rule)
    torch.testing.assert_close(banks, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["mean", "random"])
def test_single_banks_of_the_ablation(rule: str) -> None:
    feat, label = torch.eye(4, dtype=torch.float64), torch.tensor([1, 1, 0, 1])
    memory = torch.full((3, 4), 0.5, dtype=torch.float64)
    bank.update_single(memory, feat, label, 0.5, rule, np.random.default_rng(0))
    torch.testing.assert_close(memory[0], torch.nn.functional.normalize(torch.tensor([1, 1, 3, 1.0]).double(), dim=0))
    assert torch.equal(memory[2], torch.full((4,), 0.5, dtype=torch.float64))
    direction = memory[1] / memory[1].min()  # old part is 1 everywhere
    expected = [[5 / 3, 5 / 3, 1, 5 / 3]] if rule == "mean" else [[3, 1, 1, 1], [1, 3, 1, 1], [1, 1, 1, 3]]
    assert any(np.allclose(direction, row) for row in expected)


@pytest.mark.parametrize("banks", ["instance", "mean", "hard", "random"])
def test_stage_with_one_bank(banks: str) -> None:
    stage = stage_of(FakeView(), banks=banks)
    network, ctx, batch = model_for(stage), Alone(), batch_of(stage)
    stage.begin_epoch(network, ctx)  # type: ignore[arg-type]
    assert stage.banks.shape[0] == 1
    before = stage.banks.clone()
    out = stage.forward(network, batch, ctx)  # type: ignore[arg-type]
    stage.losses(network, out, batch, ctx)  # type: ignore[arg-type]
    stage.after_step(network, out, batch, ctx)  # type: ignore[arg-type]
    assert not torch.equal(stage.banks, before)


def test_triplet_without_a_negative_is_zero_and_differentiable() -> None:
    feat = torch.randn(3, 4, requires_grad=True)
    loss = batch_hard_triplet(feat, torch.zeros(3, dtype=torch.int64)).mean()
    loss.backward()
    assert loss.item() == 0
    assert not feat.grad.any()  # type: ignore[union-attr]
    lone = batch_hard_triplet(torch.randn(3, 4), torch.tensor([0, 1, 1]))
    assert lone.isfinite().all()


def test_camera_plan_prefers_other_cameras_and_repeats_singletons() -> None:
    pids = np.array([7] * 6 + [8] * 3 + [9])
    cams = np.array([0, 0, 0, 0, 1, 2, 0, 0, 0, 1])
    plan = CameraPlan(pids, cams, 8, 4, 5, seed=1)
    sizes = [len(plan.batch(0, step)[0]) for step in range(plan.steps(0))]
    assert sizes == [8, 4, 8, 4, 8]  # three identities: a full and a partial batch per pass
    assert [plan.batch(0, step)[1] for step in range(5)] == [0, 8, 12, 20, 24]
    for step in range(5):
        for group in plan.batch(0, step)[0].reshape(-1, 4):
            assert len(set(pids[group])) == 1
            if pids[group[0]] == 9:
                assert group.tolist() == [9] * 4
            if pids[group[0]] == 7:
                assert (cams[group[1:]] != cams[group[0]]).all()
            if pids[group[0]] == 8:
                assert group[0] not in group[1:]
    assert [plan.batch(1, s)[0].tolist() for s in range(5)] != [plan.batch(0, s)[0].tolist() for s in range(5)]
    again = CameraPlan(pids, cams, 8, 4, 5, seed=1)
    assert again.batch(1, 3)[0].tolist() == plan.batch(1, 3)[0].tolist()
    with pytest.raises(ValueError, match="asked for step 5"):
        plan.batch(0, 5)
    with pytest.raises(UserError, match=r"multiple of model\.instances=4"):
        CameraPlan(pids, cams, 6, 4, 5, 1)
    with pytest.raises(UserError, match="1 identities"):
        CameraPlan(pids[:6], cams[:6], 8, 4, 5, 1)


def test_evaluation_of_images_and_of_clips() -> None:
    images, view = stage_of(FakeView()), FakeView()
    network = model_for(images).eval()
    side = EvalSide("image", np.arange(len(view)), np.zeros(len(view), dtype=np.int64))
    with torch.no_grad():
        out = METHOD.encode(network, METHOD.eval_batch(images.config, view, side, np.array([3, 0])))  # type: ignore[arg-type]
    assert {name: tuple(value.shape) for name, value in out.items()} == {"descriptor": (2, 128 + 128 + 128)}
    assert set(out) == set(METHOD.similarity)
    with pytest.raises(UserError, match="encodes images, not tracklets"):
        METHOD.eval_batch(images.config, view, dataclasses.replace(side, kind="tracklet"), np.array([0]))  # type: ignore[arg-type]


def test_a_camera_that_the_model_does_not_know_is_named() -> None:
    view = FakeView(cameras=3)
    with pytest.raises(UserError, match=r"camera 2, model.cameras=2 knows 0..1"):
        batch_of(stage_of(view, batch=10, cameras=2))
    view.camid = np.full(len(view), -1)
    with pytest.raises(UserError, match="camera -1"):
        batch_of(stage_of(view, cameras=2))


def test_camera_embedding_moves_the_descriptor() -> None:
    stage = stage_of(FakeView(), cameras=2)
    network = model_for(stage).eval()
    image = torch.randn(1, 3, 64, 32).expand(2, -1, -1, -1)
    with torch.no_grad():
        out = network.encode(image, torch.tensor([0, 1]))
    assert not torch.allclose(out[0], out[1], atol=1e-4)


def released(model: Climb) -> dict[str, Tensor]:
    """The model's state under the authors' names: the inverse of our_parameter, by search over the names it accepts."""
    mixer = ["in_proj.weight", "out_proj.weight"]
    for suffix in ("", "_b"):
        mixer += [f"conv1d{suffix}.weight", f"conv1d{suffix}.bias", f"x_proj{suffix}.weight", f"dt_proj{suffix}.weight",
                  f"dt_proj{suffix}.bias", f"A{suffix}_log", f"D{suffix}"]  # fmt: skip
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    blocks = [f"transformer.resblocks.{i}.{part}" for i in range(len(model.tower.blocks)) for part in (
        "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias", "ln_1.weight",
        "ln_1.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
        "mlp.c_proj.bias")]  # fmt: skip
    clip = ["class_embedding", "positional_embedding", "conv1.weight", "proj", "ln_pre.weight", "ln_pre.bias",
            "ln_post.weight", "ln_post.bias", *blocks]  # fmt: skip
    parts = ("bottleneck", "bottleneck_proj", "bottleneck_proj_sp", "classifier", "classifier2", "norm2_mamba",
             "sp_mamba_bi.0", "sp_attention.0", "sp_attention.2")  # fmt: skip
    theirs = [*(f"image_encoder.{n}" for n in clip), *(f"sp_mamba_bi.1.{n}" for n in mixer),
              *(f"{part}.{leaf}" for part in parts for leaf in leaves), "cv_embed"]  # fmt: skip
    names = {ours: f"module.{name}" for name in theirs if (ours := our_parameter(name)) is not None}
    return {names[ours]: tensor.clone() for ours, tensor in model.state_dict().items()}


def test_released_checkpoint_is_imported_whole_and_unused_tensors_listed(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    config = Config(**TINY, cameras=3)
    source, target = (METHOD.build(config, ModelFacts(num_classes=5)) for _ in range(2))
    assert isinstance(source, Climb)
    state = released(source)
    conv = "module.sp_mamba_bi.1.conv1d_b.weight"
    state[conv] = state[conv][:, None]  # theirs is [e, 1, k]
    state |= {"module.sp_mamba_raw.1.A_log": torch.ones(3), "module.norm3_mamba.weight": torch.ones(2)}
    with caplog.at_level(logging.INFO):
        imported = import_weights(target, state)
    assert "100.00 %" in caplog.text
    assert "sp_mamba_raw.1.A_log" in caplog.text
    assert "norm3_mamba.weight" in caplog.text
    target.load_state_dict(imported, strict=True)
    image, camera = torch.randn(2, 3, 64, 32), torch.tensor([2, 0])
    with torch.no_grad():
        torch.testing.assert_close(source.eval().encode(image, camera), target.eval().encode(image, camera))  # type: ignore[operator]


def test_released_classifier_of_other_identities_is_left_out() -> None:
    source = METHOD.build(Config(**TINY), ModelFacts(num_classes=5))
    assert isinstance(source, Climb)
    for classes in (0, 9):
        target = METHOD.build(Config(**TINY), ModelFacts(num_classes=classes))
        imported = import_weights(target, released(source))
        assert set(target.state_dict()) - set(imported) == {"classifier.weight", "classifier_head.weight"}
    video = METHOD.build(Config(**VIDEO), ModelFacts(num_classes=5))
    imported = import_weights(video, released(source))
    assert torch.equal(
        imported["head.scales.2.mixer.out_proj.weight"], source.state_dict()["head.mixer.out_proj.weight"]
    )
    with pytest.raises(UserError, match="do not fit"):
        import_weights(
            METHOD.build(Config(**TINY), ModelFacts(num_classes=5)), {"classifier.weight": torch.zeros(5, 256)}
        )


def test_clip_weights_start_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    from reid_dist.methods.climb import weights

    def fill(towers: Any, source: str) -> None:
        assert source == "openai"
        torch.nn.init.constant_(towers.image.project.weight, 0.25)

    monkeypatch.setattr(weights, "load_clip", fill)
    model = METHOD.build(Config(**TINY), ModelFacts(num_classes=2))
    assert METHOD.start is not None
    METHOD.start(model, Config(**{**TINY, "weights": "openai"}))
    assert (model.tower.project.weight == 0.25).all()  # type: ignore[union-attr, operator]
    assert not model.tower.embed.patches.weight.requires_grad  # type: ignore[union-attr]


def test_reading_order_is_drawn() -> None:
    stage, view = stage_of(FakeView()), FakeView()
    network, config = model_for(stage).eval(), recipe()
    side = EvalSide("image", np.arange(len(view)), np.zeros(len(view), dtype=np.int64))
    figure = token_order(network, config, view, {"image": side})  # type: ignore[arg-type]
    assert figure is not None
    assert figure["kind"] == "images"
    assert len(figure["data"]) == 8
    assert all(len(strip["pictures"]) == 2 for strip in figure["data"])
    rows = np.array([4])
    (rank,) = patch_ranks(network, config, view, rows, view.images(rows))  # type: ignore[arg-type]
    assert rank.shape == (8, 4)
    assert sorted(rank.reshape(-1).tolist()) == list(range(32))
    colours = np.asarray(heat(np.array([[0, 1], [2, 3]]), (2, 2))).sum(-1)
    assert colours[0, 0] > colours[0, 1] > colours[1, 0] > colours[1, 1] == 0


def test_recipes_and_refusals() -> None:
    for name in methods.recipes("climb"):
        loaded = methods.load_recipe(name)
        assert isinstance(loaded.model, Config)
        assert METHOD.check is not None
        METHOD.check(loaded)
    msmt = methods.load_recipe("climb/msmt17")
    assert (msmt.training.global_batch, msmt.model.cameras, msmt.schedule.milestones) == (256, 15, (30, 50, 70))
    for override, message in (
        ("model.temporal_strides=[3]", "divide frames=8"),
        ("model.momentum=1.5", "momentum=1.5"),
        ("model.smoothing=1.0", "smoothing=1.0"),
        ("model.instances=0", "at least 1"),
        ("model.cameras=-1", "not be negative"),
    ):
        with pytest.raises(UserError, match=message):
            methods.load_recipe("climb/mars", [override])
    with pytest.raises(UserError, match="precision=fp32"):
        METHOD.check(methods.load_recipe("climb/mars", ["training.precision=bf16"]))
    dense = ["model.test_clips=dense", "training.zero_stage=3", "training.eval_every=1"]
    with pytest.raises(UserError, match="test_clips=restricted"):
        METHOD.check(methods.load_recipe("climb/mars", dense))


def test_a_batch_of_one_is_refused() -> None:
    stage = stage_of(FakeView())
    network, ctx = model_for(stage), Alone()
    stage.begin_epoch(network, ctx)  # type: ignore[arg-type]
    batch = {name: value[:1] for name, value in batch_of(stage).items()}
    out = stage.forward(network, batch, ctx)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="batch of one image"):
        stage.losses(network, out, batch, ctx)  # type: ignore[arg-type]


def test_an_epoch_of_two_hundred_steps_as_on_market() -> None:
    """751 identities: passes of 6008 items in 94 batches, the last one of 56; 200 steps are two passes and 12 steps."""
    pids, cams = np.repeat(np.arange(751), 4), np.tile(np.arange(4), 751)
    plan = CameraPlan(pids, cams, 64, 8, 200, seed=3)
    batches = [plan.batch(0, step) for step in range(plan.steps(0))]
    sizes = [len(items) for items, _ in batches]
    assert sizes == [*[64] * 93, 56, *[64] * 93, 56, *[64] * 12]
    assert [first for _, first in batches] == np.cumsum([0, *sizes[:-1]]).tolist()
    for start in (0, 94):
        seen = pids[np.concatenate([items for items, _ in batches[start : start + 94]])]
        assert np.bincount(seen).tolist() == [8] * 751
    for world in (1, 2, 3, 4):  # also where the partial batch does not divide
        for items, _ in batches[92:95]:
            cut = [items[rank_slice(len(items), rank, world)] for rank in range(world)]
            assert np.array_equal(np.concatenate(cut), items)
