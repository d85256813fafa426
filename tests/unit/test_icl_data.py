"""Text pipeline, noise permutations and caption groups of ICL: golden vectors, side tables, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reid_dist.config import DataConfig
from reid_dist.data import layouts
from reid_dist.data.captions import (
    CaptionGroups,
    caption_digest,
    caption_pairs,
    open_caption_groups,
    write_caption_groups,
)
from reid_dist.data.layouts._captions import _groups
from reid_dist.data.samplers import IdentityPlan, compose_identity_batches, rank_slice
from reid_dist.data.side import write_side_table
from reid_dist.data.text import clip_tokenizer
from reid_dist.errors import UserError
from reid_dist.methods.icl import __main__ as command
from reid_dist.methods.icl.noise import checked, draw_permutation, open_permutation, parse, store_permutation
from reid_dist.methods.icl.text import corrupt_tokens, draw_corrupted, draw_reorganised, join_groups
from tests.golden import cases, load
from tests.unit.icl_names import FakeView
from tests.worlds import small_table


@cases("icl", "tokenize")
def test_tokenizer(case: Path) -> None:
    c = load(case)
    ids = clip_tokenizer().encode_all(json.loads(c["in_texts"]), c["const_text_length"])
    np.testing.assert_array_equal(ids, c["out_ids"])


@cases("icl", "text_token_augment")
def test_corruption(case: Path) -> None:
    c = load(case)
    chosen = c["in_random_choice_index"] + c["const_random_token_offset"]
    before = c["in_ids"].copy()
    result = corrupt_tokens(c["in_ids"], c["in_uniform"], chosen, c["const_mask_id"], c["const_p"])
    np.testing.assert_array_equal(result, c["out_ids"])
    np.testing.assert_array_equal(c["in_ids"], before)
    assert clip_tokenizer().mask_id == c["const_mask_id"] == c["const_random_token_count"] + 1


def test_corruption_rates() -> None:
    ids = np.concatenate([[49406], np.full(20000, 320), [49407, 0, 0]])
    result = draw_corrupted(ids, np.random.default_rng(5), 49405, 0.2)
    assert result[0] == 49406
    words = result[1 : list(result).index(49407)]
    assert abs(1 - len(words) / 20000 - 0.04) < 0.005
    assert abs((words == 49405).sum() / 20000 - 0.12) < 0.01
    assert abs(((words != 320) & (words != 49405)).sum() / 20000 - 0.04) < 0.005
    assert words.min() >= 1
    assert (draw_corrupted(ids, np.random.default_rng(5), 49405, 0.0) == ids).all()


@cases("icl", "reorganise_caption")
def test_reorganisation(case: Path) -> None:
    c = load(case)
    groups = _groups(json.loads(c["in_groups"]), case.stem)
    order, choice = (c[name].tolist() if name in c else [0] for name in ("in_permutation", "in_choice_index"))
    text = join_groups(groups, order, choice)
    assert text == json.loads(c["out_text"])
    np.testing.assert_array_equal(clip_tokenizer().encode(text, 77), c["out_ids"])


def test_drawn_reorganisations_use_every_group_once_and_every_wording() -> None:
    groups = (("a", "b"), ("c",), ("d", "e", "f"))
    texts = {draw_reorganised(groups, np.random.default_rng(seed)) for seed in range(300)}
    assert len(texts) == 6 * 6  # orders times wordings
    assert all(sum(word in group for word in text.split()) == 1 for text in texts for group in groups)


@cases("icl", "noise_injection")
def test_noise(case: Path) -> None:
    c = load(case)
    noise = checked(draw_permutation(c["const_n"], c["const_rate"], c["const_numpy_seed"]), c["const_n"], "golden")
    np.testing.assert_array_equal(noise.index, c["out_noise_index"])
    np.testing.assert_array_equal(~noise.moved, c["out_real_correspondence"].astype(bool))
    assert [f"cap{i}" for i in noise.index] == json.loads(c["out_captions"])


@cases("icl", "annotations")
def test_groups_of_the_authors_json(case: Path) -> None:
    c = load(case)
    layout = case.stem.partition("__")[2].replace("_", "-")
    found = layouts.caption_set(layout).grouped(json.loads(c["in_train_json"]), "golden")
    pairs = [pair for entry in found.values() for pair in entry]
    assert [text for text, _ in pairs] == json.loads(c["out_train_captions"])
    assert [[list(group) for group in groups] for _, groups in pairs] == json.loads(c["out_train_groups"])


@cases("icl", "identity_sampler")
def test_identity_batches(case: Path) -> None:
    """Groups and draws are read off the recorded result (its order of random calls is the original's own affair)."""
    c = load(case)
    batch, each = c["const_batch_size"], c["const_num_instances"]
    ranks = [c[f"out_rank{rank}"] for rank in range(c["const_world"])] if "const_world" in c else [c["out_indices"]]
    per_rank = batch // len(ranks)
    steps = len(ranks[0]) // per_rank
    whole = np.concatenate([part[step * per_rank : (step + 1) * per_rank] for step in range(steps) for part in ranks])
    people = c["in_pids"][whole].reshape(-1, each)
    assert (people == people[:, :1]).all()
    orders: dict[int, list[int]] = {}
    for pid, group in zip(people[:, 0].tolist(), whole.reshape(-1, each).tolist(), strict=True):
        orders.setdefault(pid, []).extend(group)
    composed = compose_identity_batches(orders, people[:, 0].reshape(-1, per_rank // each), each)
    for rank, expected in enumerate(ranks):
        own = [composed[s * batch : (s + 1) * batch][rank_slice(batch, rank, len(ranks))] for s in range(steps)]
        np.testing.assert_array_equal(np.concatenate(own), expected)
    if "out_len" in c:
        assert IdentityPlan(c["in_pids"], batch, each, seed=1).estimate() == c["out_len"]


# ---- permutations in storage


def test_permutations_are_stored_once_and_checked(tmp_path: Path) -> None:
    root, noise = str(tmp_path), checked(draw_permutation(40, 0.5, 1), 40, "n")
    assert store_permutation(root, "half", noise) == store_permutation(root, "half", noise) == "noise/half.npy"
    read = open_permutation(root, "half", 40)
    assert (read.index == noise.index).all()
    assert read.digest == noise.digest
    assert 0.4 < read.rate <= 0.5
    with pytest.raises(UserError, match="another permutation"):
        store_permutation(root, "half", checked(draw_permutation(40, 0.5, 2), 40, "n"))
    with pytest.raises(UserError, match="permutes 40 captions, the training tables have 41"):
        open_permutation(root, "half", 41)
    with pytest.raises(UserError, match="make-noise"):
        open_permutation(root, "other", 40)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([0, 1, 1]), "no permutation"),
        (np.array([0.0, 1.0]), "whole numbers"),
        (np.zeros((2, 2), int), "one row"),
    ],
)
def test_what_is_no_permutation_is_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked(values, None, "file")


