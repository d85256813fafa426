"""Taking over published weights: which of our parameters they cover, and what is left over on both sides."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from reid_dist.errors import UserError

logger = logging.getLogger(__name__)

LEAST_SHARE = 0.95  # of our parameters; below this the file belongs to something else


def adopt(model: nn.Module, renamed: Mapping[str, Tensor], unused: Iterable[str]) -> dict[str, Tensor]:
    """`renamed` {our name: tensor} -> those that `model` has, in its shapes (equal element counts may be reshaped)
    and types.

    Logs the share of our parameters that are covered, what is missing and which of their names are `unused`. Raises
    UserError under 95 %, or when a tensor has another size: half of a geometry must not start silently from random
    values.
    """
    expected = model.state_dict()
    taken: dict[str, Tensor] = {}
    foreign = [*unused, *(name for name in renamed if name not in expected)]
    for name, tensor in renamed.items():
        if name not in expected:
            continue
        if tensor.numel() != expected[name].numel() or tensor.squeeze().shape != expected[name].squeeze().shape:
            raise UserError(
                f"weights for {name} have shape {tuple(tensor.shape)}, the recipe's model has "
                f"{tuple(expected[name].shape)}: choose the image size, text length and head of the released run"
            )
        taken[name] = tensor.reshape(expected[name].shape).to(expected[name].dtype)
    total = sum(tensor.numel() for tensor in expected.values())
    share = sum(tensor.numel() for tensor in taken.values()) / total
    missing = sorted(set(expected) - set(taken))
    summary = (
        f"{100 * share:.2f} % of our parameters are in the file ({len(taken)} of {len(expected)} names); "
        f"missing: {_some(missing)}; unused in the file: {_some(foreign)}"
    )
    if share < LEAST_SHARE:
        raise UserError(f"these weights do not fit: {summary}")
    logger.info(summary)
    return taken


def _some(names: list[str], limit: int = 12) -> str:
    return (", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")) or "none"
