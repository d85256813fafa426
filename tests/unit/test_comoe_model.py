"""The whole CoMoE model, its losses and one optimizer step against the golden vectors; sizes; the optional branch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reid_dist.config import OptimConfig
from reid_dist.data.samplers import rank_slice
from reid_dist.errors import UserError
from reid_dist.losses import masked_lm_ce
from reid_dist.methods.comoe.config import Config
from reid_dist.methods.comoe.config_import import read_released, recipe_overrides
from reid_dist.methods.comoe.method import METHOD, comoe_losses, group_parameters
from reid_dist.methods.comoe.model import CoMoE, MaskedTokenBranch
from reid_dist.methods.spec import ModelFacts
from reid_dist.models import clip
from reid_dist.models.clip import ClipArchitecture
from reid_dist.training.optim import build_optimizer
from tests.golden import cases, load
from tests.unit.comoe_names import fill, inside, tensors

FEATURES = {"rtol": 5e-4, "atol": 5e-5}


class Ranks:
    """The context of one of several ranks, in one process: gathers return what the test has computed for all."""

    def __init__(
        self, total: int, rank: int = 0, world_size: int = 1, gathered: dict[int, Tensor] | None = None
    ) -> None:
        self.total, self.rank, self.world_size, self.gathered = total, rank, world_size, gathered or {}

    def slice(self) -> slice:
        return rank_slice(self.total, self.rank, self.world_size)

    def gather(self, rows: Tensor) -> Tensor:
        return rows if self.world_size == 1 else self.gathered[id(rows)]

    def reduce(self, value: Tensor) -> Tensor:
        return value if self.world_size == 1 else self.gathered[id(value)]


def config_of(c: dict[str, Any]) -> Config:
    head = "w_head_" if c["const_kind"] == "shared" else "w_head_image_"
    experts, width = c[f"{head}block0_gate_aux"].shape
    return Config(
        arch="golden", weights="", head=c["const_kind"], attention_axis=c["const_attention_axis"],
        head_blocks=len([k for k in c if k.startswith(f"{head}block") and k.endswith("aux_vector")]),
        head_heads=c["const_moe_heads"], experts=experts, top_k=c["const_top_k"],
        reduction=width // c[f"{head}block0_expert_down_weight"].shape[1], temperature=c["const_temperature"],
        balance_weight=c["const_aux_factor"], itc_weight=c["const_itc_weight"],
        bias_lr_factor=c["const_bias_lr_factor"],
    )  # fmt: skip


def model_of(c: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> CoMoE:
    layers = {
        t: len([k for k in c if k.startswith(f"w_{t}_block") and k.endswith("ln1_bias")]) for t in ("visual", "text")
    }
    arch = ClipArchitecture(
        image_size=tuple(c["in_image"].shape[2:]), patch=c["const_patch"], stride=c["const_stride"],
        image_width=len(c["w_visual_cls"]), image_layers=layers["visual"], image_heads=c["const_visual_heads"],
        text_width=c["w_text_token"].shape[1], text_layers=layers["text"], text_heads=c["const_text_heads"],
        vocab_size=len(c["w_text_token"]), context_length=len(c["w_text_pos"]), joint_width=c["w_text_proj"].shape[1],
    )  # fmt: skip
    monkeypatch.setitem(clip.ARCHITECTURES, "golden", arch)
    model = CoMoE(config_of(c))
    fill(model, tensors(c, "w_"))
    return model


def close(actual: Tensor, expected: object, **tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), **(tolerance or FEATURES))


@cases("comoe", "comoe_e2e")
def test_features(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = load(case)
    model, image, ids = model_of(c, monkeypatch), torch.as_tensor(c["in_image"]), torch.as_tensor(c["in_ids"])
    close(model.encode_image(image).base, c["out_base_image_feat"])
    close(model.encode_text(ids).base, c["out_base_text_feat"])
    encoded = METHOD.encode(model, {"image": image})
    close(encoded["global"], c["out_encode_image"])
    close(METHOD.encode(model, {"ids": ids})["global"], c["out_encode_text"])
    close(model.encode_image(image[:1]).feat, c["out_encode_image_alone"])
    close(model.encode_text(ids[:1]).feat, c["out_encode_text_alone"])
    copies = torch.cat([image[:1], image[1:2].expand(len(image) - 1, -1, -1, -1)])
    close(model.encode_image(copies).feat[:1], c["out_encode_image_first_with_copies"])
    alone = (model.encode_image(image[:1]).feat - encoded["global"][:1]).abs().max().item()
    if c["const_attention_axis"] == "sequence":  # a feature must not change with its batch-mates
        assert alone < 1e-5
        close(model.encode_image(copies).feat[:1], encoded["global"][:1].detach(), rtol=0, atol=1e-5)
    else:
        assert alone > 1e-3


@cases("comoe", "comoe_e2e")
def test_losses_gradients_and_one_step(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = load(case)
    model, config, pid = model_of(c, monkeypatch), config_of(c), torch.as_tensor(c["in_pid"])
    out = model(image=torch.as_tensor(c["in_image"]), ids=torch.as_tensor(c["in_ids"]))
    out["image_feat"].retain_grad()
    out["text_feat"].retain_grad()
    terms = comoe_losses(config, out, pid, Ranks(len(pid)))  # type: ignore[arg-type]
    expected = {"sdm": "out_sdm_loss", "itc": "out_itc_loss_weighted", "balance": "out_aux_loss_weighted"}
    assert set(terms) == set(expected)
    for name, key in expected.items():
        torch.testing.assert_close(terms[name].item(), c[key], rtol=5e-4, atol=5e-5)
    total = sum(terms.values())
    torch.testing.assert_close(total.item(), c["out_total"], rtol=5e-4, atol=5e-5)
    total.backward()

    def check(grad: Tensor, wanted: Tensor, name: str) -> None:
        tolerance = {"rtol": 2e-3, "atol": 1e-4 * max(1.0, float(wanted.abs().max()))}
        torch.testing.assert_close(grad, wanted, **tolerance, msg=lambda m: f"{name}: {m}")

    check(out["image_feat"].grad, torch.as_tensor(c["grad_image_feat"]), "image_feat")
    check(out["text_feat"].grad, torch.as_tensor(c["grad_text_feat"]), "text_feat")
    parameters = dict(model.named_parameters())
    goldens = tensors(c, "grad_w_")
    for name, wanted in goldens.items():
        grad = parameters[name].grad
        check(grad if grad is not None else torch.zeros_like(wanted), wanted, name)

    optim = OptimConfig(lr=c["const_lr"], weight_decay=c["const_weight_decay"], eps=1e-3)
    groups = group_parameters([(name, p.requires_grad) for name, p in model.named_parameters()], optim, config)
    build_optimizer(model, groups, optim).step()
    for name, wanted in tensors(c, "step_w_").items():
        moved = torch.ones(len(wanted), dtype=torch.bool)
        if "experts" in name:  # officially an expert without tokens has no gradient and stays; ours still decays
            moved = goldens[name].flatten(1).abs().sum(1) > 0
        close(parameters[name][moved], wanted[moved], rtol=1e-3, atol=2e-4)


@cases("comoe", "mlm_branch")
def test_masked_word_branch(case: Path) -> None:
    c = load(case)
    words, width = c["w_mlm_fc_weight"].shape
    depth = len([k for k in c if k.startswith("w_block") and k.endswith("ln1_weight")])
    branch = MaskedTokenBranch(width, c["const_num_heads"], depth, words)
    head = {"mlm_dense": "mlm_head.0", "mlm_ln": "mlm_head.2", "mlm_fc": "mlm_head.3"}

    def name_of(name: str) -> str:
        if name.startswith("block"):
            index, rest = name.removeprefix("block").split("_", 1)
            return f"cross_blocks.{index}.{inside(rest)}"
        if name.startswith("cross_attn"):
            return "cross_" + inside(name.removeprefix("cross_"))
        part, kind = name.rsplit("_", 1)
        return f"{head.get(part, part)}.{kind}"

    fill(branch, tensors(c, "w_", name_of))
    image, text = torch.as_tensor(c["in_image_tokens"]), torch.as_tensor(c["in_masked_text_tokens"])
    label = torch.as_tensor(c["in_label"])
    fused = branch.fuse(text, image)
    close(fused, c["out_fused"], rtol=2e-3, atol=2e-4)
    close(branch.mlm_head(fused), c["out_scores"], rtol=2e-3, atol=2e-4)
    nll, count = branch(text, image, label)
    assert count.tolist() == (label != 0).sum(1).tolist()
    loss = Config().mlm_weight * masked_lm_ce(nll, count)
    torch.testing.assert_close(loss.item(), c["out_loss_weighted"], rtol=1e-3, atol=1e-4)
    singly = [branch(text[i : i + 1], image[i : i + 1], label[i : i + 1])[0] for i in range(len(text))]
    close(torch.cat(singly), nll.detach(), rtol=1e-4, atol=1e-5)


@cases("comoe", "param_groups")
def test_parameter_groups(case: Path) -> None:
    c = load(case)
    optim = OptimConfig(lr=c["const_lr"], weight_decay=c["const_weight_decay"])
    config = Config(
        lr_factor=c["const_lr_factor"], bias_lr_factor=c["const_bias_lr_factor"],
        bias_weight_decay=c["const_weight_decay_bias"],
    )  # fmt: skip
    groups = group_parameters(zip(c["in_name"].tolist(), c["in_trainable"].tolist(), strict=True), optim, config)
    ours = {name: (group.lr, group.weight_decay) for group in groups for name in group.names}
    wanted = zip(c["out_lr"].tolist(), c["out_weight_decay"].tolist(), strict=True)
    for name, (lr, decay) in zip(c["out_name"].tolist(), wanted, strict=True):
        assert ours.pop(name) == pytest.approx((lr, decay), rel=1e-12)
    assert not ours


@cases("comoe", "run_config")
def test_released_config(case: Path) -> None:
    c = load(case)
    values = read_released(c["in_yaml"])
    assert json.loads(json.dumps(values)) == json.loads(c["out_values_json"])
    overrides, unknown = recipe_overrides(values)
    assert overrides["model.top_k"] == values["topk"]
    assert overrides["optim.betas"] == (values["alpha"], values["beta"])
    assert isinstance(overrides["model.image_size"], tuple)
    assert "moe_lr_factor" in unknown
    assert set(overrides["model.losses"]) <= {"sdm", "itc", "balance", "cmpm", "id", "mlm"}
    Config(**{k.removeprefix("model."): v for k, v in overrides.items() if k.startswith("model.")})


def test_released_config_refuses_other_objects() -> None:
    with pytest.raises(UserError, match="python/object"):
        read_released("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="mapping"):
        read_released("- 1")
    with pytest.raises(UserError, match="nonsense"):
        recipe_overrides({"loss_names": "sdm+nonsense"})


def test_sizes_of_the_published_model() -> None:
    def millions(module: torch.nn.Module) -> float:
        return sum(p.numel() for p in module.parameters()) / 1e6

    with torch.device("meta"):
        model = METHOD.build(Config(), ModelFacts())
        unshared = METHOD.build(Config(head="unshared"), ModelFacts())
        base = METHOD.build(Config(head="base", losses=("sdm", "itc")), ModelFacts())
    assert isinstance(model, CoMoE)
    assert millions(model) == pytest.approx(163.33, abs=0.005)
    assert millions(model.towers) == pytest.approx(149.62, abs=0.005)
    assert millions(model.heads) == pytest.approx(13.71, abs=0.005)
    experts = [block.moe.experts for block in model.heads["shared"].blocks]
    assert sum(map(millions, experts)) == pytest.approx(1.07, abs=0.005)
    assert millions(unshared.heads) == pytest.approx(2 * 13.71, abs=0.01)
    assert millions(base) == pytest.approx(149.62, abs=0.005)


def test_our_names_meet_the_learning_rate_rules() -> None:
    with torch.device("meta"):
        model = METHOD.build(Config(losses=("sdm", "id", "mlm")), ModelFacts(num_classes=7))
    optim = OptimConfig(lr=1.0, weight_decay=0.5)
    groups = group_parameters([(n, True) for n, _ in model.named_parameters()], optim, Config())
    rate = {name: (g.lr, g.weight_decay) for g in groups for name in g.names}
    assert len(rate) == len(list(model.parameters()))
    assert rate["classifier.weight"] == (5, 0.5)
    assert rate["classifier.bias"] == (5, 0)
    assert rate["masked_token.cross_attn.qkv_weight"] == (5, 0.5)
    assert rate["masked_token.cross_blocks.0.attn.out.bias"] == (2, 0)
    assert rate["masked_token.ln_post.weight"] == (1, 0.5)
    assert rate["towers.image.blocks.0.attn.qkv_bias"] == (2, 0)
    assert rate["heads.shared.blocks.0.moe.experts.up_bias"] == (2, 0)
    assert rate["heads.shared.blocks.0.moe.experts.up_weight"] == (1, 0.5)
    assert rate["heads.shared.blocks.0.aux_vector"] == (1, 0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"top_k": 5},
        {"losses": ()},
        {"losses": ("sdm", "sdm")},
        {"head": "base"},
        {"dropout": 1.0},
    ],
    ids=str,
)
def test_impossible_configs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        Config(**wrong)
