"""RLE's golden vectors through the project's code: augmentation, losses, network, sampler, schedule, features."""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reid_dist.config import ScheduleConfig
from reid_dist.data.paired import lay_out_pairs, modality_rows
from reid_dist.losses.triplet import batch_hard_triplet, weighted_pairs, weighted_regularised_triplet
from reid_dist.methods import load_recipe
from reid_dist.methods.rle.config import AugmentConfig, Config
from reid_dist.methods.rle.linear import (
    applies,
    erase,
    first_fit,
    mix_channels,
    mix_weights,
    propose_regions,
    scale_regions,
)
from reid_dist.methods.rle.method import METHOD, encode
from reid_dist.methods.rle.model import BRANCHES, PartHead, TwoStream, test_vectors, unit_power
from reid_dist.methods.rle.objective import objective
from reid_dist.methods.rle.transforms import Chain, Geometry
from reid_dist.methods.spec import ModelFacts
from reid_dist.models.batchnorm import BatchNorm1d
from reid_dist.models.resnet import Bottleneck, ResNetShape, Stem, Trunk
from reid_dist.training.schedule import lr_at
from tests.golden import cases, load

test_vectors.__test__ = False  # type: ignore[attr-defined] # a name of ours, not a test


def close(ours: Any, theirs: Any, tolerance: float) -> None:
    """|a - b| <= tolerance (1 + |b|), as the README says."""
    a = np.asarray(ours.detach() if isinstance(ours, Tensor) else ours)
    assert a.shape == np.shape(theirs)
    worst = np.max(np.abs(a - theirs) / (1 + np.abs(theirs)), initial=0.0)
    assert worst <= tolerance, f"off by {worst:.3g}"


class Recorded:
    """A source of recorded draws, one list for all kinds."""

    def __init__(self, values: Any) -> None:
        self.left = deque(float(v) for v in values)

    def random(self) -> float:
        return self.left.popleft()

    def uniform(self, low: float, high: float) -> float:
        value = self.left.popleft()
        assert low <= value <= high
        return value

    def integers(self, low: int, high: int) -> int:
        value = int(self.left.popleft())
        assert low <= value < high
        return value

    def beta(self, a: float, b: float) -> float:
        return self.left.popleft()


class Seeded:
    """The original's two generators."""

    def __init__(self, python: int, numpy: int) -> None:
        self.python, self.numpy = random.Random(python), np.random.RandomState(numpy)

    def random(self) -> float:
        return self.python.uniform(0, 1)

    def uniform(self, low: float, high: float) -> float:
        return self.python.uniform(low, high)

    def integers(self, low: int, high: int) -> int:
        return self.python.randint(low, high - 1)

    def beta(self, a: float, b: float) -> float:
        return float(self.numpy.beta(a, b))


def proposals(case: dict[str, Any]) -> list[float]:
    """The recorded draws of the rectangles, one after another; a proposal that does not fit stops after two."""
    values: list[float] = []
    for i, (area, aspect) in enumerate(zip(case["att_area_frac"], case["att_aspect"], strict=True)):
        values += [area, aspect]
        if case["att_row"][i] >= 0:
            values += [case["att_row"][i], case["att_col"][i]]
            values += case["att_beta"][i].tolist() if "att_beta" in case else []
    return values


@cases("rle", "mrle")
def test_moderate(case: Path) -> None:
    g = load(case)
    image = g["in_img"].copy()
    out = image
    if applies(g["in_u"], g["c_p"]):
        weights = mix_weights(g["draw_beta"])
        close(weights, g["out_weights"], 1e-12)
        out = mix_channels(image, weights)
    close(out, g["out_img"], 1e-6)
    assert np.array_equal(image, g["in_img"]), "the caller's image changed"
    off = AugmentConfig(pad=0, flip=0, moderate=g["c_p"], radical=0, erase=0)
    chain = Chain(image.shape[1:], off, mean=(0, 0, 0), std=(1, 1, 1))  # the chain's own, in place
    chain.enhance(image, Recorded([g["in_u"], *g["draw_beta"]]))
    close(image, g["out_img"], 1e-6)


