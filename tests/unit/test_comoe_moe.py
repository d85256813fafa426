"""CoMoE's experts, router, head, balance term and usage meter against the golden vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reid_dist.data.draws import row_seeds
from reid_dist.data.samplers import rank_slice
from reid_dist.methods.comoe.moe import (
    AdapterExperts,
    CollaborativeHead,
    DualGateRouter,
    SharedExpertLayer,
    balance_loss,
    joint_balance_loss,
    route,
)
from reid_dist.methods.comoe.usage import ExpertUsageMeter
from reid_dist.methods.comoe.variants import QueryTokenPooling, SingleGateMoE
from tests.golden import cases, load
from tests.unit.comoe_names import fill, inside, tensors

VALUES = {"rtol": 2e-4, "atol": 2e-5}


def modality(is_text: bool) -> str:
    return "text" if is_text else "image"


def leaf(array: object) -> Tensor:
    return torch.as_tensor(array).clone().requires_grad_()


class GivenMask(nn.Module):
    """In the place of a dropout: recorded multipliers."""

    active = True

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        return x * self.mask.view(len(x), *[1] * (x.dim() - 2), -1)


@cases("comoe", "adapter")
def test_one_expert(case: Path) -> None:
    c = load(case)
    weights = {k: v[None] for k, v in tensors(c, "w_", lambda name: name).items()}
    out_width, hidden = c["w_up_weight"].shape
    width = c["in_x"].shape[-1]
    assert hidden == width // c["const_reduction"]
    expert = fill(AdapterExperts(1, width, c["const_reduction"], 0.1, 0, out_width), weights)
    assert expert.residual == c["const_residual"]
    if "in_mask_hidden" in c:
        expert.drop_hidden = GivenMask(torch.as_tensor(c["in_mask_hidden"]))
        expert.drop_out = GivenMask(torch.as_tensor(c["in_mask_out"]))
    x = leaf(c["in_x"])
    y = expert(x, torch.ones(len(x), 1))
    torch.testing.assert_close(y, torch.as_tensor(c["out_y"]), **VALUES)
    (y * torch.as_tensor(c["cot_y"])).sum().backward()
    torch.testing.assert_close(x.grad, torch.as_tensor(c["grad_x"]), **VALUES)
    for name, parameter in expert.named_parameters():
        torch.testing.assert_close(parameter.grad[0], torch.as_tensor(c[f"grad_w_{name}"]), **VALUES)


def layer_of(c: dict) -> SharedExpertLayer:
    experts, width = c["w_gate_aux"].shape
    reduction = width // c["w_expert_down_weight"].shape[1]
    layer = SharedExpertLayer(width, experts, c["const_top_k"], reduction, 0.1, 0)
    return fill(layer, tensors(c, "w_", lambda name: inside(name).removeprefix("moe.")))


@cases("comoe", "moe_layer")
def test_shared_expert_layer(case: Path) -> None:
    c = load(case)
    layer = layer_of(c)
    tokens, aux = leaf(c["in_tokens"]), leaf(c["in_aux_vector"])
    y, routing = layer(tokens, aux, modality(c["const_is_text"]))
    balance = balance_loss(*(stat[:, None] for stat in routing.row_means()))
    torch.testing.assert_close(y, torch.as_tensor(c["out_y"]), **VALUES)
    torch.testing.assert_close(balance.item(), c["out_balance_loss"], **VALUES)
    torch.testing.assert_close(routing.logits, torch.as_tensor(c["out_gate_logits"]), **VALUES)
    torch.testing.assert_close(routing.combine, torch.as_tensor(c["out_combine_weight"]), **VALUES)
    np.testing.assert_array_equal(routing.selected, c["out_selected"])
    ((y * torch.as_tensor(c["cot_y"])).sum() + c["cot_balance"] * balance).backward()
    torch.testing.assert_close(tokens.grad, torch.as_tensor(c["grad_tokens"]), **VALUES)
    torch.testing.assert_close(aux.grad, torch.as_tensor(c["grad_aux_vector"]), **VALUES)
    expected = tensors(c, "grad_w_", lambda name: inside(name).removeprefix("moe."))
    for name, parameter in layer.named_parameters():
        if name in expected:
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            torch.testing.assert_close(grad, expected[name], **VALUES, msg=lambda m, name=name: f"{name}: {m}")


@cases("comoe", "moe_head")
def test_collaborative_head(case: Path) -> None:
    c = load(case)
    experts, width = c["w_block0_gate_aux"].shape
    blocks = len([k for k in c if k.startswith("w_") and k.endswith("aux_vector")])
    reduction = width // c["w_block0_expert_down_weight"].shape[1]
    head = CollaborativeHead(
        width, c["const_num_heads"], blocks, experts, c["const_top_k"], reduction, 0.1, c["const_attention_axis"]
    )
    fill(head, tensors(c, "w_"))
    tokens = leaf(c["in_tokens"])
    out = head(tokens, modality(c["const_is_text"]))
    balance = balance_loss(out.probability, out.chosen)
    torch.testing.assert_close(out.tokens, torch.as_tensor(c["out_tokens"]), **VALUES)
    torch.testing.assert_close(out.pooled, torch.as_tensor(c["out_pooled"]), **VALUES)
    torch.testing.assert_close(balance.item(), c["out_balance_loss"], **VALUES)
    ((out.tokens * torch.as_tensor(c["cot_y"])).sum() + c["cot_balance"] * balance).backward()
    torch.testing.assert_close(tokens.grad, torch.as_tensor(c["grad_tokens"]), rtol=1e-3, atol=2e-4)
    grads = {name: parameter.grad for name, parameter in head.named_parameters()}
    for name, expected in tensors(c, "grad_w_").items():
        actual = grads[name] if grads[name] is not None else torch.zeros_like(expected)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@cases("comoe", "shard_balance")
def test_balance_of_shards_is_the_global_one(case: Path) -> None:
    c = load(case)
    experts, width = c["w_gate_aux"].shape
    router = DualGateRouter(width, experts, c["const_top_k"])
    router.load_state_dict(
        {
            "mix": torch.tensor([c["w_mix"]]),
            "gate_image.weight": torch.as_tensor(c["w_gate_image"]),
            "gate_text.weight": torch.zeros(experts, width),
            "gate_aux.weight": torch.as_tensor(c["w_gate_aux"]),
        }
    )
    tokens = torch.as_tensor(c["in_tokens"]).transpose(0, 1)  # the second axis is split: it is our row axis
    world, rows = c["const_world"], len(c["in_tokens"][0])
    probability, chosen = (x[:, None] for x in router(tokens, torch.as_tensor(c["in_aux_vector"]), "image").row_means())
    shares = [
        balance_loss(probability, chosen, rows=rank_slice(rows, rank, world), world_size=world) for rank in range(world)
    ]
    mean = torch.stack(shares).mean()
    torch.testing.assert_close(mean.item(), c["out_global_balance"], **VALUES)
    mean.backward()
    grad = router.gate_image.weight.grad
    torch.testing.assert_close(grad, torch.as_tensor(c["grad_global_gate_image"]), **VALUES)
    naive = torch.as_tensor(c["grad_naive_gate_image"])
    apart = (torch.as_tensor(c["grad_global_gate_image"]) - naive).abs().max()  # may be nil: all ranks choose alike
    torch.testing.assert_close((grad - naive).abs().max(), apart, **VALUES)
    local = [balance_loss(probability[s], chosen[s]).item() for s in (rank_slice(rows, r, world) for r in range(world))]
    torch.testing.assert_close(local, c["out_naive_local_balance"].tolist(), **VALUES)


@cases("comoe", "expert_usage")
def test_expert_usage(case: Path) -> None:
    c = load(case)
    experts, width = c["w_gate_aux"].shape
    router = DualGateRouter(width, experts, c["const_top_k"])
    router.load_state_dict(
        {"mix": torch.tensor([c["w_mix"]])}
        | {f"gate_{g}.weight": torch.as_tensor(c[f"w_gate_{g}"]) for g in ("image", "text", "aux")}
    )
    meter, call = ExpertUsageMeter(experts), 0
    while f"in_tokens_{call}" in c:
        tokens, aux = torch.as_tensor(c[f"in_tokens_{call}"]), torch.as_tensor(c["in_aux_vector"])
        routing = router(tokens, aux, modality(c[f"const_is_text_{call}"]))
        np.testing.assert_array_equal(routing.selected, c[f"in_selected_{call}"])
        meter.update(routing.selected)
        np.testing.assert_array_equal(meter.count, c[f"out_count_after_{call}"])
        assert meter.routes == int(np.sum(c[f"out_routes_after_{call}"]))
        call += 1
    np.testing.assert_allclose(meter.fraction(), c["out_fraction_4dp"], atol=6e-5)
    assert meter.entropy(c["const_epsilon"]) == pytest.approx(c["out_entropy_3dp"], abs=6e-4)
    assert meter.max_entropy == pytest.approx(c["out_max_entropy_3dp"], abs=6e-4)
    doubled = meter.reduced(lambda count: count * 2)
    assert doubled.routes == 2 * meter.routes


@cases("comoe", "variant_single_gate_moe")
def test_single_gate(case: Path) -> None:
    c = load(case)
    experts, width = c["w_gate_aux"].shape
    layer = SingleGateMoE(width, experts, c["const_top_k"], width // c["w_expert_down_weight"].shape[1])

    def name_of(name: str) -> str:
        return inside(name).removeprefix("moe.").removeprefix("router.")

    fill(layer, tensors(c, "w_", name_of))
    tokens, aux = leaf(c["in_tokens"]), leaf(c["in_aux_vector"])
    y, routing = layer(tokens, aux)
    balance = balance_loss(*(stat[:, None] for stat in routing.row_means()))
    torch.testing.assert_close(y, torch.as_tensor(c["out_y"]), **VALUES)
    torch.testing.assert_close(balance.item(), c["out_balance_loss"], **VALUES)
    np.testing.assert_array_equal(torch.bincount(routing.selected.flatten(), minlength=experts), c["out_count"])
    ((y * torch.as_tensor(c["cot_y"])).sum() + c["cot_balance"] * balance).backward()
    torch.testing.assert_close(tokens.grad, torch.as_tensor(c["grad_tokens"]), **VALUES)
    torch.testing.assert_close(aux.grad, torch.as_tensor(c["grad_aux_vector"]), **VALUES)
    grads = dict(layer.named_parameters())
    for name, expected in tensors(c, "grad_w_", name_of).items():
        torch.testing.assert_close(grads[name].grad, expected, **VALUES)


@cases("comoe", "variant_token_pooling")
def test_token_pooling(case: Path) -> None:
    c = load(case)
    queries, width = c["w_query"].shape
    pooling = fill(
        QueryTokenPooling(width, queries),
        tensors(c, "w_", lambda n: n if n == "query" else ".".join(n.rsplit("_", 1))),
    )
    tokens = leaf(c["in_tokens"])
    slots = pooling(tokens)
    torch.testing.assert_close(slots, torch.as_tensor(c["out_slots"]), **VALUES)
    (slots * torch.as_tensor(c["cot_y"])).sum().backward()
    torch.testing.assert_close(tokens.grad, torch.as_tensor(c["grad_tokens"]), **VALUES)
    torch.testing.assert_close(pooling.query.grad, torch.as_tensor(c["grad_w_query"]), **VALUES)


def test_start_values_pass_the_input_through() -> None:
    layer = SharedExpertLayer(32, 4, 2, 8, 0.1, 0).eval()
    z = torch.randn(5, 7, 32)
    y, routing = layer(z, torch.randn(32), "image")
    torch.testing.assert_close(y, z, rtol=0, atol=1e-6)
    assert not torch.equal(layer.experts.down_weight[0], layer.experts.down_weight[1])
    assert (routing.dense > 0).sum(-1).eq(2).all()


def test_uniform_routing_costs_k_over_e_per_block() -> None:
    """64 tokens: at every one the gate is uniform, and the choices go around evenly."""
    probability = torch.full((8, 3, 4), 0.25)
    chosen = torch.full((8, 3, 4), 0.5)
    assert balance_loss(probability, chosen).item() == pytest.approx(3 * 0.5)
    stat = (probability, chosen)
    assert joint_balance_loss(stat, stat).item() == pytest.approx(3 * 0.5)


def test_joint_balance_sees_what_the_separate_terms_do_not() -> None:
    """Images use expert 0 alone, texts expert 1 alone: each is unbalanced, both together use the pool evenly."""
    one, two = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    separate = balance_loss(one, one) + balance_loss(two, two)
    assert separate.item() == pytest.approx(2.0)
    assert joint_balance_loss((one, one), (two, two)).item() == pytest.approx(0.5)


def test_every_expert_gets_a_gradient_even_without_tokens() -> None:
    layer = SharedExpertLayer(16, 4, 1, 8, 0.0, 0)
    with torch.no_grad():
        layer.router.gate_image.weight.zero_()
        layer.router.gate_aux.weight.zero_()
        layer.router.gate_aux.weight[2] = 1.0  # expert 2 takes everything
    y, routing = layer(torch.randn(3, 5, 16), torch.ones(16), "image")
    assert routing.selected.eq(2).all()
    y.square().sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad[[0, 1, 3]].eq(0).all()


def test_training_dropout_is_a_function_of_the_row() -> None:
    torch.manual_seed(0)
    head = CollaborativeHead(16, 2, 2, 4, 2, 4, 0.3)
    for block in head.blocks:
        nn.init.normal_(block.moe.experts.up_weight)
    x, seeds = torch.randn(6, 5, 16), torch.from_numpy(row_seeds(1, 0, np.arange(6), "model"))
    whole = head(x, "image", seeds).tokens
    parts = torch.cat([head(x[a:b], "image", seeds[a:b]).tokens for a, b in ((0, 0), (0, 4), (4, 6))])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    head.activation_checkpointing = True
    torch.testing.assert_close(head(x, "image", seeds).tokens, whole)
    assert (head(x, "image", ~seeds).tokens - whole).abs().max() > 1e-3
    salts = [m.salt for m in head.modules() if hasattr(m, "salt")]
    assert len(set(salts)) == len(salts) == 4


def test_dense_training_and_evaluation_forms_agree_without_dropout() -> None:
    experts = AdapterExperts(4, 16, 4, 0.0, 0)
    nn.init.normal_(experts.up_weight)
    nn.init.normal_(experts.up_bias)
    z, logits = torch.randn(3, 5, 16), torch.randn(3, 5, 4)
    weight = route(logits, 2, torch.float32).dense
    fused = experts(z, weight)
    experts.drop_out = GivenMask(torch.ones(3, 16))
    torch.testing.assert_close(experts(z, weight), fused, rtol=1e-5, atol=1e-5)
