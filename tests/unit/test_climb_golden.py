"""CLIMB against the authors' numbers (golden/climb): head, tower, memory, losses, data rules, whole steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reid_dist.config import OptimConfig, ScheduleConfig
from reid_dist.data.samplers import compose_identity_batches
from reid_dist.data.transforms import ImageDraws, ImageTransform
from reid_dist.methods.climb import bank
from reid_dist.methods.climb.config import Config
from reid_dist.methods.climb.head import MultiTemporalHead, fragments, importance_order
from reid_dist.methods.climb.losses import batch_hard_triplet, hardest_pairs, smoothed_ce
from reid_dist.methods.climb.method import group_parameters, transform_of
from reid_dist.methods.climb.plan import candidates, compose_pass, cut_passes, draws_with_replacement
from reid_dist.methods.climb.tracklets import chunks, dense_clips, pick, pieces, restricted_clip, windows
from reid_dist.methods.climb.weights import our_parameter
from reid_dist.models.clip import ClipArchitecture, ImageTower, resize_position_table
from reid_dist.training.optim import build_optimizer, freeze_others
from reid_dist.training.schedule import lr_at
from tests.golden import cases, load
from tests.unit.climb_names import model_of, our_name
from tests.unit.mamba_names import close, tensor


@cases("climb", "token_reorder")
def test_importance_order(case: Path) -> None:
    c = load(case)
    if "const_stride" in c:
        ordered = importance_order(*fragments(tensor(c["in_frames"]), c["const_stride"]))
    else:
        ordered = importance_order(tensor(c["in_reference"]), tensor(c["in_tokens"]))
    assert torch.equal(ordered, tensor(c["out_tokens"]))


@cases("climb", "climb_head")
def test_head_necks_and_stop_gradient(case: Path) -> None:
    c = load(case)
    model = model_of(c)
    tokens, projected = tensor(c["in_tokens"]).requires_grad_(), tensor(c["in_tokens_proj"]).requires_grad_()
    out = {"token": tokens[:, 0], "projected": projected[:, 0],
           "head": model.head(tokens[:, 0].detach(), tokens[:, 1:].detach())}  # fmt: skip
    model.eval()
    with torch.no_grad():
        main, head = model.features(out)
        assert head is not None
        close(torch.cat([main, head], 1), c["out_eval_concat"], 5e-5, "concat")
        close(main, c["out_eval_get_image"], 5e-5, "memory feature")
    model.train()
    main, head = model.features(out)
    assert head is not None
    results = {"feat": main, "logit": model.classifier(main), "feat_sp": head, "logit_sp": model.classifier_head(head)}
    for name, value in results.items():
        close(value, c[f"out_train_{name}"], 5e-5, name)
    torch.autograd.backward(list(results.values()), [tensor(c[f"in_grad_{name}"]) for name in results])
    assert tokens.grad is not None
    assert projected.grad is not None
    close(tokens.grad, c["grad_tokens"], 1e-3, "tokens")
    close(projected.grad, c["grad_tokens_proj"], 1e-3, "projected")
    assert not tokens.grad[:, 1:].any()
    check_gradients(model, c)
    for key in (k for k in c if k.startswith("out_bn_")):
        close(model.state_dict()[our_name(key.removeprefix("out_bn_"))], c[key], 5e-5, key)


def check_gradients(model: torch.nn.Module, c: dict[str, Any], relative: float = 1e-3, absolute: float = 1e-4) -> None:
    parameters, keys = dict(model.named_parameters()), [k for k in c if k.startswith("grad_w_")]
    assert keys
    for key in keys:
        grad = parameters[our_name(key.removeprefix("grad_w_"))].grad
        assert grad is not None, key
        expected = tensor(c[key]).reshape(grad.shape)
        torch.testing.assert_close(grad, expected, rtol=relative, atol=absolute, msg=lambda m, k=key: f"{k}: {m}")


@cases("climb", "clip_vit")
def test_image_tower(case: Path) -> None:
    c = load(case)
    weights = {
        our_name(f"image_encoder_{k[2:]}").removeprefix("tower."): tensor(v) for k, v in c.items() if k[:2] == "w_"
    }
    width, joint = c["w_proj"].shape
    layers = sum(key.endswith("ln_1_weight") and key.startswith("w_") for key in c)
    arch = ClipArchitecture(
        image_size=c["in_image"].shape[-2:], patch=c["w_conv1_weight"].shape[-1], stride=c["const_stride"],
        image_width=width, image_layers=layers, image_heads=c["const_heads"], joint_width=joint,
    )  # fmt: skip
    tower = ImageTower(arch).double()
    tower.load_state_dict(weights)
    image, extra = tensor(c["in_image"]).requires_grad_(), tensor(c["in_sie"]).requires_grad_()
    close(tower(image).tokens, c["out_nosie_tokens12"], 1e-5, "without the camera's vector")

    class Vector(torch.nn.Module):
        def forward(self, camera: Tensor) -> Tensor:
            return extra[camera]

    from reid_dist.methods.climb.model import Climb

    model = Climb(Config(weights="", cameras=1), arch, 2).double()
    model.tower, model.camera = tower, Vector()  # type: ignore[assignment]
    out = model.tokens(image, torch.arange(len(image)))
    close(out.tokens, c["out_tokens12"], 1e-5, "tokens")
    close(out.projected, c["out_proj"] if "out_proj" in c else c["out_tokens_proj"], 1e-5, "projected")
    grads = [key for key in c if key.startswith("in_grad_")]
    assert len(grads) == 2
    upstream = {tuple(c[key].shape): tensor(c[key]) for key in grads}
    torch.autograd.backward(
        [out.tokens, out.projected], [upstream[tuple(x.shape)] for x in (out.tokens, out.projected)]
    )
    close(image.grad, c["grad_image"], 1e-4, "image")  # type: ignore[arg-type]
    close(extra.grad, c["grad_sie"], 1e-4, "camera")  # type: ignore[arg-type]
    parameters = dict(tower.named_parameters())
    for key in (k for k in c if k.startswith("grad_w_")):
        name = our_name("image_encoder_" + key.removeprefix("grad_w_")).removeprefix("tower.")
        close(parameters[name].grad, c[key], 1e-4, key)  # type: ignore[arg-type]


@cases("climb", "pos_embed_resize")
def test_position_table(case: Path) -> None:
    c = load(case)
    resized = resize_position_table(tensor(c["in_pos"], torch.float32), (c["const_height"], c["const_width"]))
    close(resized, c["out_pos"], 1e-5)


@cases("climb", "memory_init")
def test_memory_start(case: Path) -> None:
    c = load(case)
    label = tensor(c["in_label"])
    start = bank.prototypes(tensor(c["in_feat"], torch.float32), label, len(label[label >= 0].unique()))
    close(torch.cat([start, start]), c["out_memory"], 1e-6)


@cases("climb", "memory_step")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_memory_step(case: Path, dtype: torch.dtype) -> None:
    c = load(case)
    banks = tensor(c["in_memory"], dtype).reshape(2, -1, c["in_memory"].shape[1])
    for step in range(c["const_steps"]):
        key = f"_{step}" if c["const_steps"] > 1 else ""
        feat, label = tensor(c[f"in_feat{key}"], dtype).requires_grad_(), tensor(c[f"in_label{key}"])
        loss = bank.prototype_loss(feat, label, banks, c["const_temperature"]).mean()
        (c["const_loss_scale"] * loss).backward()
        assert loss.item() == pytest.approx(c[f"out_loss{key}"], rel=1e-5)
        close(feat.grad, c[f"grad_feat{key}"], 1e-5, "gradient")  # type: ignore[arg-type]
        unit = torch.nn.functional.normalize(feat.detach(), dim=1, eps=1e-12)
        bank.update_dual(banks, unit, label, c["const_momentum"])
        close(banks.flatten(0, 1), c[f"out_memory{key}"], 1e-5, "memory")


@cases("climb", "memory_single")
def test_memory_with_one_bank(case: Path) -> None:
    c = load(case)
    memory, label = tensor(c["in_memory"]), tensor(c["in_label"])
    feat = tensor(c["in_feat"]).requires_grad_()
    logits = feat @ memory.T
    logits.backward(tensor(c["in_grad_logits"]))
    close(logits, c["out_logits"], 1e-5, "logits")
    close(feat.grad, c["grad_feat"], 1e-5, "gradient")  # type: ignore[arg-type]
    rule = "hard" if "_hard_" in case.stem else "instance"
    bank.update_single(memory, feat.detach(), label, c["const_momentum"], rule)
    close(memory, c["out_memory"], 1e-5, "memory")


@cases("climb", "camera_proxy_labels")
def test_camera_proxy_labels(case: Path) -> None:
    c = load(case)
    assert bank.camera_proxy_labels(c["in_label"], c["in_camera"]).tolist() == c["out_proxy"].tolist()


@cases("climb", "smoothed_ce")
def test_smoothed_ce(case: Path) -> None:
    c = load(case)
    logits = tensor(c["in_logits"]).requires_grad_()
    loss = smoothed_ce(logits, tensor(c["in_label"]), c["const_epsilon"]).mean()
    loss.backward()
    assert loss.item() == pytest.approx(c["out_loss"], rel=1e-6)
    close(logits.grad, c["grad_logits"], 1e-5)  # type: ignore[arg-type]


@cases("climb", "triplet")
def test_triplet(case: Path) -> None:
    c = load(case)
    tolerance = 1e-3 if "duplicates" in case.stem else 1e-5
    feat, label = tensor(c["in_feat"]).requires_grad_(), tensor(c["in_label"])
    margin = None if np.isnan(c["const_margin"]) else c["const_margin"]
    normalise = bool(c["const_normalise"])
    loss = batch_hard_triplet(feat, label, margin, normalise, c["const_hard_factor"]).mean()
    loss.backward()
    assert loss.item() == pytest.approx(c["out_loss"], rel=tolerance)
    close(feat.grad, c["grad_feat"], tolerance, "gradient")  # type: ignore[arg-type]
    pairs = hardest_pairs(feat.detach(), label, normalise)
    for name, value in (("ap", pairs.positive), ("an", pairs.negative)):
        if f"out_dist_{name}" in c:
            close(value, c[f"out_dist_{name}"], tolerance, name)


def transform_from(c: dict[str, Any], size: tuple[int, int], **changes: Any) -> ImageTransform:
    base = transform_of(Config(weights="", arch="tiny", image_size=(64, 32)), train=True)
    import dataclasses

    return dataclasses.replace(base, size=size, **changes)


class Recorded:
    """A generator that answers with recorded draws, in the order in which the project asks."""

    def __init__(self, gate: list[float], uniform: np.ndarray, corner: list[int], area: float) -> None:
        self.gate, self.uniforms, self.corner, self.area = list(gate), uniform.reshape(-1).tolist(), list(corner), area

    def random(self) -> float:
        return self.gate.pop(0)

    def uniform(self, low: float, high: float) -> float:
        value = self.uniforms.pop(0)
        assert low <= value <= high
        return value

    def integers(self, low: int, high: int, size: int | None = None) -> Any:
        if size is not None:
            return np.array([self.corner.pop(0) for _ in range(size)])
        value = self.corner.pop(0)
        assert low <= value < high
        return value


def erase_box(c: dict[str, Any], size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The box of recorded draws, by the project's own rule. Recorded areas are shares of the image."""
    transform = transform_from(c, size, flip=0.0, pad=0, erase=c.get("const_probability", c.get("const_erase_p")))
    if "const_area_min" in c:
        import dataclasses

        low = c["const_ratio_min"]
        area = (c["const_area_min"], c["const_area_max"])
        transform = dataclasses.replace(transform, erase_area=area, erase_ratio=(low, 1 / low))
    draws = c["in_draw_area_ratio"]
    rng = Recorded([c["in_draw_gate"]], draws, c["in_draw_xy"].tolist(), 1.0)
    box = transform.draw(rng).erase  # type: ignore[arg-type]
    assert rng.uniforms == []
    return box


