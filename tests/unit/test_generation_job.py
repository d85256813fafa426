"""`jobs.generate` with a scripted model in place of the engines: side tables, plans, refusals; model and adapter folders."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import generate as job_module
from jobs._generation import ModelOptions, prepare
from jobs.generate import GenerateOptions, generate, main
from reid_dist.config import DataConfig
from reid_dist.data.captions import caption_pairs, open_caption_groups
from reid_dist.data.records import Record as TableRecord
from reid_dist.data.side import open_side_table
from reid_dist.data.store import open_view
from reid_dist.data.synthetic import World
from reid_dist.data.synthetic.parts import part_mask
from reid_dist.data.synthetic.shots import text_shots
from reid_dist.data.synthetic.words import read_phrases
from reid_dist.errors import UserError
from reid_dist.generation.ledger import Ledger
from reid_dist.generation.messages import Request
from reid_dist.generation.model_folder import adapter_digest, adapter_rank, find_model, tensor_shapes
from reid_dist.generation.stages import Answerer, InlineRunner, Job
from reid_dist.generation.supervise import Supervised
from reid_dist.generation.tiny.questions import attribute_answer, attribute_question, ground_answer, part_boxes
from reid_dist.generation.tiny.samples import GROUPS
from reid_dist.methods.muva.boxes import boxes_to_patches
from reid_dist.methods.muva.masks import open_masks
from reid_dist.storage import open_store
from tests.scripted import ScriptedEngine
from tests.tables import write_table

WORLD = World(seed=5, num_train=4, num_val=0, num_test=0, images_per_id=2)


class Truth:
    """The synthetic world's own answers, by the picture's bytes."""

    def __init__(self) -> None:
        self.samples = [(shot, *WORLD.sample(shot)) for shot in text_shots(WORLD)]
        self.by_image = {sample.image: (shot, drawing) for shot, sample, drawing in self.samples}

    def __call__(self, request: Request) -> str:
        shot, drawing = self.by_image[request.image]
        for name in ("head", "upper", "legs"):
            if request.text == f"where is {name} ?":
                areas = drawing.parts([part for group in GROUPS for part in group])
                starts = np.cumsum([0, *(len(group) for group in GROUPS)])[:-1]
                box = part_boxes(np.add.reduceat(areas, starts, axis=0))[name]
                return ground_answer(box) if box else "hidden"
        wear = shot.person.attributes
        from reid_dist.data.synthetic.identity import ATTRIBUTES

        name = next(name for name in ATTRIBUTES if attribute_question(name) == request.text)
        return attribute_answer(name, wear, drawing.visible())


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth()


@pytest.fixture
def root(tmp_path: Path, truth: Truth) -> str:
    records = [
        TableRecord(path=f"{n}.jpg", split="train", pid=shot.pid, camid=shot.camid, captions=sample.captions)
        for n, (shot, sample, _) in enumerate(truth.samples)
    ]
    write_table(str(tmp_path / "d"), "people", records, [s.image for _, s, _ in truth.samples], tmp_path / "raw")
    return str(tmp_path / "d")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, truth: Truth) -> list[Request]:
    asked: list[Request] = []

    def scripted(answering: Any, tables: Any, splits: Any, view: Any, connect: Any = None, take: bool = True) -> Job:
        ask = Supervised(lambda: ScriptedEngine(truth, asked), stall_s=10)
        runner = InlineRunner(Answerer(answering.speak, ask, lambda row: view.encoded([row])[0]))
        ledger = Ledger(open_store(answering.ledger))
        ledger = ledger.take() if take else ledger
        return Job(ledger, answering.maker, answering.speak, runner, runner, answering.options.retry_errors, 4)

    monkeypatch.setattr(job_module, "make_job", scripted)
    monkeypatch.setattr("jobs._cluster.connect", lambda *a: contextlib.nullcontext())
    return asked


def test_describe_writes_answers_once(root: str, small: str, calls: list[Request]) -> None:
    record = generate("describe", ("people",), GenerateOptions(root=root, model=small))
    assert (record["images"], record["error_rows"], record["calls"]) == (8, 0, 8 * 14)
    table = open_side_table(root, "people-answers")
    view = open_view(DataConfig(root=root), ("people",))
    rows = table.lookup([(d,) for d in view.digests(np.arange(len(view)))], ["answers"])
    assert all(row is not None and len(row["answers"]) == 6 for row in rows)
    page = Path(record["report"]).read_text()
    assert page.count("<img") == 8
    assert "112" in page
    assert "Every answer was accepted." in page
    again = generate("describe", ("people",), GenerateOptions(root=root, model=small))
    assert again["calls"] == 0
    assert len(calls) == record["calls"]
    plan = generate("describe", ("people",), GenerateOptions(root=root, model=small), plan_only=True)["plan"]
    assert plan["stages"]["describe"] | {"rate": 0} == {
        "units": 8, "exact": True, "in_ledger": 8, "calls": 0, "prompt_tokens": 0, "completion_tokens": 0,
        "engine_hours": 0.0, "rate": 0, "rate_is": "measured",
    }  # fmt: skip
    other = GenerateOptions(root=root, model=small, seed=1)
    left = generate("describe", ("people",), other, plan_only=True)["plan"]["stages"]["describe"]
    assert (left["in_ledger"], left["calls"]) == (0, 8 * 14), "answers of another seed are other answers"


def test_groups_are_what_text_methods_read(root: str, small: str, calls: list[Request], truth: Truth) -> None:
    record = generate("rda", ("people",), GenerateOptions(root=root, model=small))
    view = open_view(DataConfig(root=root), ("people",))
    pairs = caption_pairs(view)
    table = open_caption_groups(DataConfig(root=root), ("people-groups",), view, pairs)
    assert (table.missing, record["error_rows"]) == (0, 0)
    assert record["captions"] == len({(int(row), view.captions[row][number]) for row, number in pairs})
    assert record["calls"] == 8 * 14, "with the small model everything after the description is a rule"
    for (row, number), groups in zip(pairs.tolist(), table.of(np.arange(len(pairs))), strict=True):
        shot, drawing = truth.by_image[view.encoded([row])[0]]
        stated = read_phrases(view.captions[row][number])
        enriched = {name: value for group in groups for name, value in read_phrases(group[0]).items()}
        assert stated.items() <= enriched.items(), "what the witness said stays"
        added = {name: value for name, value in enriched.items() if name not in stated}
        assert added.items() <= shot.person.attributes.items(), "what is added is true of the picture"
        assert set(added) <= drawing.visible()
        assert all(read_phrases(wording) == read_phrases(group[0]) for group in groups for wording in group)
    page = Path(record["report"]).read_text()
    assert all(
        heading in page
        for heading in ("Original captions", "Answers", "Merged captions", "Groups of the first caption")
    )
    again = generate("rda", ("people",), GenerateOptions(root=root, model=small))
    assert again["calls"] == 0


def test_boxes_become_masks_that_cover_the_exact_ones(
    root: str, small: str, calls: list[Request], truth: Truth
) -> None:
    record = generate("masks", ("people",), GenerateOptions(root=root, model=small))
    assert record["images"] == 8
    page = Path(record["report"]).read_text()
    assert page.count("<svg") == 2 * 8, "boxes and patches on every picture"
    assert page.count("<title>head</title>") > 2 * 8
    view = open_view(DataConfig(root=root), ("people",))
    masks = open_masks(DataConfig(root=root), ("people-masks",), view, (16, 8), ("head", "upper", "legs"))
    made = masks.visible(np.arange(len(view)))
    exact = np.stack([part_mask(truth.by_image[image][1]) for image in view.encoded(np.arange(len(view)))])
    overlap = (made & exact).sum(axis=(1, 2)) / (made | exact).sum(axis=(1, 2))
    bands = np.broadcast_to(open_masks(DataConfig(root=root), ("bands",), view, (16, 8), ("head", "upper", "legs"))
                            .visible(np.arange(1)), exact.shape)  # fmt: skip
    fixed = (bands & exact).sum(axis=(1, 2)) / (bands | exact).sum(axis=(1, 2))
    assert overlap.mean() > 0.5 > fixed.mean()
    assert overlap.mean() > fixed.mean() + 0.1


def test_replies_of_a_model_that_is_not_served_become_the_same_masks(root: str, truth: Truth, tmp_path: Path) -> None:
    """CogVLM's own format, three digits in thousandths, with one part that it did not find."""
    view = open_view(DataConfig(root=root), ("people",))
    lines, boxes = [], []
    for row, image in enumerate(view.encoded(np.arange(len(view)))):
        areas = [truth.by_image[image][1].parts(list(group)).sum(axis=0) for group in GROUPS]
        found = {part: box or (0.25, 0.25, 0.75, 0.75) for part, box in part_boxes(np.stack(areas)).items()}
        replies = {p: "[[" + ",".join(f"{round(1000 * v):03d}" for v in box) + "]]" for p, box in found.items()}
        replies["legs"] = replies["legs"] if row else "There are no legs."
        lines += [json.dumps({"path": view.path(row), "part": part, "reply": said}) for part, said in replies.items()]
        boxes.append({part: [box] for part, box in found.items() if row or part != "legs"})
    file = tmp_path / "replies.jsonl"
    file.write_text("\n".join(lines))
    record = main(["masks", "people", f"root={root}", f"replies={file}", "name=cog"])
    assert (record["images"], record["with_fallback"], record["replies_without_a_box"]) == (8, 1, 1)
    masks = open_masks(DataConfig(root=root), ("cog",), view, (16, 8), ("head", "upper", "legs"))
    expected = np.stack([boxes_to_patches(one, (16, 8)).visible for one in boxes])
    assert (masks.visible(np.arange(len(view))) == expected).mean() > 0.99, "thousandths move an edge patch at most"

    for bad, words in (
        ("{", "line 1: expected an object"),
        ('{"path": "x", "part": "head", "reply": 3}', "line 1: expected an object"),
        ('{"path": "x", "part": "head", "reply": ""}', "no image 'x'"),
        (lines[0] + "\n" + lines[0], "line 2: part 'head'"),
        (lines[0].replace("head", "hand"), "line 1: part 'hand'"),
    ):
        file.write_text(bad)
        with pytest.raises(UserError, match=words):
            main(["masks", "people", f"root={root}", f"replies={file}", "name=bad"])
    with pytest.raises(UserError, match="choose qwen2, pixels"):
        main(["masks", "people", f"root={root}", f"replies={file}", "name=bad", "boxes=yolo"])
    with pytest.raises(UserError, match="no such file"):
        main(["masks", "people", f"root={root}", "replies=nowhere.jsonl"])
    with pytest.raises(UserError, match="read for masks only"):
        main(["rda", "people", f"root={root}", f"replies={file}"])


