"""From question, answer and picture to tokens: the base model's own chat template, tokenizer and picture processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.models.mllm_folder import read_config

NOTHING = -100  # label of a token that is not learned


@dataclass(frozen=True)
class Chat:
    """Encodes conversations of one turn for one model folder."""

    folder: Path
    pixels: int  # budget of every picture; 0: the folder's own

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def _pictures(self) -> Any:
        from transformers import AutoImageProcessor

        budget = {"min_pixels": self.pixels, "max_pixels": self.pixels} if self.pixels else {}
        return AutoImageProcessor.from_pretrained(self.folder, **budget)

    @cached_property
    def image_token(self) -> int:
        return int(read_config(self.folder, str(self.folder))["image_token_id"])

    @cached_property
    def _end(self) -> list[int]:
        """What the template puts after an answer, up to the token that ends generation."""
        asked = [{"role": "user", "content": "a"}]
        said = self.tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "b"}], tokenize=False)
        start = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        tail = self.tokenizer.encode(said.removeprefix(start).removeprefix("b").rstrip(), add_special_tokens=False)
        return list(tail) or [int(self.tokenizer.eos_token_id)]

    def answer_ids(self, answer: str) -> list[int]:
        """Tokens of an answer without its end."""
        return list(self.tokenizer.encode(answer, add_special_tokens=False))

    def prompt(self, question: str) -> list[int]:
        """Tokens of a question, with one token in the place of the picture."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def batch(
        self, questions: Sequence[str], answers: Sequence[str], images: Sequence[np.ndarray]
    ) -> dict[str, Tensor]:
        """Rows padded on the right, each a picture, a question and its answer.

        images: uint8 [H, W, 3] each. Returns ids, labels int64 [n, L] (label of place i is the token after it; NOTHING
        elsewhere), length int64 [n], pixels float32 [n, P, D], grid int64 [n, 3] (patches that a row really has:
        time x rows x columns).
        """
        from PIL import Image

        given = self._pictures(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        grid, flat = given["image_grid_thw"], given["pixel_values"]
        counts = grid.prod(dim=1).tolist()
        merge = int(self._pictures.merge_size) ** 2
        rows = [
            self._row(question, answer, count // merge)
            for question, answer, count in zip(questions, answers, counts, strict=True)
        ]
        width = max(len(ids) for ids, _ in rows)
        pad = int(self.tokenizer.pad_token_id)
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [NOTHING] * (width - len(labels)) for _, labels in rows])
        length = torch.tensor([len(ids) for ids, _ in rows])
        pixels = torch.nn.utils.rnn.pad_sequence(flat.split(counts), batch_first=True)
        return {"ids": ids, "labels": labels, "length": length, "pixels": pixels, "grid": grid}

    def _row(self, question: str, answer: str, tokens: int) -> tuple[list[int], list[int]]:
        prompt, said = self.prompt(question), [*self.answer_ids(answer), *self._end]
        if prompt.count(self.image_token) != 1:
            raise UserError(
                f"{self.folder}: its chat template gives {prompt.count(self.image_token)} places for one picture"
            )
        at = prompt.index(self.image_token)
        prompt = [*prompt[:at], *[self.image_token] * tokens, *prompt[at + 1 :]]
        return [*prompt, *said[:-1]], [NOTHING] * (len(prompt) - 1) + said
