"""RLE's parts around the golden vectors: data that cannot be used, the importer, the chain, parameter groups, figures."""

from __future__ import annotations

import base64
import dataclasses
import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reid_dist import methods
from reid_dist.config import Recipe
from reid_dist.data.draws import row_rng
from reid_dist.data.paired import PairedIdentityPlan, lay_out_pairs, modality_rows
from reid_dist.errors import UserError
from reid_dist.methods.rle import METHOD
from reid_dist.methods.rle.config import AugmentConfig, Config
from reid_dist.methods.rle.linear import Box, Region, scale_regions
from reid_dist.methods.rle.method import RLEStage
from reid_dist.methods.rle.model import build_network, stripe_heights
from reid_dist.methods.rle.transforms import Chain
from reid_dist.methods.rle.weights import import_weights, our_name
from reid_dist.methods.spec import EvalSide, ModelFacts, PlanPart, TrainingData
from reid_dist.models.published import read_published
from tests.unit.rle_view import PairView

TINY = Config(arch="resnet-tiny", weights="", image_size=(48, 24), instances=2)


def recipe(**model: object) -> Recipe:
    base = methods.load_recipe("rle/tiny")
    return dataclasses.replace(base, model=dataclasses.replace(base.model, **model))


def without(view: PairView, pid: int, modality: str) -> PairView:
    return view.select(np.flatnonzero(~((view.pid == pid) & (view.modality == modality))))


# ---- data


@pytest.mark.parametrize("modality", ["ir", "rgb"])
def test_identity_of_one_modality_is_left_out_and_said(modality: str, caplog: pytest.LogCaptureFixture) -> None:
    view = without(PairView(), 10, modality)
    with caplog.at_level(logging.WARNING):
        rows = modality_rows(view)  # type: ignore[arg-type]
    assert "1 identities have images of one modality only and are left out of training: 10" in caplog.text
    assert 10 not in view.pid[rows.visible]
    assert 10 not in view.pid[rows.infrared]
    assert rows.classes == 4
    assert METHOD.facts(TrainingData(view, None)) == ModelFacts(num_classes=4)  # type: ignore[arg-type]
    by_class = {int(c): set(view.pid[rows.visible[rows.visible_label == c]].tolist()) for c in range(4)}
    assert by_class == {0: {0}, 1: {20}, 2: {30}, 3: {40}}


def test_data_without_pairs_is_refused() -> None:
    view = PairView(identities=2)
    with pytest.raises(UserError, match="no training identity has both visible and infrared"):
        modality_rows(view.select(np.flatnonzero(view.modality == "rgb")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "instances", "message"),
    [(7, 2, "multiple of model.instances=2"), (2, 2, "at least 2"), (12, 2, "the training data has 5")],
)
def test_batches_that_cannot_be_drawn(batch: int, instances: int, message: str) -> None:
    rows = modality_rows(PairView())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        PairedIdentityPlan(rows.visible_label, rows.infrared_label, batch, instances, seed=1)


def test_plan_pairs_modalities_of_one_identity() -> None:
    rows = modality_rows(PairView())  # type: ignore[arg-type]
    plan = PairedIdentityPlan(rows.visible_label, rows.infrared_label, 6, 2, seed=1)
    assert plan.steps(0) == max(len(rows.visible), len(rows.infrared)) // 6 + 1
    items = np.concatenate([plan.batch(0, step)[0] for step in range(plan.steps(0))])
    visible, infrared = plan.split(items)
    label = rows.visible_label[visible]
    assert np.array_equal(label, rows.infrared_label[infrared])
    for batch in label.reshape(-1, 3, 2):
        assert len(set(batch[:, 0])) == 3
        assert (batch[:, :1] == batch).all()
    assert not np.array_equal(plan.items(0), plan.items(1))
    assert np.array_equal(plan.items(1), PairedIdentityPlan(rows.visible_label, rows.infrared_label, 6, 2, 1).items(1))