@cases("rle", "rrle")
def test_radical(case: Path) -> None:
    g = load(case)
    image = g["in_img"].copy()
    out, attempts, regions = image, 0, 0
    if applies(g["in_u"], g["c_p"]):
        limits = ((g["c_area_min"], g["c_area_max"]), g["c_aspect_min"], g["c_beta"])
        source = Recorded(proposals(g))
        out, attempts, regions = scale_regions(image, propose_regions(source, image.shape, *limits), g["c_min_out"])
    close(out, g["out_img"], 1e-5)
    assert (attempts, regions) == (g["out_num_attempts"], g["out_num_regions"])
    assert np.array_equal(image, g["in_img"]), "the caller's image changed"


@cases("rle", "random_erasing")
def test_erasing(case: Path) -> None:
    g = load(case)
    out, used = g["in_img"], 0
    if applies(g["in_u"], g["c_p"]):
        values = proposals(g)
        source = Recorded(values)
        _, rows, columns = out.shape
        box = first_fit(source, rows, columns, (g["c_area_min"], g["c_area_max"]), g["c_aspect_min"])
        out = erase(out, box, tuple(g["c_fill"].tolist()))
        assert not source.left
        used = len(g["att_area_frac"])
    close(out, g["out_img"], 1e-6)
    assert used == g["out_num_attempts"]


@cases("rle", "augment_chain")
@pytest.mark.parametrize("replay", ["draws", "seeds"])
def test_chain(case: Path, replay: str) -> None:
    g = load(case)
    config = AugmentConfig(
        moderate=g["c_p"], moderate_beta=g["c_beta_moderate"], radical=g["c_p"], radical_beta=g["c_beta_radical"],
        threshold=g["c_min_out"], erase=g["c_p_erase"],
    )  # fmt: skip
    images = g["in_img_u8"].astype(np.float32) / 255
    seeded = Seeded(g["in_seed_python"], g["in_seed_numpy"])
    mean, std = (np.array(getattr(Chain((1, 1)), name))[:, None, None] for name in ("mean", "std"))
    for i, image in enumerate(images):
        draws = g["draw_value"][g["draw_image"] == i]
        for key, off in (("out_after_mrle", {"radical": 0.0, "erase": 0.0}), ("out_after_rrle", {"erase": 0.0})):
            early = image.copy()
            Chain(image.shape[1:], dataclasses.replace(config, **off)).enhance(early, Recorded(draws))
            close(early * std + mean, g[key][i], 2e-5)
        out = image.copy()
        Chain(image.shape[1:], config).enhance(out, Recorded(draws) if replay == "draws" else seeded)
        close(out, g["out_img"][i], 2e-5)
        close(out * std + mean, g["out_after_erase"][i], 2e-5)


@cases("rle", "train_geometry")
def test_geometry(case: Path) -> None:
    g = load(case)
    out = np.full((3, *g["c_crop_hw"].tolist()), np.nan, dtype=np.float32)
    chain = Chain(tuple(g["c_crop_hw"].tolist()), AugmentConfig(pad=g["c_pad"]))
    chain.place(
        g["in_img_u8"], Geometry(g["in_crop_top"], g["in_crop_left"], bool(g["in_flip"]), bool(g["in_gray"])), out
    )
    close(out, g["out_img"], 1e-6)


@cases("rle", "eval_preprocess")
def test_evaluation_preprocessing(case: Path) -> None:
    g = load(case)
    chain = Chain(tuple(g["c_hw"].tolist()), mean=tuple(g["c_mean"].tolist()), std=tuple(g["c_std"].tolist()))
    close(chain.apply_all([g["in_img_u8"]])[0], g["out_img"], 1e-6)


@cases("rle", "batch_hard_triplet")
def test_batch_hard(case: Path) -> None:
    g = load(case)
    tolerance = 1e-4 if g["in_feat"].dtype == np.float32 else 1e-8
    feat = torch.from_numpy(g["in_feat"]).requires_grad_()
    loss = batch_hard_triplet(feat, torch.from_numpy(g["in_label"]), margin=g["c_margin"])
    loss.backward()
    close(loss, g["out_loss"], tolerance)
    close(feat.grad, g["grad_feat"], tolerance)