@cases("climb", "random_erasing")
def test_random_erasing(case: Path) -> None:
    c = load(case)
    expected, image = c["out_image"], c["in_image"].copy()
    box = erase_box(c, image.shape[1:])
    if box is not None:
        top, left, height, width = box
        fill = np.asarray(c["in_fill"], dtype=np.float32)[: len(image), None, None]
        image[:, top : top + height, left : left + width] = fill
    np.testing.assert_array_equal(image, expected)


@cases("climb", "train_transform")
def test_train_transform(case: Path) -> None:
    c = load(case)
    size = tuple(c["const_size"].tolist())
    transform = transform_from(c, size, pad=c["const_padding"])
    assert transform.mean == tuple(c["const_mean"].tolist())
    assert transform.std == tuple(c["const_std"].tolist())
    assert (transform.flip, transform.erase) == (c["const_flip_p"], c["const_erase_p"])
    draws = ImageDraws(c["in_draw_flip"] < transform.flip, tuple(c["in_draw_crop_ij"].tolist()), erase_box(c, size))
    torch.testing.assert_close(
        transform.apply(c["in_image_u8"], draws), tensor(c["out_image"], torch.float32), rtol=1e-6, atol=1e-6
    )


@cases("climb", "eval_transform")
def test_eval_transform(case: Path) -> None:
    c = load(case)
    import dataclasses

    plain = transform_of(Config(weights=""), train=False)
    transform = dataclasses.replace(plain, size=tuple(c["const_size"].tolist()))
    torch.testing.assert_close(
        transform.apply(c["in_image_u8"]), tensor(c["out_image"], torch.float32), rtol=1e-6, atol=1e-6
    )


