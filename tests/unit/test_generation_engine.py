"""What the engine makes of a request before vLLM sees it, with a tokenizer of words."""

from __future__ import annotations

import asyncio
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


def test_turns_are_what_the_template_renders_and_it_renders_once() -> None:
    words = Words()
    made = engine(words)
    for text in ("hat ?", "a {braced} 'hat' ?"):
        assert made._text(Request(text, Sampling(1))) == f"<user> {text} <assistant>"
        assert made._text(Request(text, Sampling(1), b"picture")) == f"<user> <picture> {text} <assistant>"
    assert words.rendered == 2, "once with a picture, once without"


def test_a_picture_is_named_by_the_digest_of_its_file() -> None:
    made, image = engine(Words()), jpeg(1)
    seen: list[Any] = []
    made._rendering = lambda *asked: seen.append(asked)
    made._prompt("hat ?", image)
    made._prompt("hat ?", None)
    (text, picture, digest), alone = seen
    assert (text, picture().size, digest) == ("hat ?", (16, 32), hashlib.sha256(image).hexdigest())
    assert alone == ("hat ?",)


def test_a_prompt_longer_than_the_context_is_refused_before_vllm_sees_it() -> None:
    made = engine(Words())
    made._text(Request("word " * 14, Sampling(4)))  # 14 + 2 of the template + 4 to answer
    with pytest.raises(BadInput, match="has 17 tokens without the picture and may answer with 4; the context is 20"):
        made._text(Request("word " * 15, Sampling(4)))


def test_a_template_that_loses_the_text_is_refused() -> None:
    for template in ("<user> <assistant>", "{text} and {text}"):
        with pytest.raises(UserError, match="chat template"):
            engine(Words(template))._text(Request("hat ?", Sampling(1)))


def test_a_picture_that_is_none_is_bad_input() -> None:
    made = engine(Words())
    made._rendering = lambda text, picture, digest: picture()
    with pytest.raises(BadInput, match="cannot be decoded"):
        made._prompt("hat ?", b"none")


def test_an_engine_that_can_answer_nothing_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(Words())
    asked: list[Request] = []

    async def refuses(request: Request) -> None:
        asked.append(request)
        raise BadInput("vLLM refuses the request: the picture has 64 tokens")

    monkeypatch.setattr(made, "generate", refuses)
    with pytest.raises(UserError, match=r"model answers no question: .* 64 tokens"):
        asyncio.run(made._warm_up())
    assert len(asked) == 1
    assert asked[0].image


def test_an_engine_that_stalls_at_its_first_question_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made = VllmEngine(EngineConfig(path="model", stall_s=0.05))
    monkeypatch.setattr(made, "generate", lambda request: asyncio.sleep(60))
    with pytest.raises(TimeoutError):
        asyncio.run(made._warm_up())
