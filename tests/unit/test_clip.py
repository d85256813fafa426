"""CLIP towers: golden vectors, open_clip's own forward, attention weights, checkpointing, weight files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from reid_dist.errors import UserError
from reid_dist.models.clip import (
    ClipArchitecture,
    ClipTowers,
    ImageTower,
    TextTower,
    architecture,
    end_of_text,
    resize_position_table,
    resize_text_positions,
    take_token,
)
from reid_dist.models.clip_weights import fit, load_clip, our_name
from reid_dist.models.published import read_published
from tests.golden import cases, load
from tests.unit.comoe_names import fill, ours, tensors

SMALL = ClipArchitecture(
    image_size=(24, 16), patch=8, stride=8, image_width=16, image_layers=2, image_heads=2,
    text_width=16, text_layers=2, text_heads=2, vocab_size=30, context_length=10, joint_width=12,
)  # fmt: skip


def sizes(c: dict, tower: str) -> dict:
    """Tower sizes that a case's weights imply."""
    layers = len([k for k in c if k.endswith("ln1_weight") and k.startswith("w_")])
    if tower == "image":
        width, joint = c["w_visual_proj"].shape
        return {
            "image_size": tuple(c["in_image"].shape[2:]), "patch": c["const_patch"], "stride": c["const_stride"],
            "image_width": width, "joint_width": joint, "image_layers": layers, "image_heads": c["const_num_heads"],
        }  # fmt: skip
    width, joint = c["w_text_proj"].shape
    return {
        "vocab_size": len(c["w_text_token"]), "context_length": len(c["w_text_pos"]), "text_width": width,
        "joint_width": joint, "text_layers": layers, "text_heads": c["const_num_heads"],
    }  # fmt: skip


def tower_names(name: str) -> str:
    return ours(name, "").split(".", 1)[1]


@cases("comoe", "vit")
def test_image_tower(case: Path) -> None:
    c = load(case)
    arch = ClipArchitecture(**sizes(c, "image"))
    tower = fill(ImageTower(arch), tensors(c, "w_", tower_names))
    assert list(arch.grid) == c["out_grid_hw"].tolist()
    out = tower(torch.as_tensor(c["in_image"])).projected
    torch.testing.assert_close(out, torch.as_tensor(c["out_tokens"]), rtol=5e-4, atol=5e-5)


@cases("comoe", "text_tower")
def test_text_tower(case: Path) -> None:
    c = load(case)
    tower = fill(TextTower(ClipArchitecture(**sizes(c, "text"))), tensors(c, "w_", tower_names))
    ids = torch.as_tensor(c["in_ids"])
    out = tower(ids).projected
    torch.testing.assert_close(out, torch.as_tensor(c["out_tokens"]), rtol=5e-4, atol=5e-5)
    assert end_of_text(ids).tolist() == c["out_eot_index"].tolist()
    global_feat = take_token(out, end_of_text(ids))
    torch.testing.assert_close(global_feat, torch.as_tensor(c["out_eot_feat"]), rtol=5e-4, atol=5e-5)


@cases("comoe", "pos_embed_resize")
def test_position_resize(case: Path) -> None:
    c = load(case)
    grid = tuple(c["const_out_hw"].tolist())
    resized = resize_position_table(torch.as_tensor(c["in_pos"]), grid)
    torch.testing.assert_close(resized, torch.as_tensor(c["out_pos"]), rtol=1e-5, atol=1e-6)


@cases("icl", "resize_text_posembed")
def test_text_position_resize(case: Path) -> None:
    c = load(case)
    resized = resize_text_positions(torch.as_tensor(c["in_posembed"]), c["const_length"])
    torch.testing.assert_close(resized, torch.as_tensor(c["out_posembed_intended"]), rtol=1e-5, atol=1e-6)


def test_a_table_that_is_not_square_is_refused() -> None:
    with pytest.raises(UserError, match="square"):
        resize_position_table(torch.zeros(7, 4), (3, 2))