@cases("rle", "weighted_reg_triplet")
def test_weighted_regularised(case: Path) -> None:
    g = load(case)
    feat, label = torch.from_numpy(g["in_feat"]).requires_grad_(), torch.from_numpy(g["in_label"])
    loss = weighted_regularised_triplet(feat, label, normalize=bool(g["c_normalize"]))
    loss.backward()
    close(loss, g["out_loss"], 1e-8)
    close(feat.grad, g["grad_feat"], 1e-8)
    positive, negative = weighted_pairs(feat, label, normalize=bool(g["c_normalize"]))
    assert int((negative >= positive).sum()) == g["out_correct"]


@cases("rle", "total_objective")
def test_total_objective(case: Path) -> None:
    g = load(case)
    feat, logit = (
        torch.stack([torch.from_numpy(g[f"in_{kind}_{b}"]) for b in BRANCHES], dim=1).requires_grad_()
        for kind in ("feat", "logit")
    )
    terms = objective(feat, torch.from_numpy(g["in_label"]), logit, Config(margin=g["c_margin"]))
    sum(terms.values()).backward()
    close(terms["id"], g["out_loss_id"], 1e-8)
    close(terms["triplet"], g["out_loss_tri"], 1e-8)
    close(terms["id"] + terms["triplet"], g["out_loss"], 1e-8)
    for i, b in enumerate(BRANCHES):
        close(feat.grad[:, i], g[f"grad_feat_{b}"], 1e-8)
        close(logit.grad[:, i], g[f"grad_logit_{b}"], 1e-8)


def fill_head(head: PartHead, g: dict[str, Any]) -> None:
    state = head.state_dict()
    for b in BRANCHES:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"bnneck_{b}.{leaf}"] = torch.from_numpy(g[f"w_bn_{b}_{leaf}"])
        state[f"classifier_{b}.weight"] = torch.from_numpy(g[f"w_cls_{b}_weight"])
    head.load_state_dict(state)


def unit_vectors(out: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"pool": unit_power(out["feat"].flatten(1)), "bn": unit_power(out["neck"].flatten(1))}


@cases("rle", "stripe_head")
def test_stripe_head(case: Path) -> None:
    g = load(case)
    classes, channels = g["w_cls_g_weight"].shape
    head = PartHead(channels, classes).double()
    fill_head(head, g)
    maps = [torch.from_numpy(g[f"in_map_{m}"]).requires_grad_() for m in ("vis", "ir")]
    head.eval()
    for name, part in zip(("vis", "ir"), maps, strict=True):
        for kind, value in unit_vectors(head(part * g["c_last_stage_scale"])).items():
            close(value, g[f"out_eval_{kind}_{name}"], 1e-8)
    head.train()
    out = head(torch.cat(maps) * g["c_last_stage_scale"])
    total = torch.zeros(())
    for i, b in enumerate(BRANCHES):
        for kind in ("feat", "logit"):
            close(out[kind][:, i], g[f"out_{kind}_{b}"], 1e-8)
            total = total + (out[kind][:, i] * torch.from_numpy(g[f"in_cot_{kind}_{b}"])).sum()
    total.backward()
    for name, part in zip(("vis", "ir"), maps, strict=True):
        close(part.grad, g[f"grad_map_{name}"], 1e-8)
    for b in BRANCHES:
        neck = head.get_submodule(f"bnneck_{b}")
        assert isinstance(neck, BatchNorm1d)
        assert neck.bias.grad is None
        close(neck.weight.grad, g[f"grad_bn_{b}_weight"], 1e-8)
        close(head.get_parameter(f"classifier_{b}.weight").grad, g[f"grad_cls_{b}_weight"], 1e-8)
        close(neck.running_mean, g[f"out_after_bn_{b}_running_mean"], 1e-8)
        close(neck.running_var, g[f"out_after_bn_{b}_running_var"], 1e-8)


@cases("rle", "l2_normalize")
def test_unit_power(case: Path) -> None:
    g = load(case)
    feat = torch.from_numpy(g["in_feat"]).requires_grad_()
    out = unit_power(feat, g["c_power"])
    (out * torch.from_numpy(g["in_cot"])).sum().backward()
    close(out, g["out_feat"], 1e-9)
    close(feat.grad, g["grad_feat"], 1e-9)