def test_every_image_is_drawn_about_equally_often() -> None:
    labels = np.repeat(np.arange(4), 5)
    pairs = lay_out_pairs(labels, labels, 2, 2, np.random.default_rng(0))
    for _ in range(200):
        pairs = np.concatenate([pairs, lay_out_pairs(labels, labels, 2, 2, np.random.default_rng(len(pairs)))])
    for side in pairs.T:
        counts = np.bincount(side, minlength=20)
        assert abs(counts / counts.mean() - 1).max() < 0.25  # 4.2 standard deviations of 242 draws


def test_draws_belong_to_pairs_not_to_slices() -> None:
    """Loading a batch whole or in pieces gives the same images; visible and infrared draw apart."""
    stage = RLEStage(recipe(), PairView())  # type: ignore[arg-type]
    items, first = stage.plan().batch(0, 1)
    positions = np.arange(first, first + len(items))

    def load(rows: slice) -> dict[str, torch.Tensor]:
        return stage.load(PlanPart(items[rows], positions[rows], 0, 1))

    whole, pieces = load(slice(None)), [load(slice(0, 1)), load(slice(1, 1)), load(slice(1, 6))]
    for key in ("visible", "infrared", "label"):
        assert torch.equal(whole[key], torch.cat([piece[key] for piece in pieces]))
    assert not torch.equal(whole["visible"], load(slice(0, 6))["infrared"])


# ---- augmentation


def test_black_region_stays_finite_and_the_loop_stops() -> None:
    """The original divides by zero, fills the image with NaN and runs all 100 proposals."""
    image = np.zeros((3, 24, 12), dtype=np.float32)
    image[:, :, :6] = 0.5
    black = Region(Box(2, 7, 10, 4), (0.5, 0.4, 0.05))
    out, attempts, applied = scale_regions(image, iter([None, black, black]), threshold=0.1)
    assert (attempts, applied) == (2, 1)  # gain 0.05 in the third channel
    assert np.array_equal(out, image)  # black times anything
    chain = Chain((24, 12), AugmentConfig(pad=2, radical=1.0, threshold=0.0))
    made = chain.apply_all([np.zeros((24, 12, 3), dtype=np.uint8)] * 4, [row_rng(1, 0, i, i, "t") for i in range(4)])
    assert torch.isfinite(made).all()


def test_infrared_file_with_three_channels_or_one_gives_the_same() -> None:
    """Decoding makes RGB of either (data/decode.py); enhancement then treats equal channels like any others."""
    from reid_dist.data.decode import decode

    grey = np.random.default_rng(0).integers(0, 255, (24, 12), dtype=np.uint8)
    images = []
    for picture in (Image.fromarray(grey), Image.fromarray(np.stack([grey] * 3, axis=2))):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        images.append(decode(stream.getvalue(), "cam3/0001/0001.png"))
    assert images[0].shape == (24, 12, 3)
    one, three = (Chain((24, 12)).apply_all([image], [row_rng(1, 0, 0, 0, "t")], infrared=True) for image in images)
    assert torch.equal(one, three)


def test_moderate_on_visible_alone() -> None:
    """The paper's setting: infrared images pass unchanged and draw nothing for it."""
    only = AugmentConfig(pad=0, flip=0, moderate=1.0, radical=0, erase=0, moderate_on_infrared=False)
    image = np.random.default_rng(0).integers(0, 255, (24, 12, 3), dtype=np.uint8)
    plain = Chain((24, 12)).apply_all([image])
    assert torch.equal(Chain((24, 12), only).apply_all([image], [row_rng(1, 0, 0, 0, "t")], infrared=True), plain)
    mixed = Chain((24, 12), only, mean=(0, 0, 0), std=(1, 1, 1)).apply_all([image], [row_rng(1, 0, 0, 0, "t")])[0]
    assert torch.equal(mixed[0], mixed[1])
    assert torch.equal(mixed[0], mixed[2])


