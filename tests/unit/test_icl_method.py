"""ICL as a method: batches, parameter groups, optimiser, refusals, importers, recipes, figures."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reid_dist import methods
from reid_dist.config import DataConfig, OptimConfig, ScheduleConfig
from reid_dist.data.captions import CaptionGroups, caption_digest, write_caption_groups
from reid_dist.data.samplers import rank_slice
from reid_dist.errors import UserError
from reid_dist.methods.icl import METHOD
from reid_dist.methods.icl.config import Config
from reid_dist.methods.icl.figures import marked, selected_tokens
from reid_dist.methods.icl.method import IclStage, group_parameters
from reid_dist.methods.icl.model import DualEncoder
from reid_dist.methods.icl.noise import checked, draw_permutation, store_permutation
from reid_dist.methods.icl.weights import import_weights, our_parameter, start
from reid_dist.methods.spec import EvalSide, ParamGroup, PlanPart, TrainingData
from reid_dist.models.clip_weights import our_name
from reid_dist.reporting.sections import section_of
from reid_dist.training.context import RunContext
from reid_dist.training.optim import build_optimizer
from reid_dist.training.precision import cast_pure
from reid_dist.training.schedule import lr_at
from tests.golden import cases, load
from tests.unit.icl_names import FakeView, model_of, recipe, state_of

PAIRS = 20
KINDS = ("weight", "bias")


def stage_of(root: str = "data", view: FakeView | None = None, **model: Any) -> IclStage:
    data = TrainingData(train=view or FakeView(), val=None)  # type: ignore[arg-type]
    (stage,) = METHOD.stages(recipe(root, **model), data)
    assert isinstance(stage, IclStage)
    return stage


def part_of(stage: IclStage, step: int, rows: slice = slice(None), epoch: int = 0) -> PlanPart:
    items, first = stage.plan().batch(epoch, step)
    return PlanPart(items=items[rows], positions=(np.arange(len(items)) + first)[rows], epoch=epoch, seed=1)


@pytest.fixture
def root(tmp_path: Path) -> str:
    view = FakeView()
    rows = [
        CaptionGroups(digest, caption_digest(text), ((f"hat {row}",), (f"bags {n}", f"sacks {n}")))
        for row, digest in enumerate(view.digests(np.arange(len(view))))
        for n, text in enumerate(view.captions[row])
    ]
    write_caption_groups(str(tmp_path), "g", rows, "test")
    store_permutation(str(tmp_path), "half", checked(draw_permutation(PAIRS, 0.5, 3), PAIRS, "half"))
    return str(tmp_path)


def test_batches_and_what_noise_moves(root: str) -> None:
    plain = stage_of(root, corruption=0.0)
    assert [len(plain.plan().batch(0, step)[0]) for step in range(4)] == [6, 6, 6, 2]
    noisy = stage_of(root, corruption=0.0, noise="half", groups=("g",))
    assert noisy.noise is not None
    part = part_of(noisy, 0)
    batch, before = noisy.load(part), plain.load(part)
    assert set(batch) == {"image", "ids", "second_ids", "pid"}
    assert set(before) == {"image", "ids", "pid"}
    torch.testing.assert_close(batch["image"], before["image"])  # image and identity stay
    assert batch["pid"].tolist() == before["pid"].tolist()
    for place, pair in enumerate(part.items.tolist()):
        row, number = noisy.pairs[noisy.noise.index[pair]]
        words = noisy.tokenizer.encode(noisy.view.captions[row][number], 24)
        assert batch["ids"][place].tolist() == words.tolist()
        options = [f"{a} {b}" for a, b in ((f"hat {row}", f"{word} {number}") for word in ("bags", "sacks"))]
        options += [f"{word} {number} hat {row}" for word in ("bags", "sacks")]  # the groups moved with the caption
        assert batch["second_ids"][place].tolist() in [noisy.tokenizer.encode(text, 24).tolist() for text in options]
    assert any(batch["ids"][i].tolist() != before["ids"][i].tolist() for i in range(6))


def test_a_batch_does_not_depend_on_who_loads_it(root: str) -> None:
    stage = stage_of(root, groups=("g",), corruption=0.5)
    whole = stage.load(part_of(stage, 1))
    for rank in range(4):
        own = stage.load(part_of(stage, 1, rank_slice(6, rank, 4)))
        for name, tensor in own.items():
            torch.testing.assert_close(tensor, whole[name][rank_slice(6, rank, 4)], rtol=0, atol=0)
    again = stage.load(part_of(stage, 1, epoch=1))
    assert not torch.equal(again["ids"], whole["ids"])
    empty = stage.load(part_of(stage, 1, slice(0, 0)))
    assert {name: len(tensor) for name, tensor in empty.items()} == dict.fromkeys(whole, 0)


def test_division_fills_every_pair_with_losses_of_whole_batches(root: str) -> None:
    """Each pair's loss is that of its batch of the pass, and a model that knows the pairs trusts the right ones."""
    stage, ctx = stage_of(root, noise="half", corruption=0.0), RunContext(seed=1)
    torch.manual_seed(0)
    model = DualEncoder(stage.config)
    losses = stage.division_losses(model, ctx)
    assert losses.shape == (PAIRS, 2)
    assert losses.isfinite().all()
    assert (losses == stage.division_losses(model, ctx)).all()
    ctx.epoch = 1
    assert (losses != stage.division_losses(model, ctx)).any()  # another order, other augmentation
    ctx.epoch = 0
    stage.begin_stage(model, ctx)
    stage.begin_epoch(model, ctx)
    (note,) = ctx.take_notes()
    assert note["kind"] == "division"
    assert note["number"] == 1
    assert note["clean"] == pytest.approx(stage.trust.float().mean().item())
    assert {"precision", "recall"} < set(note)
    json.dumps(note)
    late = stage_of(root, consensus_from=3)
    late.begin_epoch(model, ctx)
    off = stage_of(root, consensus=False)
    off.begin_epoch(model, ctx)
    assert ctx.take_notes() == []
    assert late.trust.all()
    assert off.trust.all()


