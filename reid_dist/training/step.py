"""One optimizer step: outputs, losses, gradients, update; whole or in micro-batches with exact in-batch losses.

With training.micro_batches > 1 each piece's outputs are computed under a checkpoint: the losses see the outputs of the whole
batch, and the one backward pass computes each piece's activations again when it reaches it. So at most one piece's activations
are alive, the gradient is exactly the whole batch's, and every parameter's gradient is reduced once (accumulating pieces
inside DeepSpeed gave wrong sums at ZeRO 2 and 3). Draws inside the model depend on row seeds, so both passes see the same
dropout. Cost: one more forward pass. It is exact wherever `forward` is row-wise; a model with batch norm inside its forward
must refuse it.

A rank (or piece) without rows runs the same code on tensors of zero rows: its gradients are zeros, but they take part in the
same reductions as everybody's, in the same order. Nothing may be skipped for being empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reid_dist.data.samplers import rank_slice
from reid_dist.methods.spec import Batch, Outputs, Stage, Terms
from reid_dist.training.context import RunContext


class StepModule(nn.Module):
    """What DeepSpeed wraps: every pass through the model goes through its forward, as ZeRO-3's hooks need."""

    def __init__(self, model: nn.Module, stage: Stage, ctx: RunContext, micro_batches: int) -> None:
        super().__init__()
        self.model = model
        self._stage, self._ctx, self._pieces = stage, ctx, micro_batches
        self.terms: Terms = {}
        self.outputs: Outputs = {}

    def forward(self, batch: Batch) -> Tensor:
        """The objective of this rank's rows (mean over ranks = global); its terms and outputs stay in the attributes."""
        computed = self._outputs(batch)
        terms = self._stage.losses(self.model, computed, batch, self._ctx)
        self.terms = {name: value.detach() for name, value in terms.items()}
        self.outputs = {name: value.detach() for name, value in computed.items()}
        return torch.stack([value.float() for value in terms.values()]).sum()

    def _outputs(self, batch: Batch) -> Outputs:
        if self._pieces == 1:
            return self._stage.forward(self.model, batch, self._ctx)
        count = int(batch["row"].shape[0])
        parts = [
            checkpoint(
                self._piece, batch, rank_slice(count, i, self._pieces), use_reentrant=False, preserve_rng_state=False
            )
            for i in range(self._pieces)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _piece(self, batch: Batch, rows: slice) -> Outputs:
        """Outputs of some rows: every tensor of a batch is row-wise and is cut, the rest is carried along."""
        piece = {key: value[rows] if isinstance(value, Tensor) else value for key, value in batch.items()}
        return self._stage.forward(self.model, piece, self._ctx)


def run_step(engine: Any, module: StepModule, batch: Batch) -> tuple[Terms, Outputs]:
    """Forward, backward and update. Returns this rank's detached terms and outputs."""
    engine.backward(engine(batch))
    engine.step()
    return module.terms, module.outputs