def test_share_of_images_that_each_step_touches() -> None:
    """Every step acts on about half of the images, and 94 % of proposals fit (methods/rle.md section 5)."""
    image = np.random.default_rng(0).integers(60, 255, (48, 24, 3), dtype=np.uint8)
    plain = Chain((48, 24)).apply_all([image])[0]
    for name in ("moderate", "radical", "erase", "flip", "grey"):
        off = {"pad": 0, "grey": 0.0, "flip": 0.0, "moderate": 0.0, "radical": 0.0, "erase": 0.0}
        chain = Chain((48, 24), AugmentConfig(**{**off, name: 0.5}))  # type: ignore[arg-type]
        made = chain.apply_all([image] * 400, [row_rng(1, 0, i, i, name) for i in range(400)])
        changed = float((made != plain).flatten(1).any(dim=1).float().mean())
        assert abs(changed - 0.5) < 0.1, name  # 4 standard deviations


# ---- model


def test_parameter_counts_and_groups() -> None:
    """Section 3: 26.77 M parameters for 395 classes, 9.40 M on RegDB (206); shifts of the necks are frozen."""
    for config, classes, millions in (
        (Config(weights=""), 395, 26.77),
        (Config(weights="", last_stage=False), 206, 9.40),
    ):
        model = build_network(config, classes)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    stage = RLEStage(recipe(backbone_lr_factor=0.1), PairView())  # type: ignore[arg-type]
    model = build_network(TINY, 5)
    backbone, head = stage.param_groups(model)
    assert backbone.lr == pytest.approx(0.1 * head.lr)
    assert head.lr == stage.optim().lr
    assert backbone.weight_decay == head.weight_decay == 5e-4
    named = {*backbone.names, *head.names}
    assert {name for name, _ in model.named_parameters()} - named == {
        f"head.bnneck_{b}.bias" for b in ("p1", "p2", "p3", "g")
    }
    assert len(head.names) == 8
    assert all(name.startswith(("visible_stem.", "infrared_stem.", "trunk.")) for name in backbone.names)


@pytest.mark.parametrize(("height", "stripes"), [(24, (8, 8, 8)), (7, (3, 3, 1)), (3, (1, 1, 1)), (5, (2, 2, 1))])
def test_stripes(height: int, stripes: tuple[int, ...]) -> None:
    assert stripe_heights(height) == stripes


@pytest.mark.parametrize("height", [1, 2, 4])
def test_too_few_rows_for_stripes(height: int) -> None:
    with pytest.raises(UserError, match=r"image_size"):
        stripe_heights(height)


def test_image_too_low_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="feature map of 4 rows"):
        build_network(Config(weights="", image_size=(64, 32)), 5)


def test_micro_batches_and_checkpointing_are_refused() -> None:
    assert RLEStage.row_wise is False  # what the loop refuses micro-batches by
    base = recipe()
    training = dataclasses.replace(base.training, activation_checkpointing=True)
    with pytest.raises(UserError, match="activation_checkpointing"):
        METHOD.check(dataclasses.replace(base, training=training))  # type: ignore[misc]


