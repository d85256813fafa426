"""Requests in the form in which vLLM's core takes them, rendered once for what they share.

vLLM renders every request from the beginning: it tokenises the text and searches the picture's place in it, though most requests
of a job ask the same text about many pictures, or many texts about one picture. Here a text is tokenised once, and from the
third question about a picture on its part is put in place without asking vLLM's processor again. What comes out is the same
(tests/e2e/test_generate.py compares). All of it happens in the event loop: for short questions a thread costs more than it gives.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

KEPT = 256  # texts, and pictures, that are remembered
Input = Mapping[str, Any]  # vLLM's EngineInput


class Cache(Protocol):
    """vLLM's memory of the pictures that its core has; the core evicts in the order in which they are asked for here."""

    def is_cached_item(self, mm_hash: str) -> bool: ...
    def touch_sender_cache_item(self, mm_hash: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Placed:
    """A picture's part of a prompt. `before`: token ids up to it; `run`: the ids that stand for it; `rest`: vLLM's input of a
    question about it without the picture's data, which the core has.
    """

    before: list[int]
    run: list[int]
    rest: Input


class Rendering:
    """`render`: vLLM's own rendering of one prompt. `cache`: None where vLLM keeps no pictures; then each is rendered anew."""

    def __init__(self, render: Callable[[dict[str, Any]], Input], cache: Cache | None) -> None:
        self._render, self._cache = render, cache
        self._placed: OrderedDict[str, Placed] = OrderedDict()
        self._tokens = functools.lru_cache(maxsize=KEPT)(self._tokenised)

    def __call__(self, text: str, picture: Callable[[], Image.Image] | None = None, digest: str = "") -> Input:
        """A prompt with its picture, which `digest` stands for in vLLM's caches. Raises what vLLM raises."""
        if picture is None:
            return self._render({"prompt": text})
        ids = self._tokens(text)
        if (known := self._known(digest)) and ids[: len(known.before)] == known.before:
            after = ids[len(known.before) + 1 :]
            return {**known.rest, "prompt_token_ids": [*known.before, *known.run, *after]}
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": picture()}}
        found = self._render(prompt | {"multi_modal_uuids": {"image": [digest]}})
        self._keep(digest, ids, found)
        return found

    def _tokenised(self, text: str) -> list[int]:
        return list(self._render({"prompt": text})["prompt_token_ids"])

    def _known(self, digest: str) -> Placed | None:
        """The picture's part, if vLLM's core still has the picture."""
        known = self._placed.get(digest)
        if known is None or self._cache is None:
            return None
        if not self._cache.is_cached_item(digest):
            del self._placed[digest]
            return None
        self._cache.touch_sender_cache_item(digest)
        self._placed.move_to_end(digest)
        return known

    def _keep(self, digest: str, ids: list[int], found: Input) -> None:
        """Remember the part of a picture that stands where one token of the text stood, once the core has the picture."""
        if list(found["mm_hashes"].get("image", ())) != [digest] or found["mm_kwargs"]["image"][0] is not None:
            return
        (place,) = found["mm_placeholders"]["image"]
        start, end, whole = place.offset, place.offset + place.length, list(found["prompt_token_ids"])
        if whole[:start] == ids[:start] and whole[end:] == ids[start + 1 :]:
            rest = {name: value for name, value in found.items() if name not in ("prompt_token_ids", "arrival_time")}
            self._placed[digest] = Placed(whole[:start], whole[start:end], rest)
            if len(self._placed) > KEPT:
                self._placed.popitem(last=False)