def test_another_maker_needs_another_name(
    root: str, small: str, calls: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reid_dist.generation.tiny.dialogue import TinyDialogues

    generate("describe", ("people",), GenerateOptions(root=root, model=small))
    before = TinyDialogues.versions.fget
    monkeypatch.setattr(
        TinyDialogues, "versions", property(lambda self: {**before(self), "describe": "tiny-describe/v0"})
    )
    with pytest.raises(UserError, match=r"another maker.*tiny-describe/v2.*tiny-describe/v0.*choose another name"):
        generate("describe", ("people",), GenerateOptions(root=root, model=small))
    record = generate("describe", ("people",), GenerateOptions(root=root, model=small, name="second"))
    assert record["calls"] == 8 * 14


def test_plan_starts_nothing_and_counts(root: str, small: str) -> None:
    record = main(["rda", "people", f"root={root}", f"model={small}", "rate=10", "--plan"])
    stages = record["plan"]["stages"]
    assert stages["describe"]["calls"] == 8 * 14
    assert stages["describe"]["engine_hours"] == pytest.approx(8 * 14 / 10 / 3600)
    assert stages["merge"]["calls"] == 0, "a rule"
    assert record["plan"]["captions"] > 8
    words = ["rda", "people", f"root={root}", f"model={small}", "rate=10", "tensor_parallel=4", "engines=2", "--plan"]
    total = main(words)["plan"]["total"]
    assert (total["calls"], total["prompt_tokens"]) == (8 * 14, 8 * 14 * (5 + 8))
    assert total["gpu_hours"] == pytest.approx(4 * total["engine_hours"])
    assert total["hours"] == pytest.approx(total["engine_hours"] / 2)
    unknown = main(["masks", "people", f"root={root}", f"model={small}", "--plan"])["plan"]["stages"]["ground"]
    assert (unknown["calls"], unknown["engine_hours"]) == (24, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rda"], "expected rda, masks or describe"),
        (["sing", "people"], "expected rda, masks or describe"),
        (["rda", "nobody"], "no table"),
        (["rda", "people", "split=val"], "no pictures in split val"),
        (["rda", "people", "engines=0"], "engines=0"),
        (["rda", "people", "model=no/such/place"], "no such folder"),
        (["rda", "people", "modle=small"], "did you mean 'model'"),
        (["rda", "people", "prompts=loud"], "choose qwen2-vl"),
    ],
)
def test_what_a_user_can_mend_is_said(root: str, small: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([*words, f"root={root}", *([] if any("model=" in w for w in words) else [f"model={small}"])])


# ---- folders


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A folder that says it is the small model; nobody loads it here."""
    place = folder(tmp_path / "small")
    (place / "recipe.json").write_text("{}")
    return str(place)


def safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    header, start = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * start)


def folder(place: Path) -> Path:
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (place / "tokenizer.json").write_text("{}")
    safetensors(place / "model.safetensors", {"model.layers.0.self_attn.q_proj.weight": [8, 4]})
    return place


def test_a_model_is_named_by_its_content(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    first, second = find_model(str(one)), find_model(str(two))
    assert (first.digest, first.prompts) == (second.digest, "qwen2-vl")
    with pytest.raises(UserError, match="has other content on node"):
        find_model(str(two), expected="0" * 64)
    (two / "README.md").write_text("words")
    assert find_model(str(two)).digest == first.digest
    (two / "tokenizer.json").write_text('{"a": 1}')
    assert find_model(str(two)).digest != first.digest
    (two / "recipe.json").write_text("{}")
    small = prepare(ModelOptions(model=str(two)), ["people"])
    assert small.model.prompts == "tiny"
    assert (small.engine.pixels, prepare(ModelOptions(model=str(one)), ["people"]).engine.pixels) == (0, 50176)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer"),
        ("config.json", None, "no config.json"),
        ("config.json", "{", "not JSON"),
        ("config.json", '{"model_type": "llama"}', "'llama' is not served"),
        ("model.safetensors", None, "no weights"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused(
    tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    place = folder(tmp_path / "model")
    (place / file).unlink()
    if content is not None:
        (place / file).write_text(content)
    with pytest.raises(UserError, match=message):
        find_model(str(place))


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    model = find_model(str(folder(tmp_path / "model")))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(UserError, match=r"adapter_config.json and adapter_model.safetensors missing"):
        adapter_digest(str(adapter), model)
    (adapter / "adapter_config.json").write_text("{}")
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"

    def write(a: list[int], b: list[int], module: str = name) -> None:
        safetensors(adapter / "adapter_model.safetensors", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})

    write([2, 4], [8, 2])
    assert len(adapter_digest(str(adapter), model)) == 64
    for config, room in (('{"r": 2}', 8), ('{"r": 512}', 512)):
        (adapter / "adapter_config.json").write_text(config)
        assert adapter_rank(str(adapter)) == room
    for config, words in (('{"r": 600}', "rank 600; vLLM serves up to 512"), ("{}", "does not say its rank")):
        (adapter / "adapter_config.json").write_text(config)
        with pytest.raises(UserError, match=words):
            adapter_rank(str(adapter))
    for a, b in (([2, 5], [8, 2]), ([2, 4], [9, 2])):
        write(a, b)
        with pytest.raises(UserError, match="another base"):
            adapter_digest(str(adapter), model)
    write([2, 4], [8, 2], name.replace("layers.0", "layers.7"))
    with pytest.raises(UserError, match="has no place"):
        adapter_digest(str(adapter), model)
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="not a safetensors"):
        tensor_shapes(adapter / "adapter_model.safetensors")
