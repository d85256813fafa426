"""MUVA's modules against vectors made by the authors' code: losses, mask predictors, towers, prompts, groups, schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reid_dist.config import OptimConfig, ScheduleConfig
from reid_dist.data.text import clip_tokenizer
from reid_dist.methods.muva import losses
from reid_dist.methods.muva.config import PARTS, Config
from reid_dist.methods.muva.model import insert_part_positions
from reid_dist.methods.muva.predictor import PartCrossAttention, PartMaskBlock, additive, gate, part_attention_bias
from reid_dist.methods.muva.prompts import prompt_templates
from reid_dist.methods.muva.schedule import finetune_lr, prompt_lr
from reid_dist.methods.muva.stages import parameter_groups
from reid_dist.models.clip import resize_position_table
from reid_dist.models.clip_blocks import Block
from tests.golden import cases, load
from tests.unit.muva_names import BLOCK, MASK, by_rules, fill, golden_model, our_name, pixels, tensors


def close(actual: Any, expected: Any, rtol: float, atol: float) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=rtol, atol=atol)


def leaf(values: np.ndarray) -> Tensor:
    return torch.as_tensor(values).clone().requires_grad_()


@cases("muva", "label_smoothing_ce")
def test_smoothed_cross_entropy(case: Path) -> None:
    c = load(case)
    logits, label = leaf(c["in_logits"]), torch.as_tensor(c["in_labels"])
    terms = losses.shares({"id": (1.0, losses.smoothed_ce(logits, label, c["in_epsilon"]))}, len(label), 1)
    terms["id"].backward()
    close(terms["id"].detach(), torch.tensor(c["out_loss"], dtype=torch.float64), 1e-9, 1e-10)
    close(logits.grad, c["grad_logits"], 1e-9, 1e-10)


@cases("muva", "cluster_memory")
def test_prototype_memory(case: Path) -> None:
    c = load(case)
    memory = losses.PrototypeMemory(
        torch.as_tensor(c["in_memory"]).clone(), c["in_temperature"], c["in_momentum"], c["in_hard"]
    )
    for step, label in enumerate(torch.as_tensor(c["in_labels"])):
        feat = leaf(c["in_feat"][step])
        before = memory.rows.clone()
        loss = memory.loss(feat, label).mean()
        loss.backward()
        assert torch.equal(memory.rows, before)  # a loss alone moves nothing
        close(loss.detach(), c["out_loss"][step], 1e-9, 1e-10)
        close(feat.grad, c["grad_feat"][step], 1e-9, 1e-10)
        memory.update(feat, label)
        close(memory.rows, c["out_memory"][step], 1e-9, 1e-10)


@cases("muva", "class_centroids")
def test_class_centroids(case: Path) -> None:
    c = load(case)
    result = losses.class_centroids(
        torch.as_tensor(c["in_feat"]), torch.as_tensor(c["in_labels"]), c["in_l2_normalise"]
    )
    close(result, c["out_centroids"], 1e-5, 1e-6)


@cases("muva", "mask_loss")
def test_mask_loss(case: Path) -> None:
    c = load(case)
    visible = torch.as_tensor(c["in_pseudo_mask"]) == 0

    def total(logit: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:  # vectors have layers first, ours rows
        rows = losses.mask_loss(logit.transpose(0, 1), probability.transpose(0, 1), visible, c["in_kind"])
        return rows[0].mean(), rows[1].mean()

    logit, probability = leaf(c["in_mask_logit"]), leaf(c["in_mask_prob"])
    pixel, dice = total(logit, probability)
    close(pixel.item(), c["out_loss_pixel"], 1e-6, 1e-8)
    close(dice.item(), c["out_loss_dice"], 1e-6, 1e-8)
    (pixel + dice).backward()
    close(torch.zeros_like(logit) if logit.grad is None else logit.grad, c["grad_logit_partial"], 1e-6, 1e-8)
    close(probability.grad, c["grad_prob_partial"], 1e-6, 1e-8)
    joined = leaf(c["in_mask_logit"])
    sum(total(joined, joined.sigmoid())).backward()  # type: ignore[union-attr]
    close(joined.grad, c["grad_logit_total"], 1e-6, 1e-8)


@cases("muva", "cross_attention")
def test_cross_attention(case: Path) -> None:
    c = load(case)
    query, context = leaf(c["in_query"]), leaf(c["in_context"])
    module = PartCrossAttention(query.shape[-1], c["in_heads"]).double()
    fill(module, {by_rules(n, MASK).removeprefix("attn."): v for n, v in tensors(c).items()})
    out = module(query, context)
    close(out.detach(), c["out_feat"], 1e-9, 1e-10)
    (out * torch.as_tensor(c["in_cotangent"])).sum().backward()
    close(query.grad, c["grad_query"], 1e-9, 1e-10)
    close(context.grad, c["grad_context"], 1e-9, 1e-10)
    parameters = dict(module.named_parameters())
    graded = tensors(c, "grad_w_")
    assert graded
    for name, value in graded.items():
        close(parameters[by_rules(name, MASK).removeprefix("attn.")].grad, value, 1e-9, 1e-10)


@cases("muva", "mask_predictor_block")
def test_mask_predictor_block(case: Path) -> None:
    c = load(case)
    part, patch = leaf(c["in_part"]), leaf(c["in_patch"])
    flags = {"layer_norm": c["in_use_layer_norm"], "shortcut": c["in_use_shortcut"]}
    block = PartMaskBlock(part.shape[-1], patch.shape[1], c["in_heads"], **flags).double()
    names = {by_rules(n, MASK): v for n, v in tensors(c).items()}
    fill(block, {n: v for n, v in names.items() if c["in_use_layer_norm"] or not n.startswith("ln_")})
    logit = block(part, patch)
    close(logit.detach(), c["out_mask_logit"], 1e-9, 1e-10)
    (logit * torch.as_tensor(c["in_cotangent"])).sum().backward()
    close(part.grad, c["grad_part"], 1e-9, 1e-10)
    close(patch.grad, c["grad_patch"], 1e-9, 1e-10)


@cases("muva", "residual_mask_predictor")
def test_residual_mask_predictors(case: Path) -> None:
    c = load(case)
    tokens, split = leaf(c["in_tokens"]), 1 + c["in_num_parts"]
    logit, logits = None, []
    for layer, rows in enumerate(tokens.transpose(1, 2)):  # [B, S, D] of each layer
        block = PartMaskBlock(rows.shape[-1], rows.shape[1] - split, c["in_heads"]).double()
        fill(block, {by_rules(n, MASK): v for n, v in tensors(c, f"w_rmp{layer}_").items()})
        logit = block(rows[:, 1:split], rows[:, split:], logit)
        logits.append(logit)
    stacked = torch.stack(logits)
    probability = (stacked / c["in_tau"]).sigmoid()
    close(stacked.detach(), c["out_logit"], 1e-9, 1e-10)
    close(probability.detach(), c["out_prob"], 1e-9, 1e-10)
    (probability * torch.as_tensor(c["in_cotangent_prob"])).sum().backward()
    close(tokens.grad, c["grad_tokens"], 1e-9, 1e-10)


@cases("muva", "mask_gating")
def test_gating(case: Path) -> None:
    c = load(case)
    probability = leaf(c["in_prob"])
    out = gate(probability, c["in_kind"], c["in_threshold"], c["in_max_value"])
    close(out.detach(), c["out_additive"], 0, 1e-6)
    assert out.requires_grad == c["out_has_grad"]


@cases("muva", "attention_mask")
def test_attention_bias(case: Path) -> None:
    c = load(case)
    part_mask = torch.as_tensor(c["in_additive"])
    bias = part_attention_bias(part_mask)
    assert bias.shape[1] == 1  # broadcast over heads, never copied
    whole = bias.expand(-1, c["in_heads"], -1, -1).flatten(0, 1)
    close(whole, c["out_attn_mask"], 0, 0)
    blocked = part_attention_bias(torch.full_like(part_mask, float("-inf")))
    close(blocked[0, 0], c["out_template"], 0, 0)


@cases("muva", "masked_transformer_block")
def test_masked_transformer_block(case: Path) -> None:
    c = load(case)
    tokens = leaf(c["in_tokens"])  # [S, B, D]
    block = Block(tokens.shape[-1], c["in_heads"])
    fill(block, {by_rules(n, BLOCK): v for n, v in tensors(c).items()})
    mask = torch.as_tensor(c["in_attn_mask"]).unflatten(0, (-1, c["in_heads"]))
    out, _ = block(tokens.transpose(0, 1), mask)  # an arbitrary mask per head; ours is one for all heads
    close(out.detach().transpose(0, 1), c["out_tokens"], 2e-4, 2e-5)
    (out.transpose(0, 1) * torch.as_tensor(c["in_cotangent"])).sum().backward()
    close(tokens.grad, c["grad_tokens"], 2e-4, 2e-5)


TOKEN_KINDS = {"random": "learned", "patch_avg": "patches", "cls": "class"}


def image_config(c: dict[str, Any]) -> Config:
    assert c["in_use_layer_norm"]
    assert c["in_use_shortcut"]
    return Config(
        image_size=tuple(c["in_image_u8"].shape[2:]), parts=PARTS[: c["in_num_parts"]], mask_heads=c["in_mask_heads"],
        gating=c["in_gating"], threshold=c["in_threshold"], gate_scale=c["in_max_value"] or 1.0,
        mask_temperature=c["in_tau"], part_tokens=TOKEN_KINDS[c["in_part_token_init"]], neck_momentum=0.1,
    )  # fmt: skip  # the vector calls the neck once


@cases("muva", "image_branch")
def test_image_branch(case: Path) -> None:
    c = load(case)
    model = golden_model(c, image_config(c), len(c["w_classifier_weight"]))
    image = pixels(c["in_image_u8"])
    visible = torch.as_tensor(c["in_pseudo_mask"]) == 0 if c["in_use_pseudo_mask"] else None
    tolerance = {"rtol": 1e-3, "atol": 1e-4}
    model.eval()
    with torch.no_grad():
        close(model.image.features(image, visible).feat, c["out_feat_eval_raw"], **tolerance)
        close(model.embed_images(image, visible), c["out_feat_eval_bn"], **tolerance)
    model.train()
    found = model.image.features(image, visible)
    logits = model.classifier(model.neck(found.feat))
    close(found.feat.detach(), c["out_feat"], **tolerance)
    close(logits.detach(), c["out_logits"], **tolerance)
    close(model.neck.running_mean, c["out_bnneck_running_mean"], **tolerance)
    close(model.neck.running_var, c["out_bnneck_running_var"], **tolerance)
    value = (found.feat * torch.as_tensor(c["in_cot_feat"])).sum() + (
        logits * torch.as_tensor(c["in_cot_logits"])
    ).sum()
    if "out_mask_logit" in c:
        assert found.logits is not None
        layers_first = found.logits.transpose(0, 1)
        close(layers_first.detach(), c["out_mask_logit"], **tolerance)
        close((layers_first / c["in_tau"]).sigmoid().detach(), c["out_mask_prob"], **tolerance)
        value = value + (layers_first * torch.as_tensor(c["in_cot_mask_logit"])).sum()
    else:
        assert found.logits is None
    value.backward()
    parameters = dict(model.named_parameters())
    graded = tensors(c, "grad_")
    assert graded
    for name, expected in graded.items():
        close(parameters[our_name(name)].grad, expected, **tolerance)


@cases("muva", "text_branch")
def test_text_branch(case: Path) -> None:
    c = load(case)
    grains = len(c["in_token_ids"])
    config = Config(image_size=(32, 16), parts=PARTS[: grains - 1], mask_heads=1)
    model = golden_model(c, config, len(c["w_prompt_ctx"]))
    np.testing.assert_array_equal(np.argmax(c["in_token_ids"], axis=1), c["out_eos_index"])
    labels = torch.as_tensor(c["in_labels"])
    template = model.text.embed.tokens(model.template_ids)
    close(model.prompts(labels, template, model.templates.start).detach(), c["out_prompt"], 2e-4, 2e-5)
    for length in (None, 77):  # the few tokens that can matter, and all
        model.zero_grad()
        feat = model.text_features(labels, length)
        close(feat.detach(), c["out_text_feat"], 2e-4, 2e-5)
        (feat * torch.as_tensor(c["in_cotangent"])).sum().backward()
        close(model.prompts.context.grad, c["grad_prompt_ctx"], 2e-4, 2e-5)


@cases("muva", "prompt_tokens")
def test_prompt_tokens(case: Path) -> None:
    c = load(case)
    parts = [PARTS[i] for i in c["in_part_index"].tolist()]
    length = c["out_token_ids"].shape[1]
    made = prompt_templates(parts, c["in_num_ctx"], c["in_template"], c["in_domain_text"], clip_tokenizer(), length)
    np.testing.assert_array_equal(made.ids, c["out_token_ids"])
    np.testing.assert_array_equal(made.end, c["out_eos_index"])
    assert made.start == c["out_ctx_start"]
    assert made.length == c["out_eos_index"].max() + 1


@cases("muva", "position_embedding")
def test_position_embedding(case: Path) -> None:
    c = load(case)
    resized = resize_position_table(torch.as_tensor(c["in_pos_embed"]), tuple(c["in_grid"].tolist()))
    close(resized, c["out_resized"], 1e-5, 1e-5)
    close(insert_part_positions(resized, c["in_num_parts"]), c["out_with_parts"], 1e-5, 1e-5)


@cases("muva", "prompt_stage_lr")
def test_prompt_stage_lr(case: Path) -> None:
    c = load(case)
    base = c["in_base_lr"]
    schedule = ScheduleConfig(
        mode="cosine",
        warmup=c["in_warmup_epochs"],
        warmup_factor=c["in_warmup_start_lr"] / base,
        target_lr=c["in_min_lr"],
    )
    rates = [prompt_lr(base, e, c["in_epochs"], schedule) for e in range(len(c["out_lr"]) + 1)]
    np.testing.assert_allclose(rates[1:], c["out_lr"], rtol=1e-12)
    np.testing.assert_allclose(rates[0], c["out_lr_before_first_epoch"], rtol=1e-12)


@cases("muva", "finetune_stage_lr")
def test_finetune_stage_lr(case: Path) -> None:
    c = load(case)
    schedule = ScheduleConfig(
        mode="step", warmup=c["in_warmup_epochs"], warmup_factor=c["in_warmup_factor"],
        warmup_method=c["in_warmup_kind"], milestones=tuple(c["in_milestones"].tolist()), gamma=c["in_gamma"],
    )  # fmt: skip
    rates = [[finetune_lr(base, e, schedule) for base in c["in_base_lr"]] for e in range(len(c["out_lr"]) + 1)]
    np.testing.assert_allclose(rates[1:], c["out_lr"], rtol=1e-12)
    np.testing.assert_allclose(rates[0], c["out_lr_before_first_epoch"], rtol=1e-12)


@cases("muva", "param_groups")
def test_parameter_groups(case: Path) -> None:
    c = load(case)
    theirs = {our_name(name): name for name in c["in_all_names"].tolist()}
    for stage in ("prompt", "finetune"):
        optim = OptimConfig(lr=c[f"in_{stage}_lr"], weight_decay=c[f"in_{stage}_wd"])
        name = {"prompt": "prompts"}.get(stage, stage)
        groups = parameter_groups(list(theirs), name, optim, c["in_mask_lr_mult"], c["in_freeze_patch_embed"])
        ours = sorted((theirs[n], group.lr, group.weight_decay) for group in groups for n in group.names)
        expected = sorted(
            zip(
                np.atleast_1d(c[f"out_{stage}_name"]).tolist(), c[f"out_{stage}_lr"].tolist(),
                c[f"out_{stage}_weight_decay"].tolist(), strict=True,
            )
        )  # fmt: skip
        assert [row[0] for row in ours] == [row[0] for row in expected]
        np.testing.assert_allclose([row[1:] for row in ours], [row[1:] for row in expected], rtol=1e-12)


def test_additive_masks_are_built_from_visibility() -> None:
    visible = torch.tensor([[True, False]])
    assert additive(visible).tolist() == [[0.0, float("-inf")]]
