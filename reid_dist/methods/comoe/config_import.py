"""The yaml file that the released code writes beside its checkpoints, and a recipe made of it.

The file holds `!!python/tuple` tags, at which a safe loader fails; this one knows that tag and no other object.
"""

from __future__ import annotations

from typing import Any

import yaml

from reid_dist.errors import UserError

# Their key -> ours. Keys of theirs that are parsed and never read (moe_lr_factor, cnum, ...) have no counterpart.
KEYS = {
    "num_epoch": "training.epochs",
    "batch_size": "training.global_batch",
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "lrscheduler": "schedule.mode",
    "warmup_epochs": "schedule.warmup",
    "warmup_factor": "schedule.warmup_factor",
    "warmup_method": "schedule.warmup_method",
    "target_lr": "schedule.target_lr",
    "power": "schedule.power",
    "milestones": "schedule.milestones",
    "gamma": "schedule.gamma",
    "test_batch_size": "evaluation.batch",
    "img_size": "model.image_size",
    "stride_size": "model.stride",
    "text_length": "model.text_length",
    "moe_layers": "model.head_blocks",
    "moe_heads": "model.head_heads",
    "num_experts": "model.experts",
    "topk": "model.top_k",
    "reduction": "model.reduction",
    "temperature": "model.temperature",
    "aux_factor": "model.balance_weight",
    "id_loss_weight": "model.id_weight",
    "mlm_loss_weight": "model.mlm_weight",
    "cmt_depth": "model.mlm_depth",
    "img_aug": "model.augment",
    "sampler": "model.sampler",
    "num_instance": "model.instances",
    "lr_factor": "model.lr_factor",
    "bias_lr_factor": "model.bias_lr_factor",
    "weight_decay_bias": "model.bias_weight_decay",
}
_LOSSES = {"sdm": "sdm", "itc": "itc", "aux": "balance", "cmpm": "cmpm", "id": "id", "mlm": "mlm"}
_FLOATS = ("schedule.target_lr",)  # written as an integer in their files


class _ReleasedLoader(yaml.SafeLoader):
    """Safe YAML plus tuples."""


def _tuple(loader: _ReleasedLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node))


_ReleasedLoader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)


def read_released(text: str) -> dict[str, Any]:
    """Values of a released yaml; tuples stay tuples. Raises UserError for other tags, broken YAML, or no mapping."""
    try:
        values = yaml.load(text, _ReleasedLoader)  # noqa: S506 - a SafeLoader with one more constructor
    except yaml.YAMLError as error:
        raise UserError(f"released config: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"released config: expected a mapping of keys, found {type(values).__name__}")
    return values


def recipe_overrides(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """({our dotted key: value}, keys of theirs that have no counterpart). Raises UserError for an unknown loss name."""
    ours: dict[str, Any] = {KEYS[key]: value for key, value in values.items() if key in KEYS}
    for key in _FLOATS:
        if key in ours:
            ours[key] = float(ours[key])
    if "alpha" in values and "beta" in values:
        ours["optim.betas"] = (values["alpha"], values["beta"])
    if "loss_names" in values:
        theirs = [*values["loss_names"].split("+"), *(["mlm"] if values.get("MLM") else [])]
        unknown = [name for name in theirs if name not in _LOSSES]
        if unknown:
            raise UserError(f"released config: loss {unknown[0]!r} is not one of {', '.join(_LOSSES)}")
        ours["model.losses"] = tuple(dict.fromkeys(_LOSSES[name] for name in theirs))
    handled = {*KEYS, "alpha", "beta", "loss_names", "MLM"}
    return ours, sorted(set(values) - handled)