@cases("climb", "camera_aware_sampler")
def test_camera_aware_sampler(case: Path) -> None:
    """With recorded draws. A lone image is repeated K times here and comes once in the original."""
    c = load(case)
    pids, cams, instances = c["in_pid"], c["in_cam"], c["const_num_instances"]
    seen = list(dict.fromkeys(pids.tolist()))
    members = [np.flatnonzero(pids == pid) for pid in seen]
    order, left = c["in_draw_permutation"].tolist(), c["in_draw_picks"].tolist()
    anchors, picks, facts = [], [], []
    for identity, anchor in zip(order, c["in_draw_anchor"].tolist(), strict=True):
        anchors.append(int(np.flatnonzero(members[identity] == anchor)[0]))
        eligible = candidates(cams[members[identity]], anchors[-1])
        taken = [left.pop(0) for _ in range(instances - 1)] if len(eligible) else []
        assert set(taken) <= set(eligible.tolist())
        picks.append(np.array(taken, dtype=np.int64))
        if len(eligible):
            facts.append((len(eligible), draws_with_replacement(len(eligible), instances), len(taken)))
    expected = [c["out_candidate_counts"], c["out_pick_replace"].astype(bool), c["out_pick_sizes"]]
    assert [list(column) for column in zip(*facts, strict=True)] == [list(column) for column in expected]
    items = compose_pass(members, order, anchors, picks, instances).reshape(-1, instances)
    single = [len(members[identity]) == 1 for identity in order]
    flat = [row[:1] if lone else row for row, lone in zip(items, single, strict=True)]
    assert np.concatenate(flat).tolist() == c["out_indices"].tolist()
    assert items.size == c["out_len"]


