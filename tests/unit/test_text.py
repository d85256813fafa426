"""Tokenizer and masking of words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reid_dist.data.text import ClipTokenizer, clip_tokenizer, draw_masked, mask_tokens
from reid_dist.errors import UserError
from tests.golden import cases, load


@cases("comoe", "tokenizer")
def test_tokenizer(case: Path) -> None:
    c = load(case)
    tokenizer = clip_tokenizer(c["const_vocab_size"])
    assert (tokenizer.mask_id, tokenizer.start_id, tokenizer.end_id) == (
        c["const_mask_id"],
        c["const_start_id"],
        c["const_end_id"],
    )
    for j in range(c["const_count"]):
        assert tokenizer.bpe(c[f"in_text_{j}"]) == c[f"out_bpe_{j}"].tolist()
        ids = tokenizer.encode(c[f"in_text_{j}"], c[f"const_length_{j}"])
        np.testing.assert_array_equal(ids, c[f"out_ids_{j}"])


@cases("comoe", "mlm_mask")
def test_mask_tokens(case: Path) -> None:
    c = load(case)
    before = c["in_ids"].copy()
    masked, label = mask_tokens(c["in_ids"], c["in_uniform"], c["in_random_token"], c["const_mask_id"])
    np.testing.assert_array_equal(masked, c["out_masked_ids"])
    np.testing.assert_array_equal(label, c["out_label"])
    np.testing.assert_array_equal(c["in_ids"], before)  # the original overwrites the caption


def test_agrees_with_open_clip_on_many_captions() -> None:
    import open_clip

    theirs = open_clip.get_tokenizer("ViT-B-16-quickgelu")
    captions = [
        "The woman has long brown hair, and she's carrying a plastic bag in her left hand.",
        "Jean jacket; 2 shopping bags (red & yellow) ... 100% cotton!!!",
        "na\u00efve caf\u00e9 \u4e2d\u6587 \U0001f600 it&#39;s",
        "tabs\tand\nnew lines",
        "x" * 300,
        "",
    ]
    ids = clip_tokenizer().encode_all(captions, 77)
    np.testing.assert_array_equal(ids, theirs(captions).numpy())


def test_jekyll_falls_back_to_its_pieces() -> None:
    ids = clip_tokenizer().bpe("Jekyll")
    assert len(ids) == 2
    assert clip_tokenizer().mask_id not in ids


def test_a_small_vocabulary_has_its_own_special_ids_and_no_unknowns() -> None:
    small = ClipTokenizer(1000)
    ids = small.encode("A man wears a black jacket <|mask|>, na\u00efve \u4e2d", 64)
    assert ids[0] == 998
    assert ids.max() == 999
    assert (ids == 997).sum() == 1
    assert len(small.bpe("a black jacket")) > len(clip_tokenizer().bpe("a black jacket"))
    common = clip_tokenizer().bpe("the")
    assert small.bpe("the") == common  # kept merges keep their ids


@pytest.mark.parametrize("size", [514, 49409])
def test_impossible_vocabularies_are_refused(size: int) -> None:
    with pytest.raises(UserError, match="vocab_size"):
        ClipTokenizer(size)


def test_masking_rates() -> None:
    ids = np.concatenate([[49406], np.full(20000, 320), [49407, 0, 0]])
    masked, label = draw_masked(ids, np.random.default_rng(5), 49405)
    asked = label != 0
    assert abs(asked.mean() - 0.15) < 0.01
    assert abs((masked[asked] == 49405).mean() - 0.8) < 0.03
    assert abs((masked[asked] == 320).mean() - 0.1) < 0.03
    assert (masked[~asked] == ids[~asked]).all()
    assert (label[[0, -3, -2, -1]] == 0).all()
