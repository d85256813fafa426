"""What the engine makes of a request before vLLM sees it, with a tokenizer of words."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from reid_dist.errors import UserError
from reid_dist.generation.engine import EngineConfig, VllmEngine
from reid_dist.generation.messages import BadInput, Request, Sampling
from tests.tables import jpeg


class Words:
    """A chat template in the manner of Qwen2-VL's, and one token per word."""

    def __init__(self, template: str = "<user> {picture}{text} <assistant>") -> None:
        self.template, self.rendered = template, 0

    def apply_chat_template(self, turns: list[dict[str, Any]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert (tokenize, add_generation_prompt) == (False, True)
        self.rendered += 1
        content = turns[0]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        picture = "<picture> " if {"type": "image"} in parts else ""
        return self.template.format(picture=picture, text=parts[-1]["text"])

    def encode(self, text: str) -> list[str]:
        return text.split()


def engine(tokenizer: Words, context: int = 20) -> VllmEngine:
    made = VllmEngine(EngineConfig(path="model", context=context))
    made._tokenizer = tokenizer
    return made


def test_prompts_are_what_the_template_renders_and_it_renders_once() -> None:
    words = Words()
    made = engine(words)
    image = jpeg(1)
    for text in ("hat ?", "a {braced} 'hat' ?"):
        assert made._prompt(Request(text, Sampling(1))) == {"prompt": f"<user> {text} <assistant>"}
        seen = made._prompt(Request(text, Sampling(1), image))
        assert seen["prompt"] == f"<user> <picture> {text} <assistant>"
        assert seen["multi_modal_uuids"] == {"image": [hashlib.sha256(image).hexdigest()]}
        assert seen["multi_modal_data"]["image"].size == (16, 32)
    assert words.rendered == 2, "once with a picture, once without"


def test_a_prompt_longer_than_the_context_is_refused_before_vllm_sees_it() -> None:
    made = engine(Words())
    made._prompt(Request("word " * 14, Sampling(4)))  # 14 + 2 of the template + 4 to answer
    with pytest.raises(BadInput, match="has 17 tokens without the picture and may answer with 4; the context is 20"):
        made._prompt(Request("word " * 15, Sampling(4)))


def test_a_template_that_loses_the_text_is_refused() -> None:
    for template in ("<user> <assistant>", "{text} and {text}"):
        with pytest.raises(UserError, match="chat template"):
            engine(Words(template))._prompt(Request("hat ?", Sampling(1)))


def test_a_picture_that_is_none_is_bad_input() -> None:
    with pytest.raises(BadInput, match="cannot be decoded"):
        engine(Words())._prompt(Request("hat ?", Sampling(1), b"none"))
