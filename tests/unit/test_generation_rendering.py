"""Prompts that share texts and pictures against the same prompts rendered one by one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image

from reid_dist.generation.rendering import Rendering


@dataclass(frozen=True)
class Place:
    offset: int
    length: int


class Vllm:
    """Renders as vLLM does: a word is a token; `<picture>` becomes as many tokens as the picture has columns; a picture's data
    is given only while its core does not have it. `core` and `sender` forget in the same order, as long as both see the
    same requests.
    """

    def __init__(self, room: int = 1000, frame: int = 0) -> None:
        self.words: dict[str, int] = {}
        self.tokenised = self.processed = 0
        self.room, self.frame = room, frame
        self.sender: OrderedDict[str, None] = OrderedDict()
        self.core: OrderedDict[str, None] = OrderedDict()

    def __call__(self, prompt: dict[str, Any]) -> dict[str, Any]:
        if "prompt" in prompt:
            self.tokenised += 1
            prompt = {"prompt_token_ids": self.ids(prompt["prompt"])} | prompt
        found: dict[str, Any] = {
            "type": "token",
            "prompt_token_ids": list(prompt["prompt_token_ids"]),
            "arrival_time": 1,
        }
        if "multi_modal_data" not in prompt:
            return found
        self.processed += 1
        picture, (digest,) = prompt["multi_modal_data"]["image"], prompt["multi_modal_uuids"]["image"]
        ids, mark = found["prompt_token_ids"], self.ids("<picture>")[0]
        start = ids.index(mark)
        found["prompt_token_ids"] = ids[:start] + [mark] * picture.width + ids[start + 1 :]
        found["mm_placeholders"] = {"image": [Place(start + self.frame, picture.width - self.frame)]}
        found["mm_hashes"] = {"image": [digest]}
        found["mm_kwargs"] = {"image": [None if digest in self.sender else picture]}
        self.forget(self.sender, digest)
        return found | {"type": "multimodal"}

    def ids(self, text: str) -> list[int]:
        return [self.words.setdefault(word, len(self.words)) for word in text.split()]

    def forget(self, kept: OrderedDict[str, None], digest: str) -> None:
        kept[digest] = None
        kept.move_to_end(digest)
        while len(kept) > self.room:
            kept.popitem(last=False)

    def asked(self, prompt: dict[str, Any]) -> bool:
        """Whether the core has the picture of a prompt, in itself or with it."""
        (digest,), (data,) = prompt["mm_hashes"]["image"], prompt["mm_kwargs"]["image"]
        known = digest in self.core or data is not None
        self.forget(self.core, digest)
        return known

    def is_cached_item(self, mm_hash: str) -> bool:
        return mm_hash in self.sender

    def touch_sender_cache_item(self, mm_hash: str) -> None:
        self.sender.move_to_end(mm_hash)


PICTURES = {f"p{number}": Image.new("RGB", (5 + number, 8)) for number in range(6)}


def show(name: str) -> Callable[[], Image.Image]:
    return lambda: PICTURES[name]


def sense(prompt: dict[str, Any]) -> Any:
    """What a prompt says, besides whether its data travels with it."""
    return {name: value for name, value in prompt.items() if name not in ("arrival_time", "mm_kwargs")}


@pytest.mark.parametrize("frame", [0, 1])
def test_shared_prompts_are_those_of_single_ones(frame: int) -> None:
    """`frame` 1: a model whose picture takes the place of other tokens than one, for which nothing can be shared."""
    vllm, plain = Vllm(frame=frame), Vllm(frame=frame)
    rendering = Rendering(vllm, vllm)
    asked = [(f"<user> <picture> {what} ? <end>", name) for name in PICTURES for what in ("hat", "bag", "shoes", "hat")]
    asked.append(("<system> be short <user> <picture> hat ? <end>", "p1"))  # the picture stands elsewhere
    for text, name in asked:
        single = plain(
            {"prompt": text, "multi_modal_data": {"image": PICTURES[name]}, "multi_modal_uuids": {"image": [name]}}
        )
        shared = rendering(text, show(name), name)
        assert sense(shared) == sense(single)
        assert vllm.asked(shared)
    assert vllm.tokenised == 4, "each text once"
    assert vllm.processed == (2 * len(PICTURES) + 1 if frame == 0 else len(asked))


def test_a_picture_that_the_core_forgot_is_sent_again() -> None:
    vllm = Vllm(room=2)
    rendering = Rendering(vllm, vllm)
    order = ["p0", "p0", "p0", "p1", "p1", "p0", "p2", "p0", "p1", "p0", "p3", "p4", "p0", "p0"]
    assert all(vllm.asked(rendering("<picture> hat", show(name), name)) for name in order)
    assert list(vllm.sender) == list(vllm.core), "both forget in the same order"


def test_without_a_memory_of_pictures_each_is_rendered() -> None:
    vllm = Vllm()
    rendering = Rendering(vllm, None)
    assert all(rendering("<picture> hat", show("p0"), "p0")["mm_hashes"] == {"image": ["p0"]} for _ in range(4))
    assert vllm.processed == 4


def test_a_text_alone_is_vllms_own_rendering() -> None:
    vllm = Vllm()
    assert Rendering(vllm, vllm)("hat ?") == vllm({"prompt": "hat ?"})