@pytest.fixture(scope="module")
def towers() -> ClipTowers:
    torch.manual_seed(1)
    return ClipTowers(SMALL).eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 3, 24, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[28, 3, 4, 29, 0, 0, 0, 0, 0, 0], [28, 3, 29, 29, 0, 0, 0, 0, 0, 0], [28, *range(1, 9), 29]])


def test_same_features_as_open_clip() -> None:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=12, vocab_size=50, width=32, heads=4, layers=2)
    theirs = CLIP(24, vision, text, quick_gelu=True).eval()
    for parameter in theirs.parameters():  # biases start at zero, norms at one: an exchange would go unseen
        parameter.data += 0.05 * torch.randn_like(parameter)
    arch = ClipArchitecture(
        image_size=(32, 32), patch=8, stride=8, image_width=64, image_layers=2, image_heads=4, text_width=32,
        text_layers=2, text_heads=4, vocab_size=50, context_length=12, joint_width=24,
    )  # fmt: skip
    own = ClipTowers(arch).eval()
    own.load_state_dict(fit(own, theirs.state_dict()))
    image, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 48, (3, 12))
    ids[:, 7] = 49
    with torch.no_grad():
        torch.testing.assert_close(own.image(image).projected[:, 0], theirs.encode_image(image), rtol=1e-4, atol=1e-5)
        words = take_token(own.text(ids).projected, end_of_text(ids))
        torch.testing.assert_close(words, theirs.encode_text(ids), rtol=1e-4, atol=1e-5)


def test_every_openai_weight_of_the_full_model_has_its_place() -> None:
    import open_clip

    with torch.device("meta"):
        theirs = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None, device="meta").state_dict()
        own = ClipTowers(architecture("ViT-B-16")).state_dict()
    mapped = {our_name(name): tensor for name, tensor in theirs.items()}
    assert mapped.pop(None).numel() == 1  # the logit scale
    assert set(mapped) == set(own)
    differing = {name for name in own if own[name].shape != mapped[name].shape}
    assert differing == {"image.embed.positions"}  # 197 rows there, 193 here


def test_weights_are_fitted_to_another_geometry(tmp_path: Path) -> None:
    square = ClipArchitecture(**{**vars_of(SMALL), "image_size": (32, 32), "context_length": 7})
    source = {f"module.{theirs}": tensor for theirs, tensor in openai_names(ClipTowers(square)).items()}
    path = tmp_path / "clip.pt"
    torch.save({"state_dict": source, "epoch": 3}, path)
    target = ClipTowers(SMALL)
    load_clip(target, str(path))
    grid = resize_position_table(source["module.visual.positional_embedding"], (3, 2))
    torch.testing.assert_close(target.image.embed.positions.detach(), grid)
    assert target.text.embed.positions.shape == (10, 16)
    torch.testing.assert_close(target.text.project.weight.detach(), source["module.text_projection"])

    del source["module.visual.proj"]
    torch.save(source, path)
    with pytest.raises(UserError, match=r"image\.project\.weight"):
        load_clip(target, str(path))
    torch.save(torch.nn.Linear(2, 2), path)  # a pickled object, not tensors
    with pytest.raises(UserError, match="not a file of plain tensors"):
        read_published(str(path))


def vars_of(arch: ClipArchitecture) -> dict:
    return {name: getattr(arch, name) for name in arch.__dataclass_fields__}


def openai_names(towers: ClipTowers) -> dict[str, Tensor]:
    """A state under OpenAI's names, found by asking `our_name` for every name such a file has."""
    block = ["ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"]
    names = [f"{b}.{kind}" for b in block for kind in ("weight", "bias")] + ["attn.in_proj_weight", "attn.in_proj_bias"]
    theirs = [f"{t}transformer.resblocks.{i}.{n}" for t in ("visual.", "") for i in range(2) for n in names]
    theirs += ["visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight", "visual.proj"]
    theirs += [f"visual.{ln}.{kind}" for ln in ("ln_pre", "ln_post") for kind in ("weight", "bias")]
    theirs += ["token_embedding.weight", "positional_embedding", "text_projection", "ln_final.weight", "ln_final.bias"]
    state = towers.state_dict()
    return {name: state[our_name(name)] for name in theirs}  # type: ignore[index]