@cases("climb", "identity_sampler")
def test_identity_sampler(case: Path) -> None:
    c = load(case)
    lists = np.split(c["in_draw_shuffled"], np.cumsum(c["in_draw_shuffled_len"])[:-1])
    orders = dict(zip(sorted(set(c["in_pid"].tolist())), lists, strict=True))
    items = compose_identity_batches(orders, c["in_draw_selected_pids"], c["const_num_instances"])
    assert items.tolist() == c["out_indices"].tolist()


@cases("climb", "iteration_loader")
def test_fixed_iterations(case: Path) -> None:
    c = load(case)
    passes = iter(1000 * p + np.arange(c["const_dataset_len"]) for p in range(1, 1000))
    batches = [
        batch
        for _ in range(c["const_epochs"])
        for batch in cut_passes(lambda: next(passes), c["const_batch"], c["const_iters"])
    ]
    padded = [[*batch.tolist(), *[-1] * (c["const_batch"] - len(batch))] for batch in batches]
    assert padded == c["out_batches"].tolist()
    assert c["out_len"] == c["const_iters"]


@cases("climb", "lr_schedule")
def test_schedule(case: Path) -> None:
    c = load(case)
    config = ScheduleConfig(
        mode="step", warmup=c["const_warmup_epochs"], warmup_factor=c["const_warmup_factor"], gamma=c["const_gamma"],
        warmup_method="linear" if c["const_warmup_linear"] else "constant",
        milestones=tuple(c["const_milestones"].tolist()),
    )  # fmt: skip
    epochs = len(c["out_lr"])
    ours = [[lr_at(base, t, epochs, config) for base in c["const_base_lr"].tolist()] for t in range(epochs)]
    np.testing.assert_allclose(ours, c["out_lr"], rtol=1e-9)


