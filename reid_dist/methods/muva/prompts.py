"""Prompts of identities: fixed templates with learnable words, one set per identity and grain.

Source: methods/muva.md section 3.5; what runs in stage 1 and why it is enough: section 8, trap 6. The text tower is
causal and its feature is read at the end token, so tokens behind the last end token cannot matter: only `length` of
77 are computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from reid_dist.data.text import ClipTokenizer
from reid_dist.errors import UserError
from reid_dist.methods.muva.config import PARTS

PREFIX = "A photo of a"
WORDS = {"": "person", "head": "head of a person", "upper": "upper body of a person", "legs": "legs of a person"}


@dataclass(frozen=True, eq=False)
class PromptTemplates:
    """Token ids of all grains (whole person first) and where the learnable words lie."""

    ids: np.ndarray  # int64 [1 + R, context length], zero padded
    end: np.ndarray  # int64 [1 + R] position of the end token
    start: int  # position of the first learnable word
    words: int  # learnable words

    @property
    def length(self) -> int:
        """Tokens that can matter: up to the last end token."""
        return int(self.end.max()) + 1


def prompt_templates(
    parts: Iterable[str], words: int, template: str, domain_text: str, tokenizer: ClipTokenizer, length: int
) -> PromptTemplates:
    """Templates of the whole person and of `parts` (any order; the fixed order is taken).

    Raises UserError when a template does not fit into `length` tokens.
    """
    wanted = set(parts)
    grains = ["", *(part for part in PARTS if part in wanted)]
    stars = " ".join("*" * words)
    tail = f", {domain_text}" if domain_text else ""
    texts = [
        f"{PREFIX} {stars}{tail}" if template == "part-agnostic" else f"{PREFIX} {stars} {WORDS[grain]}{tail}"
        for grain in grains
    ]
    needed = max(len(tokenizer.bpe(text)) + 2 for text in texts)
    if needed > length:
        raise UserError(
            f"a prompt needs {needed} tokens, the text tower has {length}: lower model.prompt_words (now {words}) "
            f"or shorten model.domain_text (now {domain_text!r})"
        )
    ids = tokenizer.encode_all(texts, length)
    end = np.argmax(ids == tokenizer.end_id, axis=1)
    return PromptTemplates(ids, end, 1 + len(tokenizer.bpe(PREFIX)), words)


class IdentityPrompts(nn.Module):
    """The learnable words of every identity, and whose they are."""

    people: Tensor

    def __init__(self, classes: int, grains: int, words: int, width: int) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.empty(classes, grains, words, width))
        nn.init.normal_(self.context, std=0.002)
        # Keys of the identities in label order (people_keys); zeros: these prompts were never learnt.
        self.register_buffer("people", torch.zeros(classes, dtype=torch.int64))

    def forward(self, labels: Tensor, template: Tensor, start: int) -> Tensor:
        """labels int64 [n], embedded template [1 + R, T, width] -> prompts [n, 1 + R, T, width]."""
        own = self.context[labels]
        fixed = template.to(own.dtype).expand(len(labels), -1, -1, -1)
        return torch.cat([fixed[:, :, :start], own, fixed[:, :, start + own.shape[2] :]], dim=2)


def people_keys(domain: Sequence[str] | np.ndarray, pid: np.ndarray, label: np.ndarray) -> Tensor:
    """int64 [N]: a key of the person (domain, pid) behind each label 0 ... N-1, never zero. Rows of images come in.

    Raises UserError when a label has no image.
    """
    labels, first = np.unique(label, return_index=True)
    if not np.array_equal(labels, np.arange(len(labels))):
        absent = sorted(set(range(int(labels.max()) + 1)) - set(labels.tolist())) if len(labels) else []
        raise UserError(f"classes without images: {absent[:5]}; labels must run from 0 without a gap")
    names = [f"{domain[row]}/{int(pid[row])}".encode() for row in first]
    digests = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
    keys = [int.from_bytes(digest, "little", signed=True) or 1 for digest in digests]
    return torch.tensor(keys, dtype=torch.int64)