def test_captions_that_lose_all_words_are_untrusted_not_nan(root: str) -> None:
    stage, ctx = stage_of(root, corruption=0.0), RunContext(seed=1)
    model = DualEncoder(stage.config)
    original = stage._words

    def emptied(texts: Any, part: PlanPart, rows: np.ndarray, stream: str) -> Tensor:
        ids = original(texts, part, rows, stream)
        for place, item in enumerate(part.items.tolist()):
            if item == 0:
                ids[place] = torch.tensor([stage.tokenizer.start_id, stage.tokenizer.end_id] + [0] * 22)
        return ids

    stage._words = emptied  # type: ignore[method-assign]
    losses = stage.division_losses(model, ctx)
    assert losses[0].isnan().all()
    assert losses[1:].isfinite().all()
    stage.begin_epoch(model, ctx)
    assert stage.trust.shape == (PAIRS,)


# ---- optimisation


@cases("icl", "param_groups")
def test_parameter_groups(case: Path) -> None:
    c = load(case)
    ours = [our_parameter(name) for name in json.loads(c["in_names"])]
    known = [(place, name) for place, name in enumerate(ours) if name is not None]
    assert len(known) >= len(ours) - 6  # the rest never trains: a spare linear layer and two norms
    optim = OptimConfig(lr=c["const_lr"], weight_decay=float(c["out_weight_decay"].max()))
    groups = group_parameters([(name, True) for _, name in known], optim, Config(), c["const_text_length"])
    found = {name: (group.lr, group.weight_decay) for group in groups for name in group.names}
    for place, name in known:
        assert found[name] == pytest.approx((c["out_lr"][place], c["out_weight_decay"][place])), name
    shipped = methods.load_recipe("icl/rde_cuhk_pedes")
    assert (shipped.optim.eps, shipped.optim.betas) == (c["out_eps"], tuple(c["out_betas"].tolist()))
    assert (shipped.optim.lr, shipped.optim.weight_decay) == (optim.lr, optim.weight_decay)
    assert not shipped.optim.decoupled


def test_every_parameter_of_the_model_is_in_a_group() -> None:
    stage = stage_of()
    model = DualEncoder(stage.config)
    named = [name for group in stage.param_groups(model) for name in group.names]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())


@cases("icl", "lr_schedule")
def test_learning_rates(case: Path) -> None:
    c = load(case)
    config = ScheduleConfig(
        mode=c["const_mode"], warmup=c["const_warmup_epochs"], warmup_factor=c["const_warmup_factor"],
        warmup_method=c["const_warmup_method"], target_lr=c["const_target_lr"], power=c["const_power"],
        milestones=tuple(c["const_milestones"].tolist()), gamma=c["const_gamma"],
    )  # fmt: skip
    total = c["const_total_epochs"]
    ours = [[lr_at(base, t, total, config) for base in c["in_base_lr"].tolist()] for t in range(total)]
    np.testing.assert_allclose(ours, c["out_lr"], rtol=1e-12, atol=1e-20)


class OneParameter(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)


@cases("icl", "adam_coupled_l2")
def test_adam(case: Path) -> None:
    c = load(case)
    model = OneParameter(torch.as_tensor(c["in_w"]))
    optim = OptimConfig(lr=c["const_lr"], betas=(c["const_beta1"], c["const_beta2"]), eps=c["const_eps"])
    optimizer = build_optimizer(model, [ParamGroup(("value",), c["const_lr"], c["const_weight_decay"])], optim)
    for gradient, expected in zip(c["in_grads"], c["out_w"], strict=True):
        model.value.grad = torch.as_tensor(gradient)
        optimizer.step()
        torch.testing.assert_close(model.value.detach(), torch.as_tensor(expected), rtol=1e-10, atol=1e-10)