@cases("rle", "bottleneck_unit")
def test_bottleneck(case: Path) -> None:
    g = load(case)
    mid, inputs = g["w_conv1_weight"].shape[:2]
    unit = Bottleneck(inputs, mid, g["c_stride"], g["c_dilation"]).double()
    state = {key: g[f"w_{key.replace('.', '_')}"] for key in unit.state_dict() if not key.endswith("tracked")}
    unit.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=False)
    x = torch.from_numpy(g["in_x"]).requires_grad_()
    unit.eval()
    close(unit(x), g["out_eval"], 1e-8)
    unit.train()
    out = unit(x)
    (out * torch.from_numpy(g["in_cot"])).sum().backward()
    close(out, g["out_train"], 1e-8)
    close(x.grad, g["grad_x"], 1e-8)


def recipe_weights(model: nn.Module, seed: int) -> int:
    """The specification's weights by name (section 12); returns the number of tensors filled."""
    filled = 0
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        canonical = name.removeprefix("head.")
        rng = np.random.RandomState((zlib.crc32(canonical.encode()) + seed) % 2**32)
        shape, leaf = tuple(value.shape), canonical.rpartition(".")[2]
        if leaf in ("running_mean", "bias"):
            made = 0.1 * rng.standard_normal(shape)
        elif leaf == "running_var":
            made = 0.5 + rng.uniform(size=shape)
        elif len(shape) == 1:
            made = 0.1 + 0.1 * rng.uniform(size=shape) if ".bn3." in canonical else 0.5 + rng.uniform(size=shape)
        else:
            gain = 2.0 if len(shape) == 4 else 1.0
            made = rng.standard_normal(shape) * np.sqrt(gain / np.prod(shape[1:]))
        value.copy_(torch.from_numpy(np.asarray(made)))
        filled += 1
    return filled


@cases("rle", "two_stream_net")
def test_two_stream_network(case: Path) -> None:
    g = load(case)
    config = Config(
        weights="", last_stage=bool(g["c_use_last_stage"]), image_size=tuple(g["in_img_vis_u8"].shape[-2:]), fusion=0.0
    )
    model = METHOD.build(config, ModelFacts(num_classes=g["c_num_classes"])).double()
    assert isinstance(model, TwoStream)
    with torch.no_grad():
        assert recipe_weights(model, g["c_seed"]) == g["out_num_tensors"]
    images = {m: (torch.from_numpy(g[f"in_img_{m}_u8"]).double() / 255 - 0.5) / 0.25 for m in ("vis", "ir")}
    model.eval()
    both = torch.cat([images["ir"], images["vis"]])
    infrared = torch.arange(len(both)) < len(images["ir"])
    with torch.no_grad():
        vectors = test_vectors(model, both, infrared, flip=False)
        for kind, value in vectors.items():
            close(value[infrared][:, g["in_subset"]], g[f"out_eval_{kind}_ir"], 1e-7)
            close(value[~infrared][:, g["in_subset"]], g[f"out_eval_{kind}_vis"], 1e-7)
        model.train()
        out = model(images["vis"], images["ir"])
    close(out["feat"].flatten(1)[:, g["in_subset"]], g["out_train_feat"], 1e-7)
    for i, b in enumerate(BRANCHES):
        close(out["logit"][:, i], g[f"out_train_logit_{b}"], 1e-7)
    close(model.get_buffer("trunk.layer3.0.bn1.running_mean"), g["out_trunk_layer3_0_bn1_running_mean"], 1e-7)
    close(model.get_buffer("visible_stem.bn1.running_mean"), g["out_visible_stem_bn1_running_mean"], 1e-7)


@cases("rle", "lr_schedule")
def test_schedule(case: Path) -> None:
    g = load(case)
    schedule: ScheduleConfig = load_recipe("rle/sysu_mm01").schedule
    factor = load_recipe("rle/sysu_mm01").model.backbone_lr_factor
    for group, base in (("head", g["c_base_lr"]), ("backbone", factor * g["c_base_lr"]), ("returned", g["c_base_lr"])):
        ours = [lr_at(base, int(e), len(g["out_epoch"]), schedule) for e in g["out_epoch"]]
        close(np.array(ours), g[f"out_lr_{group}"], 1e-12)


@cases("rle", "identity_sampler")
def test_sampler(case: Path) -> None:
    g = load(case)
    per_batch = g["c_ids_per_batch"] * g["c_images_per_id"]
    rng = np.random.RandomState(g["in_seed_numpy"])
    pairs = lay_out_pairs(g["in_label_vis"], g["in_label_ir"], g["c_ids_per_batch"], g["c_images_per_id"], rng)
    assert np.array_equal(pairs[:, 0], g["out_index_vis"])
    assert np.array_equal(pairs[:, 1], g["out_index_ir"])
    assert np.array_equal(np.arange(len(pairs)), g["out_order"])
    assert len(pairs) == g["out_num_batches"] * per_batch