@cases("climb", "param_groups")
def test_param_groups(case: Path) -> None:
    c = load(case)
    optim = OptimConfig(lr=c["const_base_lr"], weight_decay=c["const_wd"], momentum=c["const_momentum"], name="sgd")
    config = Config(weights="", bias_lr_factor=float(c["const_bias_factor"]))
    assert c["const_wd"] == c["const_wd_bias"]
    names = {ours: i for i, name in enumerate(c["in_names"].tolist()) if (ours := our_parameter(name)) is not None}
    unused = [name for name in c["in_names"].tolist() if our_parameter(name) is None]
    assert all(name.startswith(("sp_mamba_raw.", "norm3_mamba.")) for name in unused)
    assert len(unused) == 27
    groups = group_parameters([(name, bool(c["out_trainable"][i])) for name, i in names.items()], optim, config)
    found = {name: (group.lr, group.weight_decay) for group in groups for name in group.names}
    for name, i in names.items():
        if c["out_trainable"][i]:
            np.testing.assert_allclose(found[name], c["out_lr_wd"][i], rtol=1e-9)
        else:
            assert name not in found
    mixer = sum(int(c["info_numel"][i]) for name, i in names.items() if name.startswith("head.mixer."))
    assert mixer == 4_002_816


@cases("climb", "tracklet_clips")
def test_tracklet_clips(case: Path) -> None:
    c = load(case)
    frames, clip = c["const_num_frames"], c["const_seq_len"]
    parts = chunks(frames, clip)
    assert parts.tolist() == c["out_chunks"].tolist()
    assert pick(parts, c["in_draw_chunk_offset"]).tolist() == c["out_rrs_train"].tolist()
    assert restricted_clip(frames, clip).tolist() == c["out_rrs_test"].tolist()
    assert dense_clips(frames, clip).tolist() == c["out_dense"].tolist()


@cases("climb", "ilids_windows")
def test_windows(case: Path) -> None:
    c = load(case)
    found = windows(c["const_num_frames"], c["const_seq_len"], c["const_stride"])
    assert found.tolist() == c["out_windows"].tolist()


@cases("climb", "lsvid_tracklet_split")
def test_pieces(case: Path) -> None:
    c = load(case)
    assert pieces(c["const_num_frames"], c["const_step"]).tolist() == c["out_ranges"].tolist()