def test_imagenet_weights_from_a_file(tmp_path: Path) -> None:
    from torchvision.models import resnet50

    with torch.device("meta"):
        shapes = resnet50(weights=None).state_dict()
    state = {name: torch.tensor(float(i)).expand(t.shape) for i, (name, t) in enumerate(shapes.items())}  # a small file
    path = tmp_path / "resnet50.pth"
    torch.save(state, path)
    model = build_network(Config(last_stage=False), 3)
    METHOD.start(model, Config(weights=str(path), last_stage=False))  # type: ignore[misc]
    own = model.state_dict()
    for stem in ("visible_stem", "infrared_stem"):
        assert torch.equal(own[f"{stem}.conv1.weight"], state["conv1.weight"])
    assert torch.equal(own["trunk.layer3.5.conv3.weight"], state["layer3.5.conv3.weight"])
    torch.save({"fc.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no resnet50"):
        METHOD.start(model, Config(weights=str(tmp_path / "other.pth")))  # type: ignore[misc]
    with pytest.raises(UserError, match="no ImageNet weights"):
        METHOD.start(build_network(TINY, 3), dataclasses.replace(TINY, weights="imagenet"))  # type: ignore[misc]


def test_imagenet_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's first weights, checked by their hash; without a network the message names the file to fetch."""
    from torchvision.models import _api, resnet50

    with torch.device("meta"):
        shapes = resnet50(weights=None).state_dict()
    state = {name: torch.tensor(float(i)).expand(t.shape) for i, (name, t) in enumerate(shapes.items())}
    asked: list[tuple[str, bool]] = []

    def fetch(url: str, check_hash: bool = False, **_: object) -> dict[str, torch.Tensor]:
        asked.append((url.rpartition("/")[2], check_hash))
        if len(asked) > 1:
            raise OSError("no route to host")
        return state

    monkeypatch.setattr(_api, "load_state_dict_from_url", fetch)
    model = build_network(Config(), 0)
    METHOD.start(model, Config())  # type: ignore[misc]
    assert torch.equal(model.state_dict()["trunk.layer4.2.conv3.weight"], state["layer4.2.conv3.weight"])
    with pytest.raises(UserError, match=r"no route to host.*resnet50-0676ba61\.pth"):
        METHOD.start(model, Config())  # type: ignore[misc]
    assert asked == [("resnet50-0676ba61.pth", True)] * 2


# ---- released checkpoints


def released(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state as the authors store it: four whole networks, of which parts are used."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        theirs = name.replace("visible_stem.", "visible_module.visible.").replace(
            "infrared_stem.", "thermal_module.thermal."
        )
        theirs = theirs.replace("trunk.", "base_resnet.base.")
        for ours, word in (("head.bnneck_", "bottleneck"), ("head.classifier_", "classifier")):
            theirs = theirs.replace(f"{ours}p", word).replace(ours, word)
        state[theirs] = tensor.clone()
    trunk = {n: t for n, t in state.items() if n.startswith("base_resnet.base.")}
    for prefix in ("visible_module.visible.", "thermal_module.thermal.", "middle_module.middle."):
        state |= {n.replace("base_resnet.base.", prefix): t + 1 for n, t in trunk.items()}
    return state | {"base_resnet.base.conv1.weight": torch.ones(3), "base_resnet.base.fc.weight": torch.ones(7)}


def test_released_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    source, target = build_network(TINY, 5), build_network(TINY, 5)
    state = released(source)
    with caplog.at_level(logging.INFO):
        taken = import_weights(target, state)
    target.load_state_dict(dict(taken))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())
    assert "100.00 % of our parameters" in caplog.text
    assert "dropped" in caplog.text
    assert "middle_module.middle " in caplog.text