def test_a_pickle_is_not_read_as_a_permutation() -> None:
    import io

    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"plain \.npy"):
        parse(stream.getvalue(), None, "x.npy")


# ---- caption groups in side tables


def rows_of(view: FakeView, leave_out: int = 0) -> list[CaptionGroups]:
    rows = [
        CaptionGroups(digest, caption_digest(text), ((f"image {row}", text), ("both",)))
        for row, digest in enumerate(view.digests(np.arange(len(view))))
        for text in view.captions[row]
    ]
    return rows[leave_out:]


def test_groups_are_found_by_image_and_caption(tmp_path: Path) -> None:
    view, root = FakeView(rows=40), str(tmp_path)
    pairs = caption_pairs(view)  # type: ignore[arg-type]
    write_caption_groups(root, "g", rows_of(view, leave_out=2), "test")
    table = open_caption_groups(DataConfig(root=root), ("g",), view, pairs)  # type: ignore[arg-type]
    assert table.missing == 2
    wanted = np.array([7, 0, 7, 55])
    found = table.of(wanted)
    for pair, groups in zip(wanted.tolist(), found, strict=True):
        row, number = pairs[pair]
        text = view.captions[row][number]
        assert groups == (((text,),) if pair < 2 else ((f"image {row}", text), ("both",)))
    assert table.of(wanted[:0]) == []
    write_caption_groups(root, "h", rows_of(view)[:2], "test")
    both = open_caption_groups(DataConfig(root=root), ("g", "h"), view, pairs)  # type: ignore[arg-type]
    assert both.missing == 0
    assert both.content != table.content
    assert both.of(np.array([0, 5]))[0] == (("image 0", view.captions[0][0]), ("both",))


