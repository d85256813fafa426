"""A tuned and merged small model, served by vLLM itself: it answers as the library does with the adapter beside the base."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from reid_dist import methods
from reid_dist.data.store import open_view
from reid_dist.data.synthetic.identity import ATTRIBUTES
from reid_dist.data.synthetic.words import read_phrases
from reid_dist.generation.engine import EngineConfig, VllmEngine
from reid_dist.generation.messages import Request, Sampling
from reid_dist.generation.model_folder import find_model
from reid_dist.generation.tiny.questions import PARTS, attribute_question, ground_question, match_question
from reid_dist.methods.spec import ModelFacts
from reid_dist.methods.vlm.chat import Chat
from reid_dist.methods.vlm.export import save_merged
from reid_dist.models.mllm_folder import SMALL
from tests.worlds import small_tables

PICTURES = 6


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = methods.load_recipe("vlm/tiny", [f"data.root={tmp_path_factory.mktemp('served')}"])
    small_tables(Path(recipe.data.root), recipe)
    return open_view(recipe.data, recipe.data.train, ("train",))


def questions(view: Any) -> list[tuple[int, str, int]]:
    """(row, question, most tokens): everything that the small model can be asked, about six pictures."""
    asked = []
    for row in range(PICTURES):
        asked += [(row, attribute_question(name), 1) for name in ATTRIBUTES]
        asked += [(row, match_question(read_phrases(view.captions[other][0])), 1) for other in (row, row + 2)]
        asked += [(row, ground_question(part), 4) for part in PARTS]
    return [one for one in asked if one[1]]


def by_the_library(model: Any, view: Any, asked: list[tuple[int, str, int]]) -> list[str]:
    chat, found = Chat(SMALL, 0), []
    for row, question, most in asked:
        batch = chat.batch([question], ["yes"], view.images([row]))
        ids = batch["ids"][:, : len(chat.prompt(question)) + int(batch["grid"].prod()) // 4 - 1]
        made = model.base.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=batch["pixels"][0], do_sample=False,
            image_grid_thw=batch["grid"], mm_token_type_ids=(ids == chat.image_token).int(), max_new_tokens=most,
        )  # fmt: skip
        found.append(chat.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


def by_vllm(folder: str, view: Any, asked: list[tuple[int, str, int]]) -> list[str]:
    async def run() -> list[str]:
        # float32: in bfloat16, vLLM's choice, near-ties flip
        engine = VllmEngine(EngineConfig(path=folder, context=512, eager=True, dtype="float32"))
        await engine.start()
        try:
            images = view.encoded(list(range(PICTURES)))
            wanted = [Request(question, Sampling(most), images[row]) for row, question, most in asked]
            return [reply.text.strip() for reply in await asyncio.gather(*(engine.generate(one) for one in wanted))]
        finally:
            await engine.close()

    return asyncio.run(run())


def test_vllm_answers_from_the_merged_folder_as_the_library_with_the_adapter(view: Any, tmp_path: Path) -> None:
    recipe = methods.load_recipe("vlm/tiny")
    torch.manual_seed(0)
    model = methods.get("vlm").build(recipe.model, ModelFacts()).eval()
    with torch.no_grad():  # an adapter as large as one that was trained for long
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    asked = questions(view)
    assert len(asked) > 100
    with torch.no_grad():
        expected = by_the_library(model, view, asked)
        with model.peft.disable_adapter():
            base = by_the_library(model, view, asked[:60])
    assert base != expected[:60], "the adapter changes answers"
    save_merged(model, SMALL, tmp_path / "merged", {"base_digest": find_model("small").digest})
    served = by_vllm(find_model(str(tmp_path / "merged")).path, view, asked)
    differing = [(a, b, q) for a, b, (_, q, _) in zip(served, expected, asked, strict=True) if a != b]
    assert len(differing) <= len(asked) // 100, differing[:5]  # near-ties alone
