"""What the vision tower learns by before there is a language tower that could ask it: dropped after training.

Each attribute has a query that looks for its token among the visual tokens, as the language tower will: so what is
seen must be said inside a token, findable by content and place. (A linear map of all tokens at once knows each place, which
the language tower does not.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from reid_dist.data.synthetic.identity import ATTRIBUTES
from reid_dist.generation.tiny.model import HEADS, TOKENS, WIDTH
from reid_dist.generation.tiny.questions import BINS, HIDDEN, PARTS, words_of
from reid_dist.generation.tiny.samples import UNCLEAR


class Heads(nn.Module):
    """A softmax per attribute on what its query finds, one per coordinate of each part's box on all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = [len(words_of(name)) for name in ATTRIBUTES]
        self.norm = nn.RMSNorm(WIDTH)
        self.keys_values = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.queries = nn.Parameter(torch.randn(HEADS, len(ATTRIBUTES), WIDTH // HEADS))
        self.places = nn.Parameter(torch.zeros(HEADS, len(ATTRIBUTES), TOKENS))
        self.attributes = nn.ModuleList(nn.Linear(WIDTH, count) for count in self.classes)
        self.boxes = nn.Linear(TOKENS * WIDTH, len(PARTS) * 4 * (BINS + 1))

    def tell(self, seen: Tensor) -> list[Tensor]:
        """Logits [B, words] of every attribute from visual tokens [B, T, D]."""
        split = self.keys_values(self.norm(seen)).unflatten(2, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = self.queries @ split[0].transpose(2, 3) / split.shape[-1] ** 0.5 + self.places
        found = (scores.softmax(3) @ split[1]).transpose(1, 2).flatten(2)
        return [head(found[:, i]) for i, head in enumerate(self.attributes)]

    @torch.inference_mode()
    def accuracy(self, seen: Tensor, answers: Tensor) -> dict[str, float]:
        """Per attribute, where the picture shows it: what there is to see for the language tower."""
        found = {}
        for i, (name, said) in enumerate(zip(ATTRIBUTES, self.tell(seen), strict=True)):
            shown = (answers[:, i] != UNCLEAR) & (answers[:, i] != list(words_of(name)).index(HIDDEN))
            found[name] = round((said.argmax(1) == answers[:, i])[shown].float().mean().item(), 4)
        return found

    def forward(self, seen: Tensor, answers: Tensor, boxes: Tensor) -> Tensor:
        """Mean loss of visual tokens [B, T, D] against answers [B, A] and boxes [B, 3, 4] (-1: not seen)."""
        told = enumerate(self.tell(seen))
        loss = torch.stack([functional.cross_entropy(s, answers[:, i], ignore_index=UNCLEAR) for i, s in told]).mean()
        said = self.boxes(seen.flatten(1)).unflatten(1, (-1, BINS + 1)).flatten(0, 1)
        return loss + 0.5 * functional.cross_entropy(said, boxes.flatten(), ignore_index=-1)
