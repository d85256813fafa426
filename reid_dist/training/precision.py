"""`training.precision: fp16_pure`: the weights of matrix products in float16 without float32 masters, as IRRA, RDE and ICL train.

Linear layers, convolutions and what else multiplies (modules that say `half_weights`) are cast; norms, embedding tables, position
tables and everything else stay float32. It is cast here, at ZeRO stage 0 with DeepSpeed's own precision off, because DeepSpeed's
half precision keeps masters (and without them wants CPU offload). Adam's state of such weights is float16 too: weights above 0.03
cannot move by steps of 1e-5, and small gradients lose their second moment (methods/icl.md, T1). For parity, not for accuracy.
"""

from __future__ import annotations

import torch
from torch import nn


def multiplies(module: nn.Module) -> bool:
    """Whether a module's own parameters are those of a matrix product."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or getattr(module, "half_weights", False)


def cast_pure(model: nn.Module) -> None:
    """Cast in place; checkpoints stay float32, which holds float16 exactly."""
    for module in model.modules():
        if multiplies(module):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float16)