def test_groups_of_another_version_are_refused(tmp_path: Path) -> None:
    view, root = FakeView(rows=40), str(tmp_path)
    pairs = caption_pairs(view)  # type: ignore[arg-type]
    write_caption_groups(root, "g", rows_of(view), "test")
    view.captions = [
        tuple(text + "." for text in texts) for texts in view.captions
    ]  # a caption table of another version
    with pytest.raises(UserError, match=r"60 of 60 captions have no groups in g.*another version"):
        open_caption_groups(DataConfig(root=root), ("g",), view, pairs)  # type: ignore[arg-type]
    import pyarrow as pa

    write_side_table(root, "masks", pa.table({"digest": ["a"]}), ["digest"], {"kind": "part masks"})
    with pytest.raises(UserError, match="holds no caption groups"):
        open_caption_groups(DataConfig(root=root), ("masks",), view, pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no caption groups to write"),
        ([CaptionGroups("a", "b", ())], "is empty"),
        ([CaptionGroups("a", "b", (("x", " "),))], "is empty"),
        ([CaptionGroups("a", "b", (("x",),)), CaptionGroups("a", "b", (("y",),))], "two different groups"),
    ],
)
def test_wrong_groups_are_not_written(tmp_path: Path, rows: list[CaptionGroups], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_caption_groups(str(tmp_path), "g", rows, "test")


# ---- the command


def test_command_makes_noise_and_converts_groups(tmp_path: Path) -> None:
    root, name = str(tmp_path), "synthetic-cuhk-pedes"
    small_table(tmp_path, name, diversity=True, num_train=4, num_test=3, num_val=3)
    made = command.main(["make-noise", f"root={root}", "name=half", f"table={name}", "rate=0.5", "seed=9"])
    assert made["pairs"] == 4 * 2 * 2
    assert open_permutation(root, "half", 16).digest.hex() == made["sha256"]
    file = tmp_path / f"raw-{name}" / "reid_raw.json"
    words = [str(file), f"root={root}", "layout=cuhk-pedes", f"table={name}", "name=g"]
    people = 4 + 3 + 3  # the file has groups of all splits, each person two images of two captions
    assert command.main(["import-groups", *words])["captions"] == people * 2 * 2
    from reid_dist.data.store import open_view

    view = open_view(DataConfig(root=root), (name,), ("train",))
    table = open_caption_groups(DataConfig(root=root), ("g",), view, caption_pairs(view))
    assert table.missing == 0
    entries = {f"imgs/{e['file_path']}": e for e in json.loads(file.read_text("utf-8"))}
    for pair, (row, number) in enumerate(caption_pairs(view).tolist()):
        expected = entries[view.path(row)]["diversity_captions"][number]
        assert [list(group) for group in table.of(np.array([pair]))[0]] == expected
    other: list[Any] = json.loads(file.read_text("utf-8"))
    next(entry for entry in other if "diversity_captions" in entry)["captions"][0] += " again"
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=f"1 of {people * 2} entries fit no image and caption"):
        command.main(["import-groups", str(tmp_path / "other.json"), *words[1:]])


def test_command_imports_a_published_index_and_refuses_wrong_words(tmp_path: Path) -> None:
    np.save(tmp_path / "published.npy", draw_permutation(30, 0.2, 1))
    record = command.main(["import-noise", str(tmp_path / "published.npy"), "name=p", f"root={tmp_path}"])
    assert record["pairs"] == 30
    assert record["moved"] <= 0.2
    for wrong in ([], ["draw"], ["make-noise", "name=a"], ["import-noise", "name=a", "root=b"]):
        with pytest.raises(UserError, match="make-noise"):
            command.main(wrong)
    with pytest.raises(UserError, match="is not a file"):
        command.main(["import-noise", str(tmp_path / "no.npy"), "name=p", f"root={tmp_path}"])
    with pytest.raises(UserError, match="have: cuhk-pedes, icfg-pedes, rstpreid, ufine6926"):
        layouts.caption_set("market-1501")
