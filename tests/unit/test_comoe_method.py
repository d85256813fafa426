"""CoMoE as a method: batches, the law of N workers, refusals, released checkpoints, recipes."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reid_dist import methods
from reid_dist.config import DataConfig, Recipe, RecipeError, TrainingConfig, apply_overrides
from reid_dist.data.draws import row_seeds
from reid_dist.data.samplers import IdentityPlan, rank_slice
from reid_dist.errors import UserError
from reid_dist.methods.comoe.config import Config
from reid_dist.methods.comoe.method import METHOD, CoMoEStage, caption_pairs, comoe_losses
from reid_dist.methods.comoe.model import CoMoE
from reid_dist.methods.comoe.weights import import_weights
from reid_dist.methods.spec import EvalSide, PlanPart, TrainingData
from tests.unit.test_comoe_model import Ranks

ROWS = 12


class FakeView:
    """A table view: 12 images of 5 people, 0 to 3 captions each."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.label = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4])
        self.pid = 10 * self.label
        self.captions = [
            tuple(f"person {pid} with {j} bags and a red hat" for j in range((3, 1, 2, 0)[i % 4]))
            for i, pid in enumerate(self.pid)
        ]
        self._images = [rng.integers(0, 256, (int(rng.integers(40, 90)), 30, 3), dtype=np.uint8) for _ in range(ROWS)]

    def __len__(self) -> int:
        return ROWS

    def images(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self._images[row] for row in rows]


def recipe(**model: Any) -> Recipe:
    config = Config(**{"arch": "tiny", "weights": "", "head_blocks": 1, "head_heads": 4, "text_length": 24, **model})
    training = TrainingConfig(global_batch=7, epochs=2)
    return Recipe(name="t", method="comoe", model=config, data=DataConfig(train=("t",)), training=training)


def stage_of(**model: Any) -> CoMoEStage:
    (stage,) = METHOD.stages(recipe(**model), TrainingData(train=FakeView(), val=None))  # type: ignore[arg-type]
    assert isinstance(stage, CoMoEStage)
    return stage


def part(stage: CoMoEStage, step: int, rows: slice = slice(None), epoch: int = 0) -> PlanPart:
    items, first = stage.plan().batch(epoch, step)
    return PlanPart(items=items[rows], positions=(np.arange(len(items)) + first)[rows], epoch=epoch, seed=1)


def batch_of(stage: CoMoEStage, *args: Any) -> dict[str, Any]:
    wanted = part(stage, *args)
    batch = stage.load(wanted)
    batch["row_seed"] = torch.from_numpy(row_seeds(wanted.seed, wanted.epoch, wanted.positions, "model"))
    return batch


def model_of(stage: CoMoEStage) -> CoMoE:
    torch.manual_seed(5)
    model = METHOD.build(stage.config, METHOD.facts(TrainingData(train=stage.view, val=None)))
    assert isinstance(model, CoMoE)
    for name, parameter in model.named_parameters():  # the official start of the adapters is the identity
        if "up_weight" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_items_are_pairs_of_image_and_caption() -> None:
    view = FakeView()
    pairs = caption_pairs(view)  # type: ignore[arg-type]
    assert len(pairs) == sum(len(captions) for captions in view.captions) == 18
    assert {row for row, _ in pairs.tolist()} == {i for i in range(ROWS) if view.captions[i]}
    stage = stage_of()
    assert stage.plan().steps(0) == 3
    batch = batch_of(stage, 0)
    rows, numbers = stage.pairs[part(stage, 0).items].T
    assert batch["image"].shape == (7, 3, 64, 32)
    assert batch["pid"].tolist() == view.label[rows].tolist()
    words = [view.captions[row][number] for row, number in zip(rows, numbers, strict=True)]
    assert batch["ids"].tolist() == stage.tokenizer.encode_all(words, 24).tolist()


def test_a_batch_does_not_depend_on_who_loads_it() -> None:
    stage = stage_of(losses=("sdm", "itc", "mlm"), head="base")
    whole = batch_of(stage, 1)
    for rank in range(3):
        rows = rank_slice(7, rank, 3)
        own = batch_of(stage, 1, rows)
        for name, tensor in own.items():
            torch.testing.assert_close(tensor, whole[name][rows], rtol=0, atol=0)
    again = batch_of(stage, 1, slice(None), 1)
    assert not torch.equal(again["image"], whole["image"])


VARIANTS: list[dict[str, Any]] = [
    {},
    {"head": "unshared", "joint_balance_weight": 0.5},
    {"losses": ("sdm", "itc", "balance", "cmpm", "id", "mlm"), "mlm_depth": 1},
    {"head": "base", "losses": ("sdm", "itc")},
]


