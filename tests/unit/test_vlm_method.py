"""Tuning of the multimodal model: tokens, the answer loss, what is learnt, and that adapter and merged folder agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from reid_dist import methods
from reid_dist.data.store import open_view
from reid_dist.errors import UserError
from reid_dist.generation.model_folder import ModelFolder, adapter_digest, find_model
from reid_dist.generation.pairs import localiser
from reid_dist.generation.tiny.model import MERGE, TOKENS
from reid_dist.methods.spec import ModelFacts, TrainingData
from reid_dist.methods.vlm.chat import NOTHING, Chat
from reid_dist.methods.vlm.config import Config
from reid_dist.methods.vlm.export import save_adapter, save_merged
from reid_dist.methods.vlm.method import METHOD, answers, judge, load_questions
from reid_dist.methods.vlm.questions import Line, questions_of, read_lines, write_lines
from reid_dist.models.mllm_folder import SMALL
from reid_dist.training import checkpoint
from reid_dist.training.context import RunContext
from tests.worlds import small_tables

RECIPE = "vlm/tiny"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vlm")


@pytest.fixture(scope="module")
def recipe(root: Path) -> Any:
    found = methods.load_recipe(RECIPE, [f"data.root={root}"])
    small_tables(root, found)
    return found


@pytest.fixture(scope="module")
def view(recipe: Any) -> Any:
    return open_view(recipe.data, recipe.data.train, ("train",))


@pytest.fixture(scope="module")
def batch(recipe: Any, view: Any) -> Any:
    """Eight questions whose answers are turned round, so that there is something to learn."""
    asked = questions_of(recipe.model, view, "train", 1)[:8]
    turned = {"yes": "no", "no": "yes"}
    chosen = [type(q)(q.row, q.question, turned[q.answer]) for q in asked]
    return load_questions(Chat(SMALL, 0), view, chosen)


@pytest.fixture(scope="module")
def tuned(recipe: Any, batch: Any) -> Any:
    """(model after thirty steps, losses)."""
    torch.manual_seed(0)
    model = METHOD.build(recipe.model, ModelFacts())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(30):
        out = answers(model, batch)
        loss = out["nll"].sum() / out["count"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


def test_a_row_is_the_engines_prompt_then_the_answer_and_its_end(view: Any) -> None:
    chat = Chat(SMALL, 0)
    row = chat.batch(["hat ?"], ["cap"], view.images([0]))
    tokens = chat.tokenizer.convert_ids_to_tokens(row["ids"][0].tolist())
    assert tokens[0] == "<|vision_start|>"
    assert tokens.count("<|image_pad|>") == int(row["grid"].prod()) // MERGE**2 == TOKENS
    text = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hat ?"}]}], tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    prompt = chat.tokenizer.encode(text)
    assert [t for t in row["ids"][0].tolist() if t != chat.image_token] == [
        *(t for t in prompt if t != chat.image_token), *chat.answer_ids("cap")
    ]  # fmt: skip
    learned = row["labels"][0][row["labels"][0] != NOTHING].tolist()
    assert chat.tokenizer.convert_ids_to_tokens(learned)[-1] == "<|im_end|>"
    assert learned[:-1] == chat.answer_ids("cap")


def test_rows_of_a_padded_batch_have_the_librarys_own_loss(recipe: Any, view: Any) -> None:
    chat = Chat(SMALL, 0)
    model = METHOD.build(recipe.model, ModelFacts()).eval()
    questions, said = ["hat ?", "does this person match red shirt, blue trousers ?"], ["cap", "no"]
    with torch.no_grad():
        out = answers(model, chat.batch(questions, said, view.images([0, 1])))
        for i in range(2):
            row = chat.batch(questions[i : i + 1], said[i : i + 1], view.images([i]))
            shifted = torch.cat([torch.tensor([[NOTHING]]), row["labels"][:, :-1]], dim=1)
            ids = torch.cat([row["ids"], row["labels"][:, -1:]], dim=1)
            labels = torch.cat([shifted, row["labels"][:, -1:]], dim=1)
            plain = model.base(
                input_ids=ids, labels=labels, pixel_values=row["pixels"][0], image_grid_thw=row["grid"],
                mm_token_type_ids=(ids == chat.image_token).int(),
            )  # fmt: skip
            assert out["nll"][i].item() / out["count"][i].item() == pytest.approx(plain.loss.item(), rel=1e-4)


def test_a_rank_without_rows_computes_the_same_modules(recipe: Any, view: Any) -> None:
    model = METHOD.build(recipe.model, ModelFacts())
    out = answers(model, load_questions(Chat(SMALL, 0), view, []))
    assert {name: tuple(value.shape) for name, value in out.items()} == {"nll": (0,), "count": (0,), "right": (0,)}
    out["nll"].sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_the_adapter_learns_what_the_base_does_not_know(tuned: Any, batch: Any) -> None:
    model, losses = tuned
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad(), model.peft.disable_adapter():
        before = answers(model, batch)
    assert (before["nll"].sum() / before["count"].sum()).item() == pytest.approx(losses[0], rel=1e-4)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name and "language_model" in name for name in trained)
    assert len(trained) == 4 * 7 * 2  # layers, maps of each, factors of each


def test_merged_folder_and_adapter_answer_alike(tuned: Any, batch: Any, recipe: Any, tmp_path: Path) -> None:
    model, _ = tuned
    facts = {"base_digest": find_model("small").digest}
    save_adapter(model, tmp_path / "adapter", "small", facts)
    with torch.no_grad():
        applied = answers(model, batch)
    saved = checkpoint.take(model, {"param": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}},
                            {}, checkpoint.Progress()).model  # fmt: skip
    assert set(saved) == {name for name, p in model.named_parameters() if p.requires_grad}, "no frozen weight"
    again = METHOD.build(recipe.model, ModelFacts()).eval()
    checkpoint.load_weights(again, saved)
    with torch.no_grad():
        assert torch.equal(answers(again, batch)["nll"], applied["nll"])
    save_merged(again, SMALL, tmp_path / "merged", facts)
    merged = find_model(str(tmp_path / "merged"))
    assert merged.prompts == "tiny"
    assert merged.digest != facts["base_digest"]
    fresh = METHOD.build(Config(base=merged.path, question="{text}", answers=("yes", "no"), pixels=0), ModelFacts())
    with torch.no_grad():
        alone = answers(fresh.eval(), batch)
    torch.testing.assert_close(alone["nll"], applied["nll"], atol=1e-4, rtol=1e-4)
    assert torch.equal(alone["right"], applied["right"])

    assert adapter_digest(str(tmp_path / "adapter"), find_model("small"))
    with pytest.raises(UserError, match="tuned on another base model"):
        adapter_digest(str(tmp_path / "adapter"), merged)
    (tmp_path / "adapter" / "tuning.json").unlink()
    assert adapter_digest(str(tmp_path / "adapter"), ModelFolder(merged.path, merged.digest, "tiny")), "shapes fit"


def test_another_base_than_the_recipe_says_is_refused(tmp_path: Path) -> None:
    shutil.copytree(SMALL, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text("{}")
    config = Config(base=str(tmp_path / "base"), base_digest=find_model("small").digest, question="{text}", pixels=0,
                    answers=("yes", "no"))  # fmt: skip
    with pytest.raises(UserError, match="other content"):
        METHOD.build(config, ModelFacts())


def test_files_of_questions(view: Any, tmp_path: Path) -> None:
    images = view.digests(np.arange(2))
    lines = [Line(images[1], 'a "bag" ?', "yes", "train"), Line(images[0], "b ?", "no", "val")]
    file = tmp_path / "pairs.jsonl"
    file.write_text(write_lines(lines))
    assert read_lines(file.read_text(), "x") == lines
    config = Config(base="small", pairs=str(file), answers=("yes", "no"), pixels=0)
    assert [(q.row, q.question, q.answer) for q in questions_of(config, view, "train", 1)] == [(1, 'a "bag" ?', "yes")]
    with pytest.raises(UserError, match="line 1"):
        read_lines("{}", "x")
    file.write_text(write_lines([Line("0" * 64, "a", "yes", "train")]))
    with pytest.raises(UserError, match="1 of 1 train questions are about pictures"):
        questions_of(config, view, "train", 1)
    file.write_text(write_lines([Line(images[0], "a", "perhaps", "train")]))
    with pytest.raises(UserError, match="'perhaps'"):
        questions_of(config, view, "train", 1)


def test_held_out_people_are_asked_about(recipe: Any, tuned: Any) -> None:
    val = open_view(recipe.data, recipe.data.train, ("val",))
    asked = judge(recipe, TrainingData(val, val))
    assert asked is not None
    found = asked(tuned[0], RunContext(seed=1))
    assert set(found) == {"accuracy", "accuracy_yes", "accuracy_no", "answer_nll"}
    assert found["accuracy"] == pytest.approx((found["accuracy_yes"] + found["accuracy_no"]) / 2, abs=1e-6)
    assert judge(recipe, TrainingData(val, None)) is None


def test_recipes_of_other_kinds_are_refused() -> None:
    with pytest.raises(UserError, match="ranks nothing"):
        METHOD.check(methods.load_recipe(RECIPE, ["training.select_on=test"]))  # type: ignore[misc]
    with pytest.raises(UserError, match="where the caption goes"):
        methods.load_recipe(RECIPE, ["model.question=who"])


def test_the_job_makes_hard_questions_once(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negatives are the pictures that the run ranks highest among other people's; the files are found again."""
    import jobs.finetune_vlm as job
    from reid_dist.training.loaded import fresh_model
    from reid_dist.training.worker import open_data

    searched = methods.load_recipe("comoe/tiny", [f"data.root={recipe.data.root}"])
    views = open_data(recipe)
    loaded = fresh_model(searched, methods.get("comoe").facts(views), None, "start")
    loaded = SimpleNamespace(**{**vars(loaded), "run": SimpleNamespace(uri="runs/x")})
    options, model = job.TuneOptions(captions=20), find_model("small")
    made_of = job.make_recipe(searched, options, model, ("yes", "no"), ["name=hard"])
    assert made_of.model.base_digest == model.digest
    counts = {"train": job._captions(views.train, 20), "val": job._captions(views.val, 20)}
    assert [len(value) for value in counts.values()] == [20, 16]
    asks = localiser("tiny")
    made = job.make_pairs(loaded, made_of, views, counts, options, model, asks)
    lines = read_lines(Path(made["pairs"]).read_text(), "pairs")
    assert (made["train"], made["val"]) == (40, 32)
    pid = dict(zip(views.train.digests(np.arange(len(views.train))), np.asarray(views.train.pid).tolist(), strict=True))
    own, wrong = lines[0:40:2], lines[1:40:2]
    assert all(
        (a.answer, b.answer) == ("yes", "no") and a.question == b.question for a, b in zip(own, wrong, strict=True)
    )
    assert all(pid[a.image] != pid[b.image] for a, b in zip(own, wrong, strict=True))
    exported = json.loads(Path(made["llama_factory"]).with_name("questions.json").read_text())
    assert [record["messages"][1]["content"] for record in exported] == [line.answer for line in lines[:40]]
    monkeypatch.setattr(job, "_hard", lambda *a: pytest.fail("made again"))
    assert job.make_pairs(loaded, made_of, views, counts, options, model, asks) == made
    with pytest.raises(UserError, match="give one of method vlm"):
        job.make_recipe(searched, job.TuneOptions(recipe="comoe/tiny"), model, ("yes", "no"), [])
