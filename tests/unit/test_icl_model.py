"""Token selection, the dual encoder and one training step of ICL against the golden vectors; texts without words; float16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reid_dist.errors import UserError
from reid_dist.losses import pair_losses
from reid_dist.methods.icl.config import Config
from reid_dist.methods.icl.method import METHOD
from reid_dist.methods.icl.model import DualEncoder, arch_of
from reid_dist.methods.icl.objective import objective, second_weight
from reid_dist.methods.icl.selection import (
    SelectedEmbedding,
    count_words,
    masked_max,
    pick_patches,
    pick_words,
    unit_token,
)
from reid_dist.models.clip import end_of_text, resize_position_table, take_token
from tests.golden import cases, load
from tests.unit.icl_names import head_of, model_of, state_of
from tests.unit.test_comoe_model import Ranks

EXACT = {"rtol": 1e-6, "atol": 1e-8}
ENCODER = {"rtol": 1e-4, "atol": 1e-5}
GRADIENT = {"rtol": 1e-3, "atol": 2e-5}


@cases("icl", "l2norm_eps")
def test_unit_tokens(case: Path) -> None:
    c = load(case)
    given, expected = (torch.as_tensor(next(v for k, v in c.items() if k.startswith(kind))) for kind in ("in_", "out_"))
    torch.testing.assert_close(unit_token(given), expected, rtol=1e-12, atol=1e-12)


@cases("icl", "masked_maxpool")
def test_maximum_over_the_first_tokens(case: Path) -> None:
    c = load(case)
    tokens, lengths = torch.as_tensor(c["in_tokens"]).requires_grad_(), torch.as_tensor(c["in_lengths"])
    pooled = masked_max(tokens, lengths)
    for row, length in enumerate(lengths.tolist()):  # also behind a row of length zero, where the original is NaN
        expected = tokens[row, : max(1, length)].amax(dim=0)
        torch.testing.assert_close(pooled[row], expected, rtol=0, atol=0)
    if "out_pooled" in c:
        torch.testing.assert_close(pooled.detach(), torch.as_tensor(c["out_pooled"]), rtol=0, atol=0)
    if "grad_tokens" in c:
        pooled.sum().backward()
        torch.testing.assert_close(tokens.grad, torch.as_tensor(c["grad_tokens"]), rtol=0, atol=0)


def run_head(c: dict[str, Any], norm: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    head, tokens = head_of(c, norm), torch.as_tensor(c["in_tokens"]).requires_grad_()
    attention, count = torch.as_tensor(c["in_attn"]), None
    if "in_ids" in c:
        ids = torch.as_tensor(c["in_ids"])
        row = attention[torch.arange(len(ids)), end_of_text(ids)]
        index, count = pick_words(row, ids, c["const_select_ratio"])
    else:
        index = pick_patches(attention[:, 0], c["const_select_ratio"])
    assert index.shape[1] == c["const_k"]
    return head, tokens, head(tokens, index, count)


@cases("icl", "tse_visual", "tse_text")
def test_token_selection(case: Path) -> None:
    c = load(case)
    head, tokens, embed = run_head(c, "batch" if "bn_train" in case.stem else "frozen")
    if "out_embed_original" in c:  # NaN from the first text without words on; ours: every other text alone
        ids = torch.as_tensor(c["in_ids"])
        assert (count_words(ids) <= 0).any()
        original = torch.as_tensor(c["out_embed_original"])
        known = ~original.isnan().any(dim=1)
        torch.testing.assert_close(embed[known].detach(), original[known], **EXACT)
        assert embed.isfinite().all()
        for row in range(len(ids)):
            one = {key: value[row : row + 1] if key.startswith("in_") else value for key, value in c.items()}
            torch.testing.assert_close(run_head(one, "frozen")[2], embed[row : row + 1])
            if count_words(ids)[row] <= 0:
                last = head(tokens[row : row + 1], end_of_text(ids)[row].reshape(1, 1))
                torch.testing.assert_close(embed[row : row + 1], last)
        return
    torch.testing.assert_close(embed.detach(), torch.as_tensor(c["out_embed"]), **EXACT)
    (embed * torch.as_tensor(c["in_cotangent"])).sum().backward()
    ours = {"grad_tokens": tokens, "grad_fc_weight": head.skip.weight, "grad_mlp0_weight": head.hidden.weight,
            "grad_mlp1_weight": head.out.weight, "grad_bn_weight": head.norm.weight}  # fmt: skip
    for name in [key for key in c if key.startswith("grad_")]:
        torch.testing.assert_close(ours[name].grad, torch.as_tensor(c[name]), **EXACT)
    for kind in ("running_mean", "running_var"):
        expected = c.get(f"out_bn_{kind}", c[f"w_bn_{kind}"])
        torch.testing.assert_close(getattr(head.norm, kind), torch.as_tensor(expected), **EXACT)


@cases("icl", "clip_dual_encoder")
def test_towers_and_attention(case: Path) -> None:
    c = load(case)
    model = model_of(c)
    image, ids = torch.as_tensor(c["in_images"]), torch.as_tensor(c["in_ids"])
    with torch.no_grad():
        for tower, given, name in ((model.towers.image, image, "img"), (model.towers.text, ids, "txt")):
            whole, row = tower(given, "map"), tower(given, "row")
            torch.testing.assert_close(whole.projected, torch.as_tensor(c[f"out_{name}_tokens"]), **ENCODER)
            torch.testing.assert_close(whole.weights, torch.as_tensor(c[f"out_{name}_attn"]), **ENCODER)
            place = torch.zeros(len(given), dtype=torch.int64) if name == "img" else end_of_text(ids)
            torch.testing.assert_close(row.weights, take_token(whole.weights, place))
            torch.testing.assert_close(row.projected, whole.projected)


@cases("icl", "dual_embedding")
def test_embeddings(case: Path) -> None:
    c = load(case)
    model = model_of(c).eval()
    with torch.no_grad():
        images = METHOD.encode(model, {"image": torch.as_tensor(c["in_images"])})
        texts = METHOD.encode(model, {"ids": torch.as_tensor(c["in_ids"])})
    for side, name in ((images, "img"), (texts, "txt")):
        torch.testing.assert_close(side["global"], torch.as_tensor(c[f"out_{name}_bge"]), **ENCODER)
        torch.testing.assert_close(side["selected"], torch.as_tensor(c[f"out_{name}_tse"]), **ENCODER)


@cases("icl", "train_step")
def test_training_step(case: Path) -> None:
    c = load(case)
    with_second = "out_bge_aug_loss" in c
    config = Config(
        weights="", temperature=c["const_tau"], margin=c["const_margin"], groups=("any",) if with_second else ()
    )
    model = model_of(c)
    image, ids, second = (torch.as_tensor(c[f"in_{name}"]) for name in ("images", "ids", "aug_ids"))
    pid, trust = torch.as_tensor(c["in_pids"]), torch.as_tensor(c["in_label_hat"]).long()
    out = model(image=image, ids=ids, second_ids=second if with_second else None)
    usable = {"text": count_words(ids) > 0, "second": count_words(second) > 0}
    terms = objective(config, out, pid, trust, usable, c["const_epoch"], Ranks(len(pid)))  # type: ignore[arg-type]
    names = {"global": "out_bge_loss", "selected": "out_tse_loss", "global_second": "out_bge_aug_loss",
             "selected_second": "out_tse_aug_loss"}  # fmt: skip
    assert set(terms) == {ours for ours, theirs in names.items() if theirs in c}
    for name, value in terms.items():
        torch.testing.assert_close(value.detach(), torch.tensor(c[names[name]]), **ENCODER)  # already weighted there
    total = torch.stack(list(terms.values())).sum()
    torch.testing.assert_close(total.detach(), torch.tensor(c["out_total"]), **ENCODER)
    total.backward()
    towers = model.towers
    ours = {
        "visual_proj": towers.image.project.weight, "text_projection": towers.text.project.weight,
        "visual_class_embedding": towers.image.embed.class_token, "token_embedding": towers.text.embed.tokens.weight,
        "tse_vis_mlp0": model.image_selection.hidden.weight, "tse_txt_fc": model.text_selection.skip.weight,
    }  # fmt: skip
    for key in [key for key in c if key.startswith("grad_")]:
        torch.testing.assert_close(ours[key.removeprefix("grad_")].grad, torch.as_tensor(c[key]), **GRADIENT)
    assert all(parameter.grad is not None for parameter in model.parameters())
    unused = set(json.loads(c["info_params_without_grad"]))
    trained = {name for name, _ in model.named_parameters()}
    from reid_dist.methods.icl.weights import our_parameter

    assert {name for name in state_of(c) if our_parameter(name) in trained} == {
        name for name in state_of(c) if name not in unused and "running" not in name and "tracked" not in name
    }


@cases("icl", "train_step")
def test_losses_that_divide_the_pairs(case: Path) -> None:
    c = load(case)
    model, pid = model_of(c).eval(), torch.as_tensor(c["in_pids"])
    with torch.no_grad():
        out = model(image=torch.as_tensor(c["in_images"]), ids=torch.as_tensor(c["in_ids"]))
    for branch, theirs in (("global", "bge"), ("selected", "tse")):
        image, text = out[f"image_{branch}"], out[f"text_{branch}"]
        loss = pair_losses("tal", image, text, pid, temperature=c["const_tau"], margin=c["const_margin"])
        torch.testing.assert_close(loss, torch.as_tensor(c[f"out_ccd_loss_{theirs}"]), **ENCODER)
        paired = torch.nn.functional.cosine_similarity(image, text)
        torch.testing.assert_close(paired, torch.as_tensor(c[f"out_ccd_sim_{theirs}"]), **ENCODER)


@cases("icl", "resize_visual_posembed")
def test_visual_positions(case: Path) -> None:
    c = load(case)
    grid = (c["const_height"], c["const_width"])
    table = torch.as_tensor(next(value for key, value in c.items() if key.startswith("in_")))
    expected = torch.as_tensor(next(value for key, value in c.items() if key.startswith("out_")))
    torch.testing.assert_close(resize_position_table(table, grid), expected, rtol=1e-5, atol=1e-5)


def test_released_sizes() -> None:
    arch = arch_of(Config())
    assert arch.grid == (24, 8)
    assert pick_patches(torch.rand(1, 193), 0.3).shape == (1, 57)
    ids = torch.zeros(1, 77, dtype=torch.int64)
    ids[0, :3] = torch.tensor([49406, 320, 49407])
    assert pick_words(torch.rand(1, 77), ids, 0.3)[0].shape == (1, 22)
    longer = torch.cat([ids, torch.zeros(1, 91, dtype=torch.int64)], dim=1)
    assert pick_words(torch.rand(1, 168), longer, 0.3)[0].shape == (1, 49)
    linear, norm = 512 * 1024 + 1024 + 512 * 512 + 512 + 512 * 1024 + 1024, 2 * 512
    assert (
        sum(p.numel() for p in SelectedEmbedding(512, 1024, "frozen").parameters()) == linear + norm
    )  # nothing unused
    with pytest.raises(UserError, match="selects no token"):
        arch_of(Config(arch="tiny", text_length=5))


def test_words_are_those_the_end_token_attends_to() -> None:
    ids = torch.tensor([[98, 5, 6, 7, 8, 99, 0, 0], [98, 99, 0, 0, 0, 0, 0, 0], [98, 5, 99, 0, 0, 0, 0, 0]])
    row = torch.tensor([[0.5, 0.1, 0.3, 0.05, 0.2, 0.6, 0.7, 0.9]]).expand(3, -1).clone()
    before = row.clone()
    index, count = pick_words(row, ids, 0.5)
    assert index[0].tolist() == [2, 4, 1]
    assert index[1, 0] == 1  # no word: the end token
    assert index[2, 0] == 1
    assert count.tolist() == [3, 1, 1]
    assert torch.equal(row, before)


def test_a_frozen_norm_keeps_its_statistics_and_trains_its_scale() -> None:
    torch.manual_seed(0)
    config = Config(arch="tiny", weights="", image_size=(32, 16), select_width=32)
    for norm, moves in (("frozen", False), ("batch", True)):
        model = DualEncoder(Config(**{**vars_of(config), "select_norm": norm})).train()
        model(image=torch.randn(4, 3, 32, 16))["image_selected"].sum().backward()
        head = model.image_selection.norm
        assert bool((head.running_mean != 0).any()) is moves
        assert head.weight.grad is not None
        assert head.weight.grad.abs().max() > 0


def vars_of(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_no_whole_attention_map_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Largest tensor of the weights' computation: one row per head, not S x S."""
    seen = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda self, *a, **k: (seen.append(self.shape), softmax(self, *a, **k))[1]
    )
    model = DualEncoder(Config(arch="tiny", weights="", image_size=(32, 16), select_width=32))
    model(image=torch.randn(2, 3, 32, 16), ids=torch.tensor(np.tile([8190, 5, 8191] + [0] * 61, (2, 1))))
    assert [list(shape) for shape in seen] == [[2, 4, 1, 9], [2, 4, 1, 64]]


def test_the_second_captions_weight() -> None:
    config = Config()
    assert [round(second_weight(config, number), 2) for number in (1, 2, 29, 30, 31, 60)] == [
        0.97,
        0.94,
        0.13,
        0.1,
        0.1,
        0.1,
    ]