class Records:
    """A view made of (pid, camera, file number) rows."""

    def __init__(self, meta: np.ndarray) -> None:
        self.camid, self.pid = meta[:, 0], meta[:, 1]
        self.label = np.unique(self.pid, return_inverse=True)[1]
        self.modality = np.where(np.isin(self.camid, (3, 6)), "ir", "rgb")
        self._paths = [f"cam{c}/{p:04d}/{f:04d}.jpg" for c, p, f in meta.tolist()]

    def path(self, row: int) -> str:
        return self._paths[row]

    def describe(self) -> str:
        return "fixture"


@cases("rle", "sysu_preprocess")
def test_training_rows_and_resize(case: Path) -> None:
    g = load(case)
    keep = np.flatnonzero(np.isin(g["in_meta"][:, 1], np.concatenate([g["in_train_ids"], g["in_val_ids"]])))
    rows = modality_rows(Records(g["in_meta"][keep]))  # type: ignore[arg-type]
    chain = Chain((g["c_height"], g["c_width"]))
    for name, ours, label in (("vis", rows.visible, rows.visible_label), ("ir", rows.infrared, rows.infrared_label)):
        assert np.array_equal(label, g[f"out_{name}_label"])
        made = np.stack([chain.resize(image) for image in g["in_images_u8"][keep][ours]])
        assert np.array_equal(made, g[f"out_{name}_img"])


class Scaled(nn.Module):
    """Stands for the last stage."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@cases("rle", "flip_fusion")
def test_flip_and_fusion(case: Path) -> None:
    g = load(case)
    stems = []
    for m in ("vis", "ir"):
        weight = torch.from_numpy(g[f"w_{m}_conv_weight"])
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1).double()
        conv.load_state_dict({"weight": weight, "bias": torch.from_numpy(g[f"w_{m}_conv_bias"])})
        stems.append(nn.Sequential(conv, nn.ReLU()))
    classes, channels = g["w_cls_g_weight"].shape
    model = TwoStream(stems[0], stems[1], Scaled(g["c_last_stage_scale"]), PartHead(channels, classes)).double().eval()
    fill_head(model.head, g)
    sides: dict[str, dict[str, Tensor]] = {}
    for side in ("query", "gallery"):
        image = torch.from_numpy(g[f"in_{side}"])
        batch = {
            "image": image,
            "infrared": torch.full((len(image),), g[f"c_{side}_modality"] == 2),
            "flip": True,
        }
        with torch.no_grad():
            vectors = test_vectors(model, image, batch["infrared"], flip=True)
            for kind, value in vectors.items():
                close(value, g[f"out_{side}_{kind}"], 1e-7)
            fusions = {"pool": 0.0, "bn": 1.0, "sum": 0.5, "fused": g["c_fusion_a"]}
            sides[side] = {name: encode(model, batch | {"fusion": a})["fused"] for name, a in fusions.items()}
    for name, factor in (("pool", 1), ("bn", 1), ("sum", 2), ("fused", 1)):  # the sum is twice the even mixture
        query, gallery = sides["query"][name], sides["gallery"][name]
        close(factor * query @ gallery.T, g[f"out_score_{name}"], 1e-7)
        cosine = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(gallery).T
        close(4 * factor * cosine, g[f"out_score_{name}"], 1e-7)  # the evaluator's metric


def test_resnet50_equals_torchvision() -> None:
    """With stride 2 in the last stage and equal weights, our pieces are torchvision's network."""
    from torchvision.models import resnet50

    from reid_dist.models.resnet import load_stem_and_trunk

    torch.manual_seed(0)
    theirs = resnet50(weights=None).eval()
    stem, trunk = Stem(64), Trunk(ResNetShape())
    load_stem_and_trunk((stem,), trunk, theirs.state_dict())
    stem.eval(), trunk.eval()
    image = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        pooled = theirs.fc(trunk(stem(image)).mean(dim=(2, 3)))
        torch.testing.assert_close(pooled, theirs(image), rtol=1e-4, atol=1e-5)