def test_pure_float16_weights_of_ordinary_size_never_move() -> None:
    """The specification's T1: w = 0.05, g = 0.05, lr 1e-5; the spacing of float16 there is 3.1e-5."""
    moved = {}
    for kind in (torch.float16, torch.float32):
        model = OneParameter(torch.full((4,), 0.05, dtype=kind))
        optimizer = build_optimizer(model, [ParamGroup(("value",), 1e-5, 0.0)], OptimConfig(lr=1e-5, eps=1e-3))
        for _ in range(200):
            model.value.grad = torch.full((4,), 0.05, dtype=kind)
            optimizer.step()
        moved[kind] = float((model.value.detach().float() - 0.05).abs().max())
    assert moved[torch.float16] < 2e-5  # rounding of 0.05 itself
    assert moved[torch.float32] > 1e-3


def test_what_pure_float16_casts() -> None:
    model = DualEncoder(recipe().model)
    cast_pure(model)
    half = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16}
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert half | wide == {name for name, _ in model.named_parameters()}
    assert all(
        ".ln" in n or ".norm." in n or ".embed.tokens" in n or "positions" in n or "class_token" in n for n in wide
    )
    assert not any(".ln" in n or ".norm." in n or "positions" in n or "tokens" in n for n in half)
    with torch.no_grad():
        ids = torch.zeros(2, 24, dtype=torch.int64)
        ids[:, :3] = torch.tensor([8190, 5, 8191])
        out = model.eval()(image=torch.randn(2, 3, 32, 16), ids=ids)
    assert {value.dtype for value in out.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in out.values())


# ---- refusals


def test_tables_that_cannot_train_are_refused(root: str) -> None:
    view = FakeView()
    view.captions = [()] * len(view)
    with pytest.raises(UserError, match="no captions"):
        stage_of(root, view)
    view = FakeView()
    view.captions[3] = ("  ",)
    with pytest.raises(UserError, match=r"3.jpg: caption 0 is empty"):
        stage_of(root, view)
    with pytest.raises(UserError, match="permutes 20 captions, the training tables have 23"):
        stage_of(root, FakeView(rows=15), noise="half")
    with pytest.raises(UserError, match="no side table 'nothing'"):
        stage_of(root, groups=("nothing",))
    with pytest.raises(UserError, match="tracklet"):
        METHOD.eval_batch(Config(), None, EvalSide("tracklet", np.array([0]), np.array([0])), np.array([0]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0.0}, {"select_ratio": 0.0}, {"select_width": 3}, {"corruption": 1.0}, {"consensus_from": 0}],
)
def test_values_without_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


# ---- published weights


@cases("icl", "train_step", "dual_embedding")
def test_released_checkpoint_is_imported_whole(case: Path, caplog: pytest.LogCaptureFixture) -> None:
    c = load(case)
    with caplog.at_level(logging.INFO):
        model = model_of(c)
    assert "100.00 %" in caplog.text
    assert "visul_emb_layer.linear.weight" in caplog.text  # unused in the file, and said so
    state = state_of(c)
    prefixed = import_weights(model, {f"module.{name}": tensor for name, tensor in state.items()})
    assert set(prefixed) == set(model.state_dict())
    with pytest.raises(UserError, match="do not fit"):
        import_weights(model, {name: t for name, t in state.items() if "resblocks" not in name})
    with pytest.raises(UserError, match="do not fit"):  # keys of something else: nothing is loaded in silence
        import_weights(model, {f"model.{name}": tensor for name, tensor in state.items()})
    with pytest.raises(UserError, match="choose the image size, text length"):
        import_weights(model, state | {"base_model.positional_embedding": torch.zeros(30, 16)})


