"""Convolution, mixers and their ablation variants against the authors' numbers; start values; causality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reid_dist.models.mamba import BidirectionalMambaMixer, MambaMixer, ScanPath, causal_conv1d
from reid_dist.models.mamba.mixer import default_rank, step_bias
from reid_dist.models.mamba.variants import (
    FourDirectionBlock,
    StrideMambaMixer,
    ThreeWayMambaMixer,
    cross_merge,
    cross_scan,
    stride_regroup,
    stride_restore,
)
from tests.golden import cases, load
from tests.unit.mamba_names import close, fill, mixer_names, tensor

OUT, GRAD = 1e-5, 1e-4  # the vectors' own tolerances, of the largest entry


@cases("climb", "causal_conv1d")
def test_causal_conv1d(case: Path) -> None:
    c = load(case)
    leaves = {"x": tensor(c["in_x"]), "weight": tensor(c["w_weight"])}
    leaves |= {"bias": tensor(c["w_bias"])} if "w_bias" in c else {}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = causal_conv1d(**leaves)
    y.backward(tensor(c["in_grad_out"]))
    close(y, c["out_y"], OUT, "y")
    for name, leaf in leaves.items():
        close(leaf.grad, c[f"grad_{name}"], OUT, name)  # type: ignore[arg-type]


def check_module(module: nn.Module, c: dict[str, Any], names: dict[str, str]) -> None:
    """Output and all gradients of a module with the case's weights, in float64."""
    module = module.double()
    fill(module, c, names)
    x = tensor(c["in_x"]).requires_grad_()
    y = module(x)
    y.backward(tensor(c["in_grad_out"]))
    close(y, c["out_y"], OUT, "y")
    close(x.grad, c["grad_x"], GRAD, "x")  # type: ignore[arg-type]
    parameters = dict(module.named_parameters())
    assert set(parameters) == set(names.values())
    for theirs, ours in names.items():
        close(parameters[ours].grad, c[f"grad_w_{theirs}"], GRAD, theirs)  # type: ignore[arg-type]


def sizes(c: dict[str, Any]) -> dict[str, int]:
    return {"width": c["in_x"].shape[-1], "states": c["const_d_state"], "taps": c["const_d_conv"],
            "expand": c["const_expand"], "rank": c["const_dt_rank"]}  # fmt: skip


@cases("climb", "mamba_block")
def test_plain_mixer(case: Path) -> None:
    c = load(case)
    check_module(MambaMixer(**sizes(c)), c, mixer_names(1))


@cases("climb", "bimamba_block")
def test_bidirectional_mixer(case: Path) -> None:
    c = load(case)
    check_module(BidirectionalMambaMixer(**sizes(c)), c, mixer_names(2))


@cases("climb", "srmamba_block")
def test_stride_mixer(case: Path) -> None:
    c = load(case)
    check_module(StrideMambaMixer(rate=c["const_rate"], **sizes(c)), c, mixer_names(2))


@cases("climb", "threeway_mamba_block")
def test_three_way_mixer(case: Path) -> None:
    c = load(case)
    check_module(ThreeWayMambaMixer(frames=c["const_nframes"], **sizes(c)), c, mixer_names(3))


def test_three_way_mixer_refuses_ragged_frames() -> None:
    with pytest.raises(ValueError, match="7 tokens do not make 3 equal frames"):
        ThreeWayMambaMixer(4, 3)(torch.zeros(1, 7, 4))


@cases("climb", "vss_block")
def test_four_direction_block(case: Path) -> None:
    c = load(case)
    module = FourDirectionBlock(
        c["in_x"].shape[-1], c["const_d_state"], c["const_d_conv"], c["const_ssm_ratio"], c["const_dt_rank"]
    )
    assert (module.norm.eps, module.out_norm.eps) == (c["const_ln_eps_block"], c["const_ln_eps_out"])
    ours = {
        "norm_weight": "norm.weight", "norm_bias": "norm.bias", "op_in_proj_weight": "in_proj.weight",
        "op_conv2d_weight": "conv.weight", "op_conv2d_bias": "conv.bias", "op_x_proj_weight": "x_weight",
        "op_dt_projs_weight": "dt_weight", "op_dt_projs_bias": "dt_bias", "op_A_logs": "A_log", "op_Ds": "D",
        "op_out_norm_weight": "out_norm.weight", "op_out_norm_bias": "out_norm.bias",
        "op_out_proj_weight": "out_proj.weight",
    }  # fmt: skip
    check_module(module, c, ours)


@cases("climb", "stride_regroup")
def test_stride_regroup(case: Path) -> None:
    c = load(case)
    x, rate = tensor(c["in_x"]), c["const_rate"]
    regrouped = stride_regroup(x, rate)
    assert torch.equal(regrouped, tensor(c["out_regrouped"]))
    assert torch.equal(stride_restore(regrouped, rate, x.shape[-1]), tensor(c["out_restored"]))


@cases("climb", "cross_scan")
def test_cross_scan(case: Path) -> None:
    c = load(case)
    x, ys = tensor(c["in_x"]).requires_grad_(), tensor(c["in_ys"]).requires_grad_()
    xs, merged = cross_scan(x), cross_merge(ys)
    xs.backward(tensor(c["in_grad_xs"]))
    merged.backward(tensor(c["in_grad_merged"]))
    for actual, name in ((xs, "out_xs"), (merged, "out_merged"), (x.grad, "grad_x"), (ys.grad, "grad_ys")):
        close(actual, c[name], 1e-6, name)  # type: ignore[arg-type]


@cases("climb", "mamba_init")
def test_start_values(case: Path) -> None:
    c = load(case)
    channels = len(c["in_uniform"])
    assert default_rank(c["const_d_model"]) == c["const_dt_rank"]
    path = ScanPath(channels, c["const_d_state"], c["const_dt_rank"])
    path.reset_parameters(tensor(c["in_uniform"], torch.float32))
    close(path.dt_bias, c["out_dt_bias"], 1e-5, "step bias")
    close(path.A_log, c["out_A_log"], 1e-5, "A_log")
    close(path.D, c["out_D"], 1e-5, "D")
    bound = c["out_dt_weight_bound"]
    assert 0.8 * bound < float(path.dt_weight.detach().abs().max()) <= bound


def test_both_directions_start_with_the_same_step_bias() -> None:
    ahead, back = BidirectionalMambaMixer(32).paths
    assert torch.equal(ahead.dt_bias, back.dt_bias)
    assert not torch.equal(ahead.x_weight, back.x_weight)
    step = torch.nn.functional.softplus(step_bias(torch.tensor([0.0, 0.5, 1.0])))
    torch.testing.assert_close(step, torch.tensor([0.001, 0.01, 0.1]))


def test_size_of_the_published_mixer() -> None:
    assert sum(p.numel() for p in BidirectionalMambaMixer(768).parameters()) == 4_002_816


def test_plain_mixer_is_causal_and_the_other_is_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 12, 8)
    changed = x.clone()
    changed[0, 7] += 1
    for module, causal in ((MambaMixer(8), True), (BidirectionalMambaMixer(8), False)):
        difference = (module(x) - module(changed)).abs().sum(-1)[0] > 1e-7
        assert difference[7]
        assert bool(difference[:7].any()) is not causal


def test_rows_do_not_mix() -> None:
    torch.manual_seed(0)
    module, x = BidirectionalMambaMixer(8), torch.randn(5, 9, 8)
    whole = module(x)
    torch.testing.assert_close(whole[1:3], module(x[1:3]))
    assert module(x[:0]).shape == (0, 9, 8)
    module(x[:0]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