@pytest.mark.parametrize("world", [3, 9])  # uneven; and two ranks without rows
@pytest.mark.parametrize("variant", VARIANTS, ids=["released", "unshared", "all-losses", "base"])
def test_n_workers_compute_what_one_would(variant: dict[str, Any], world: int) -> None:
    stage = stage_of(**variant)
    model = model_of(stage).train()
    batch = batch_of(stage, 0)

    def forward(rows: slice) -> tuple[dict[str, Tensor], dict[str, Any]]:
        own = {name: tensor[rows] for name, tensor in batch.items()}
        return stage.forward(model, own, None), own  # type: ignore[arg-type]

    out, own = forward(slice(None))
    single = stage.losses(model, out, own, Ranks(7))  # type: ignore[arg-type]
    sum(single.values()).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert set(expected) == {n for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    passes = [forward(rank_slice(7, rank, world)) for rank in range(world)]
    every = {name: torch.cat([o[name] for o, _ in passes]) for name in passes[0][0]}
    terms = []
    for rank, (rank_out, rank_batch) in enumerate(passes):
        gathered = {id(tensor): every[name] for name, tensor in rank_out.items()} | {
            id(rank_batch["pid"]): batch["pid"]
        }
        ctx = CountingRanks(7, rank, world, gathered)
        ctx.asked = every["masked_count"].sum() if "masked_count" in every else None
        terms.append(comoe_losses(stage.config, rank_out, rank_batch["pid"], ctx))  # type: ignore[arg-type]
    for name, value in single.items():
        torch.testing.assert_close(sum(t[name] for t in terms) / world, value, rtol=1e-5, atol=1e-6)
    (sum(sum(t.values()) for t in terms) / world).backward()  # type: ignore[union-attr]
    assert len(expected) == len([n for group in stage.param_groups(model) for n in group.names])
    for name, parameter in model.named_parameters():
        if name not in expected:
            continue
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, float(expected[name].abs().max()))}
        torch.testing.assert_close(parameter.grad, expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


class CountingRanks(Ranks):
    """Also sums the number of masked words, the only value that CoMoE reduces."""

    asked: Tensor | None = None

    def reduce(self, value: Tensor) -> Tensor:
        assert self.asked is not None
        return self.asked.detach()


def test_outputs_of_rows_do_not_depend_on_their_batch() -> None:
    """What micro-batches rely on, dropout included."""
    stage = stage_of(losses=("sdm", "itc", "balance", "mlm"), mlm_depth=1)
    model, batch = model_of(stage).train(), batch_of(stage, 0)
    with torch.no_grad():
        whole = stage.forward(model, batch, None)  # type: ignore[arg-type]
        piece = stage.forward(model, {n: t[2:5] for n, t in batch.items()}, None)  # type: ignore[arg-type]
    assert set(piece) == set(whole)
    for name, tensor in piece.items():
        torch.testing.assert_close(tensor, whole[name][2:5], rtol=1e-4, atol=1e-5)
    assert model.heads["shared"].blocks[0].moe.experts.drop_out.active


def test_identity_sampler() -> None:
    changed = dataclasses.replace(recipe(sampler="identity", instances=2), training=TrainingConfig(global_batch=4))
    (stage,) = METHOD.stages(changed, TrainingData(train=FakeView(), val=None))  # type: ignore[arg-type]
    assert isinstance(stage.plan(), IdentityPlan)
    pid = batch_of(stage, 0)["pid"].tolist()  # type: ignore[arg-type]
    assert pid[0] == pid[1] != pid[2] == pid[3]


def test_evaluation_encodes_either_side_under_one_name() -> None:
    stage, view = stage_of(), FakeView()
    model = model_of(stage).eval()
    images = EvalSide("image", np.arange(ROWS), np.zeros(ROWS, dtype=np.int64))
    pairs = caption_pairs(view)  # type: ignore[arg-type]
    texts = EvalSide("text", pairs[:, 0], pairs[:, 1])
    with torch.no_grad():
        gallery = METHOD.encode(model, METHOD.eval_batch(stage.config, view, images, np.array([3, 0])))  # type: ignore[arg-type]
        query = METHOD.encode(model, METHOD.eval_batch(stage.config, view, texts, np.array([5])))  # type: ignore[arg-type]
    assert set(gallery) == set(query) == set(METHOD.similarity)
    assert gallery["global"].shape == (2, 128)
    assert query["global"].shape == (1, 128)
    with pytest.raises(UserError, match="tracklet"):
        METHOD.eval_batch(stage.config, view, EvalSide("tracklet", pairs[:, 0], pairs[:, 1]), np.array([0]))  # type: ignore[arg-type]


def test_batch_axis_warns_and_refuses_what_it_cannot_compute(caplog: pytest.LogCaptureFixture) -> None:
    assert METHOD.check is not None
    alone = recipe(attention_axis="batch")
    with caplog.at_level(logging.WARNING):
        METHOD.check(alone)
    assert "attention_axis=batch" in caplog.text
    for wrong in ({"num_workers": 2}, {"micro_batches": 2}):
        with pytest.raises(UserError, match="attention_axis=batch"):
            METHOD.check(dataclasses.replace(alone, training=TrainingConfig(**wrong)))
    METHOD.check(dataclasses.replace(recipe(), training=TrainingConfig(num_workers=2, micro_batches=2)))


def test_a_table_without_captions_is_refused() -> None:
    view = FakeView()
    view.captions = [()] * ROWS
    with pytest.raises(UserError, match="no captions"):
        METHOD.stages(recipe(), TrainingData(train=view, val=None))  # type: ignore[arg-type]


def released(model: CoMoE) -> dict[str, Tensor]:
    """A state dict under the authors' names, written from the names the golden parameter lists record."""
    clip = {
        "image.embed.class_token": "visual.class_embedding", "image.embed.positions": "visual.positional_embedding",
        "image.embed.patches.weight": "visual.conv1.weight", "image.project.weight": "visual.proj",
        "text.embed.tokens.weight": "token_embedding.weight", "text.embed.positions": "positional_embedding",
        "text.project.weight": "text_projection", "text.ln_final": "ln_final", "image.ln_": "visual.ln_",
        "image.blocks.": "visual.transformer.resblocks.", "text.blocks.": "transformer.resblocks.",
    }  # fmt: skip
    block = {".ln1": ".ln_1", ".ln2": ".ln_2", ".ln3": ".ln_3", "qkv_": "in_proj_", "attn.out": "attn.out_proj",
             "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}  # fmt: skip
    head = {"heads.shared.blocks.": "STransformer.resblocks.", "aux_vector": "comb_param",
            "moe.router.mix": "feed_forward.alpha", "moe.router.gate_": "feed_forward.router_"}  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        theirs = name.replace("towers.", "base_model.")
        for table in (clip, block) if "towers." in name else (head, block):
            for ours, original in table.items():
                theirs = theirs.replace(ours, original)
        if "moe.experts" in theirs:
            stem, kind = theirs.rsplit("_", 1)
            for index, expert in enumerate(tensor):
                state[stem.replace("moe.experts.", f"feed_forward.experts.{index}.") + f".{kind}"] = expert
        else:
            state[theirs] = tensor[0] if name.endswith("mix") else tensor
    return state


def test_released_checkpoint_is_imported_whole(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    source, target = CoMoE(recipe().model), CoMoE(recipe().model)
    state = released(source) | {"loss_weight": torch.ones(3)}
    assert "STransformer.resblocks.0.feed_forward.experts.2.down.bias" in state  # a name that the goldens record
    assert "base_model.transformer.resblocks.0.attn.in_proj_bias" in state
    with caplog.at_level(logging.INFO):
        imported = import_weights(target, state)
    assert "100.00 %" in caplog.text
    assert "loss_weight" in caplog.text
    target.load_state_dict(imported, strict=True)
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], tensor)


def test_released_checkpoint_that_does_not_fit_is_refused() -> None:
    model = CoMoE(recipe().model)
    state = released(model)
    with pytest.raises(UserError, match=r"do not fit: .* % of our parameters"):
        import_weights(model, {name: tensor for name, tensor in state.items() if "token_embedding" not in name})
    with pytest.raises(UserError, match=r"towers.image.embed.positions have shape \(4, 128\)"):
        import_weights(model, state | {"base_model.visual.positional_embedding": torch.zeros(4, 128)})
    unclear = {name.replace("router_image", "w_one"): tensor for name, tensor in state.items()}
    imported = import_weights(model, unclear)  # a gate that cannot be told apart is left out, not guessed
    assert "heads.shared.blocks.0.moe.router.gate_image.weight" not in imported
    assert len(imported) == len(model.state_dict()) - 1


def test_registry_and_recipes() -> None:
    assert "comoe" in methods.names()
    assert methods.get("comoe").build is METHOD.build
    with pytest.raises(UserError, match="did you mean 'comoe'"):
        methods.get("comeo")
    with pytest.raises(RecipeError, match="did you mean 'comoe/synthetic'"):
        methods.load_recipe("comoe/syntetic")
    for name in methods.recipes("comoe"):
        loaded = methods.load_recipe(name)
        assert isinstance(loaded.model, Config)
        assert METHOD.check is not None
        METHOD.check(loaded)
    changed = methods.load_recipe("comoe/cuhk_pedes", ["model.experts=6", "optim.lr=1e-5"])
    assert (changed.model.experts, changed.optim.lr, changed.optim.eps) == (6, 1e-5, 1e-3)
    with pytest.raises(RecipeError, match="'experts'"):
        methods.load_recipe("comoe/cuhk_pedes", ["model.expert=6"])
    assert apply_overrides({}, ["a.b=1"]) == {"a": {"b": 1}}


def test_bf16_weights_give_float32_features_near_the_exact_ones() -> None:
    stage = stage_of(losses=("sdm", "itc", "balance", "id", "mlm"), mlm_depth=1)
    model, batch = model_of(stage).train(), batch_of(stage, 0)
    exact = stage.forward(model, batch, None)  # type: ignore[arg-type]
    rounded = stage.forward(model.to(torch.bfloat16), batch, None)  # type: ignore[arg-type]
    assert {name: tensor.dtype for name, tensor in rounded.items()} == dict.fromkeys(exact, torch.float32)
    cosine = torch.nn.functional.cosine_similarity(exact["image_feat"], rounded["image_feat"])
    assert cosine.min() > 0.99
    terms = stage.losses(model, rounded, batch, Ranks(7))  # type: ignore[arg-type]
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