@cases("climb", "derived_mtm")
def test_multi_temporal_head(case: Path) -> None:
    c = load(case)
    strides = c["const_strides"].tolist()
    state, rank = c[f"w_s{strides[0]}_sp_mamba_bi_1_A_log"].shape[1], None
    rank = c[f"w_s{strides[0]}_sp_mamba_bi_1_dt_proj_weight"].shape[1]
    module = MultiTemporalHead(c["in_tokens"].shape[-1], strides, state, rank).double()
    names = {}
    for key in (k[2:] for k in c if k.startswith("w_")):
        if key.startswith("fuse_"):
            names[key] = key.replace("fuse_", "fuse.")
        else:
            scale, _, rest = key.partition("_")
            place = strides.index(int(scale[1:]))
            names[key] = our_name(rest).replace("head.", f"scales.{place}.", 1)
    expected = module.state_dict()
    assert set(names.values()) == set(expected)
    module.load_state_dict({ours: tensor(c[f"w_{key}"]).reshape(expected[ours].shape) for key, ours in names.items()})
    out = module(tensor(c["in_tokens"]))
    out.backward(tensor(c["in_grad_out"]))
    close(out, c["out_feat"], 1e-5, "out")
    parameters = dict(module.named_parameters())
    for key, ours in names.items():
        grad, wanted = parameters[ours].grad, tensor(c[f"grad_w_{key}"])
        assert grad is not None
        # the last bias of a pool has no gradient (softmax does not see a shift): its recorded one is rounding noise
        floor = 1e-6 if key.endswith("sp_attention_2_bias") else 1e-3 * float(wanted.abs().max())
        torch.testing.assert_close(grad, wanted.reshape(grad.shape), rtol=1e-3, atol=floor, msg=key)


@cases("climb", "train_step")
def test_two_whole_steps(case: Path) -> None:
    from tests.unit.climb_names import Alone
    from tests.unit.test_climb_method import bare_stage

    c = load(case)
    settings: dict[str, Any] = {
        "momentum": c["const_mu"], "temperature": c["const_temperature"], "smoothing": c["const_epsilon"],
        "camera_weight": float(c["const_sie_coe"]), "memory_weight": float(c["const_w_memory"]),
        "id_weight": c["const_w_id"], "head_id_weight": float(c["const_w_id_sp"]),
        "triplet_weight": float(c["const_w_tri"]), "head_lr_factor": float(c["const_classifier2_lr_factor"]),
    }  # fmt: skip
    model, config = model_of(c, **settings), Config(weights="", **settings)
    base = c["const_base_lr"] * c["const_warmup_lr_factor"]
    optim = OptimConfig(name="sgd", lr=base, momentum=c["const_momentum_sgd"], weight_decay=c["const_weight_decay"])
    stage = bare_stage(config, optim)
    stage.banks = tensor(c["in_memory"]).reshape(2, -1, c["in_memory"].shape[1])
    groups = stage.param_groups(model)
    freeze_others(model, groups)
    optimizer, ctx = build_optimizer(model, groups, optim), Alone()
    model.train()
    for step in range(2):
        batch = {"image": tensor(c[f"in_image_{step}"]), "label": tensor(c[f"in_label_{step}"])}
        batch |= {"camera": tensor(c[f"in_cam_{step}"])} if "w_cv_embed" in c else {}
        out = stage.forward(model, batch, ctx)  # type: ignore[arg-type]
        terms = stage.losses(model, out, batch, ctx)  # type: ignore[arg-type]
        loss = torch.stack(list(terms.values())).sum()
        ours = [float(terms[name]) for name in ("memory", "id", "head_id", "triplet")] + [loss.item()]
        np.testing.assert_allclose(ours, c[f"out_losses_{step}"], rtol=1e-3, atol=1e-4)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            check_gradients(model, c)
        stage.after_step(model, out, batch, ctx)  # type: ignore[arg-type]
        optimizer.step()
        memory = tensor(c[f"out_memory_{step}"])
        torch.testing.assert_close(stage.banks.flatten(0, 1), memory, rtol=1e-3, atol=1e-4)
    state = model.state_dict()
    for key in (k for k in c if k.startswith("out_w_")):
        name = our_name(key.removeprefix("out_w_"))
        expected = tensor(c[key]).reshape(state[name].shape)
        torch.testing.assert_close(state[name], expected, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