def test_attention_weights_are_those_of_the_last_block(towers: ClipTowers, image: Tensor, ids: Tensor) -> None:
    with torch.no_grad():
        whole = towers.image(image, "map")
        assert whole.weights is not None
        assert whole.weights.shape == (3, 7, 7)
        torch.testing.assert_close(whole.weights.sum(-1), torch.ones(3, 7))
        torch.testing.assert_close(towers.image(image, "row").weights, whole.weights[:, 0])
        torch.testing.assert_close(towers.image(image).projected, whole.projected)
        words = towers.text(ids, "map").weights
        assert words is not None
        assert (words.triu(1) == 0).all()  # causal
        end = end_of_text(ids)
        torch.testing.assert_close(towers.text(ids, "row").weights, words[torch.arange(3), end])


def test_attention_weights_reproduce_the_fused_output(towers: ClipTowers) -> None:
    x = torch.randn(2, 5, 16)
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.rand(2, 1, 5, 5) > 0.7, float("-inf"))
    mask[..., 0] = 0
    attn = towers.image.blocks[0].attn
    single = type(attn)(16, 1)
    out, weights = single(x, mask=mask, weights="map")
    value = torch.nn.functional.linear(x, single.qkv_weight, single.qkv_bias)[..., 32:]
    torch.testing.assert_close(out, single.out(weights @ value))
    rows = single(x, mask=mask, weights=torch.tensor([4, 2]))[1]
    torch.testing.assert_close(rows, weights[torch.arange(2), torch.tensor([4, 2])])


def test_a_mask_cuts_tokens_off(towers: ClipTowers, image: Tensor) -> None:
    with torch.no_grad():
        embedded = towers.image.embed(image)
        extra = torch.randn(2, 16)
        part_tokens = towers.image.embed(image, extra)
        assert part_tokens.shape[1] == embedded.shape[1] + 2
        torch.testing.assert_close(part_tokens[:, 1], (extra[0] + towers.image.embed.positions[0]).expand(3, -1))
        mask = torch.zeros(1, 1, 9, 9)
        mask[..., 1:3] = float("-inf")  # nobody sees the extra tokens
        masked = towers.image.finish(part_tokens, mask=mask).projected
        plain = towers.image.finish(embedded).projected
        torch.testing.assert_close(masked[:, [0, *range(3, 9)]], plain, rtol=1e-4, atol=1e-5)


def test_embeddings_may_stand_in_for_ids(towers: ClipTowers, ids: Tensor) -> None:
    with torch.no_grad():
        embedded = towers.text.embed.tokens(ids)
        torch.testing.assert_close(towers.text(embedded).projected, towers.text(ids).projected)


def test_checkpointing_changes_memory_not_numbers(image: Tensor) -> None:
    torch.manual_seed(4)
    tower = ImageTower(SMALL)
    grads = []
    for on in (False, True):
        tower.blocks.activation_checkpointing = on
        tower.zero_grad()
        tower(image).projected.square().sum().backward()
        grads.append([p.grad.clone() for p in tower.parameters() if p.grad is not None])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_no_rows_pass_through(towers: ClipTowers) -> None:
    assert towers.image(torch.zeros(0, 3, 24, 16)).projected.shape == (0, 7, 12)
    assert towers.text(torch.zeros(0, 10, dtype=torch.int64)).projected.shape == (0, 10, 12)


def test_bf16_weights_keep_norms_in_float32(image: Tensor) -> None:
    torch.manual_seed(4)
    tower = ImageTower(SMALL)
    exact = tower(image).projected
    rounded = tower.to(torch.bfloat16)(image).projected
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)


def test_wrong_sizes_are_refused(towers: ClipTowers) -> None:
    with pytest.raises(UserError, match="tiny"):
        architecture("ViT-B16")
    with pytest.raises(UserError, match="no patch fits"):
        architecture("tiny", image_size=(4, 4))
    with pytest.raises(ValueError, match="patches"):
        towers.image(torch.zeros(1, 3, 32, 16))
    with pytest.raises(ValueError, match="position table of 10"):
        towers.text(torch.zeros(1, 9, dtype=torch.int64))
