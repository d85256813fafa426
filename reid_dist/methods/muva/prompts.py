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
from reid_dist.methods.muva.config import PARTS, Config

PREFIX = "A photo of a"
WORDS = {"": "person", "head": "head of a person", "upper": "upper body of a person", "legs": "legs of a person"}

PROMPT_SETTINGS = (  # a stage 2 must share them with the stage 1 that it starts from
    "arch", "image_size", "stride", "parts", "part_tokens", "template", "prompt_words", "domain_text",
)  # fmt: skip


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
    """The learnable words of every identity, whose they are, and under which settings they were learnt."""

    people: Tensor
    settings: Tensor

    def __init__(self, classes: int, grains: int, words: int, width: int) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.empty(classes, grains, words, width))
        nn.init.normal_(self.context, std=0.002)
        # Keys in label order (people_keys) and of the settings (settings_keys). Zeros: stage 1 has not reached its end.
        self.register_buffer("people", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("settings", torch.zeros(len(PROMPT_SETTINGS), dtype=torch.int64))

    def sign(self, people: Tensor, settings: Tensor) -> None:
        """Say that these prompts are learnt: for whom (people_keys) and how (settings_keys)."""
        self.people.copy_(people)
        self.settings.copy_(settings)

    def forward(self, labels: Tensor, template: Tensor, start: int) -> Tensor:
        """labels int64 [n], embedded template [1 + R, T, width] -> prompts [n, 1 + R, T, width]."""
        own = self.context[labels]
        fixed = template.to(own.dtype).expand(len(labels), -1, -1, -1)
        return torch.cat([fixed[:, :, :start], own, fixed[:, :, start + own.shape[2] :]], dim=2)


def people_keys(
    domain: Sequence[str] | np.ndarray, pid: np.ndarray, label: np.ndarray, digests: Sequence[str]
) -> Tensor:
    """int64 [N]: a key of the person behind each label 0 ... N-1, never zero. Rows of images come in.

    A person is (domain, pid) with exactly these images: numbers alone would take two sets of one layout for each other.
    Raises UserError when a label has no image.
    """
    labels, first = np.unique(label, return_index=True)
    if not np.array_equal(labels, np.arange(len(labels))):
        absent = sorted(set(range(int(labels.max()) + 1)) - set(labels.tolist()))
        raise UserError(f"classes without images: {absent[:5]}; labels must run from 0 without a gap")
    images: list[list[str]] = [[] for _ in labels]
    for place, digest in zip(label.tolist(), digests, strict=True):
        images[place].append(digest)
    return _keys(f"{domain[row]}/{int(pid[row])}/{' '.join(sorted(images[n]))}" for n, row in enumerate(first))


def settings_keys(config: Config) -> Tensor:
    """int64 [len(PROMPT_SETTINGS)]: a key of each setting on which learnt prompts depend, never zero."""
    return _keys(repr(getattr(config, name)) for name in PROMPT_SETTINGS)


def _keys(texts: Iterable[str]) -> Tensor:
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) or 1 for digest in digests], dtype=torch.int64)


def check_prompts(learnt: IdentityPrompts, people: Tensor, settings: Tensor) -> None:
    """Refuse prompts that were not learnt to the end, for other people, or otherwise. Raises UserError.

    The keys of the people must agree in label order: prompts are valid with the same label map alone (methods/muva.md section
    8, trap 11).
    """
    theirs, how = learnt.people.cpu(), learnt.settings.cpu()
    if not bool(theirs.any()):
        raise UserError(
            "these weights hold no learnt prompts for the training identities: run stage 1 too (model.stages=[prompts, "
            "finetune]), start from a stage-1 run of the same tables that reached its end (init=run:URI), or train without "
            "prompts (model.weight_i2t=0)"
        )
    if not torch.equal(theirs, people):
        wrong = int((theirs != people).sum()) if theirs.shape == people.shape else len(people)
        raise UserError(
            f"the prompts were learnt with another label map: {wrong} of {len(people)} labels stand for other people or other "
            "images of them; start from a stage-1 run on the same tables"
        )
    other = [name for name, ours, made in zip(PROMPT_SETTINGS, settings, how, strict=True) if ours != made]
    if other:
        raise UserError(
            f"the prompts were learnt with another value of {', '.join(f'model.{name}' for name in other)}: use that run's "
            "value, or run stage 1 again"
        )