def openai_names(model: DualEncoder) -> dict[str, Tensor]:
    """The towers under OpenAI's names, found by asking `our_name` for every name that such a file may have."""
    state = model.towers.state_dict()
    block = [f"{part}.{kind}" for part in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj") for kind in KINDS]
    block += ["attn.in_proj_weight", "attn.in_proj_bias"]
    theirs = [f"{t}transformer.resblocks.{i}.{name}" for t in ("visual.", "") for i in range(3) for name in block]
    theirs += ["visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight", "visual.proj"]
    theirs += [f"{norm}.{kind}" for norm in ("visual.ln_pre", "visual.ln_post", "ln_final") for kind in KINDS]
    theirs += ["token_embedding.weight", "positional_embedding", "text_projection"]
    found = {name: state[ours] for name in theirs if (ours := our_name(name)) in state}
    assert len(found) == len(state)
    return found


@pytest.mark.parametrize("prefix", ["", "base_model.", "module.base_model."])
def test_towers_pretrained_for_reid(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(1)
    config = Config(arch="tiny", weights="", image_size=(32, 16), text_length=24, select_width=32)
    source = DualEncoder(config)
    path = tmp_path / "reid.pth"
    torch.save({"model": {prefix + name: tensor for name, tensor in openai_names(source).items()}}, path)
    target = DualEncoder(config)
    start(target, dataclasses.replace(config, pretrained=str(path)))
    for name, tensor in source.towers.state_dict().items():
        torch.testing.assert_close(target.towers.state_dict()[name], tensor)
    longer = dataclasses.replace(config, text_length=40, pretrained=str(path))
    stretched = DualEncoder(longer)
    start(stretched, longer)
    table = stretched.towers.text.embed.positions
    torch.testing.assert_close(table[0], source.towers.text.embed.positions[0])  # linear along the positions
    kept = DualEncoder(longer)
    before = kept.towers.text.embed.positions.detach().clone()
    start(kept, dataclasses.replace(longer, text_positions="random"))
    torch.testing.assert_close(kept.towers.text.embed.positions.detach(), before)
    torch.save({"other." + name: tensor for name, tensor in openai_names(source).items()}, path)
    with pytest.raises(UserError, match="do not fit"):
        start(target, dataclasses.replace(config, pretrained=str(path)))


def test_text_positions_of_another_length(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = Config(arch="tiny", weights="", image_size=(32, 16), text_length=77, select_width=32)
    source, path = DualEncoder(dataclasses.replace(config, image_size=(32, 32))), tmp_path / "clip.pth"  # a square grid
    torch.save(openai_names(source), path)
    given = source.towers.text.embed.positions.detach()
    place = ((torch.arange(168) + 0.5) * 77 / 168 - 0.5).clamp(0, 76)
    low, share = place.floor().long(), (place - place.floor())[:, None]
    between = (1 - share) * given[low] + share * given[(low + 1).clamp(max=76)]
    for how in ("interpolate", "random"):
        longer = dataclasses.replace(config, text_length=168, weights=str(path), text_positions=how)
        model = DualEncoder(longer)
        start(model, longer)
        table = model.towers.text.embed.positions.detach()
        assert table.shape == (168, 128)
        assert torch.allclose(table, between, atol=1e-6) is (how == "interpolate")
        assert how == "interpolate" or abs(float(table.std()) - 0.01) < 5e-4


# ---- evaluation, figures


def test_both_embeddings_come_from_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, calls = stage_of(), []
    model = DualEncoder(stage.config).eval()
    forward = type(model.towers.image).forward
    monkeypatch.setattr(
        type(model.towers.image), "forward", lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1]
    )
    side = EvalSide("image", np.arange(13), np.zeros(13, dtype=np.int64))
    with torch.no_grad():
        out = METHOD.encode(model, METHOD.eval_batch(stage.config, stage.view, side, np.array([4, 2])))
    assert set(out) == set(METHOD.similarity) == {"global", "selected"}
    assert out["global"].shape == (2, 128)
    assert out["selected"].shape == (2, 32)
    assert len(calls) == 1


def test_selected_tokens_are_drawn() -> None:
    stage = stage_of()
    settings = dataclasses.replace(recipe(), data=DataConfig())
    sides = {
        "image": EvalSide("image", np.arange(13), np.zeros(13, dtype=np.int64)),
        "text": EvalSide("text", stage.pairs[:, 0], stage.pairs[:, 1]),
    }
    figure = selected_tokens(DualEncoder(stage.config).eval(), settings, stage.view, sides)
    assert figure is not None
    assert len(figure["data"]) == 6
    first = figure["data"][0]
    assert "".join(text for text, _ in first["label"]) == stage.view.captions[0][0]
    marks = sum(mark for _, mark in first["label"])
    assert 1 <= marks <= int(0.3 * 22)
    html = str(section_of(figure).content[0])
    assert html.count("<img") == 2 * 6
    assert html.count("<mark>") == sum(mark for strip in figure["data"] for _, mark in strip["label"])
    assert selected_tokens(DualEncoder(stage.config), settings, stage.view, {"image": sides["image"]}) is None
    words = stage.tokenizer.encode("a man's full-sleeved hat, red.", 16).tolist()
    hat = words.index(stage.tokenizer.bpe("hat")[0])
    assert marked(words, {2, hat}, stage.tokenizer) == [
        ("a ", False), ("man", True), ("'s full-sleeved ", False), ("hat", True), (", red.", False),
    ]  # fmt: skip
    assert marked(words, set(), stage.tokenizer) == [("a man's full-sleeved hat, red.", False)]