class Runs:
    """What a harmful file would hold: unpickled, it opens a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_released_file_with_its_scores_is_read(tmp_path: Path) -> None:
    """The authors save {net, cmc, mAP, mINP, epoch} with NumPy values; nothing else than such values is admitted."""
    torch.manual_seed(1)
    source = build_network(TINY, 5)
    scores = {"cmc": np.linspace(0, 1, 20), "mAP": np.float64(0.7), "mINP": np.float32(0.6), "epoch": 120}
    torch.save({"net": released(source), **scores}, tmp_path / "best.pth")
    assert set(import_weights(source, read_published(str(tmp_path / "best.pth")))) == set(source.state_dict())
    harmful = {"net": released(source), "cmc": np.array([Runs(tmp_path / "hit")], dtype=object)}
    torch.save(harmful, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        read_published(str(tmp_path / "bad.pth"))
    assert not (tmp_path / "hit").exists()


def test_released_checkpoint_without_last_stage_and_with_other_classes(caplog: pytest.LogCaptureFixture) -> None:
    """RegDB files hold stage 4 too; classifiers of another number of people do not matter to retrieval."""
    torch.manual_seed(1)
    state = released(build_network(TINY, 5))
    regdb = {n: t for n, t in state.items() if not n.startswith(("bottleneck", "classifier"))}
    short = dataclasses.replace(TINY, last_stage=False)
    target = build_network(short, 0)
    heads = {n: t for n, t in released(target).items() if n.startswith("bottleneck")}
    taken = import_weights(target, regdb | heads)
    assert set(taken) == set(target.state_dict())
    other = build_network(TINY, 7)
    with caplog.at_level(logging.WARNING):
        taken = import_weights(other, state)
    assert "head.classifier_p1.weight of the file has 5 identities, this model 7: left at random" in caplog.text
    assert not [name for name in taken if "classifier" in name]


def test_foreign_checkpoint_is_refused() -> None:
    with pytest.raises(UserError, match="do not fit"):
        import_weights(build_network(TINY, 5), {"fc.weight": torch.ones(3)})


@pytest.mark.parametrize(
    "name", ["visible_module.visible.layer1.0.conv1.weight", "base_resnet.base.fc.bias", "bottleneck4.bias"]
)
def test_names_that_are_never_used(name: str) -> None:
    assert our_name(name) is None


# ---- test time


def test_evaluation_of_mixed_rows_does_not_depend_on_the_batch() -> None:
    """Rows of both modalities go through their own stem and come back in order, mirrored or not."""
    torch.manual_seed(0)
    view, model = PairView(), build_network(TINY, 0).eval()
    side = EvalSide("image", np.arange(len(view)), np.zeros(len(view), dtype=np.int64))
    for flip in (False, True):
        config = dataclasses.replace(TINY, flip_test=flip)
        with torch.no_grad():
            whole = METHOD.encode(model, METHOD.eval_batch(config, view, side, np.arange(len(view))))["fused"]  # type: ignore[arg-type]
            single = [
                METHOD.encode(model, METHOD.eval_batch(config, view, side, np.array([i])))["fused"] for i in range(9)
            ]  # type: ignore[arg-type]
        torch.testing.assert_close(whole[:9], torch.cat(single), rtol=1e-4, atol=1e-5)
        length = torch.full((len(view),), 2.0 if flip else 1.0)
        torch.testing.assert_close(whole.norm(dim=1), length)
    with pytest.raises(UserError, match="visible-infrared protocol"):
        METHOD.eval_batch(TINY, view, EvalSide("text", side.rows, side.part), np.array([0]))  # type: ignore[arg-type]


def test_figure_shows_originals_beside_enhanced_images() -> None:
    view = PairView()
    side = EvalSide("image", np.arange(len(view)), np.zeros(len(view), dtype=np.int64))
    figure = METHOD.figures[0](None, recipe(image_size=(48, 24)), view, {"image": side})
    from reid_dist.reporting.sections import section_of

    assert len(figure["data"]) == 6
    strip = [np.asarray(Image.open(io.BytesIO(base64.b64decode(p["png"])))) for p in figure["data"][0]["pictures"]]
    assert np.array_equal(strip[0], view.images(side.rows[:1])[0])
    assert (strip[1][..., 0] == strip[1][..., 1]).all()  # moderate: grey
    assert all(picture.shape == (48, 24, 3) and not np.array_equal(picture, strip[0]) for picture in strip[1:4])
    assert section_of(figure).title == "What the augmentation does"
    assert METHOD.figures[0](None, recipe(), view, {}) is None


@pytest.mark.parametrize("name", methods.recipes("rle"))
def test_recipes_load(name: str) -> None:
    loaded = methods.load_recipe(name)
    build_network(dataclasses.replace(loaded.model, arch="resnet-tiny") if "tiny" in name else TINY, 2)
    assert loaded.training.global_batch % loaded.model.instances == 0
    assert loaded.optim.nesterov or loaded.optim.name == "adam"


def test_published_batch_settings() -> None:
    released, paper = methods.load_recipe("rle/sysu_mm01"), methods.load_recipe("rle/sysu_mm01_paper")
    assert [(r.training.global_batch // r.model.instances, r.model.instances) for r in (released, paper)] == [
        (6, 4),
        (4, 6),
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.fusion=1.5", "fusion=1.5"),
        ("model.augment.moderate=2", "augment.moderate=2"),
        ("model.augment.radical_beta=0", "must be positive"),
        ("model.instances=0", "at least 1"),
        ("model.augment.area=[0.5,0.1]", "shares between 0 and 1"),
    ],
)
def test_config_is_checked(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        methods.load_recipe("rle/tiny", [word])
