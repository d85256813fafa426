"""CLIP's byte-pair tokenizer with a mask token, and the masking of words.

Source: CLIP (Radford et al. 2021) for the encoding; IRRA for the mask token, which takes the place of the last
merge's result ("jekyll", which falls back to its pieces here where the original raises KeyError): methods/comoe.md
section 4. The merge list is the file that the open_clip package ships. A smaller `vocab_size` keeps the first merges
only; ids above the 512 byte symbols then differ from CLIP's, so it is for models trained from scratch.
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from reid_dist.errors import UserError

CLIP_VOCAB_SIZE = 49408
_SPECIALS = ("<|mask|>", "<|startoftext|>", "<|endoftext|>")  # the last three ids, in this order
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def _byte_symbols() -> dict[int, str]:
    """Byte -> printable character, in CLIP's vocabulary order: printable latin-1 bytes stand for themselves, the others
    for the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {byte: chr(byte) for byte in printable}
    for offset, byte in enumerate(b for b in range(256) if b not in symbols):
        symbols[byte] = chr(256 + offset)
    return symbols


@functools.cache
def _merge_lines() -> tuple[tuple[str, str], ...]:
    spec = importlib.util.find_spec("open_clip")  # finds the folder without importing the package
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the CLIP merge list comes with the package open_clip_torch, which is not installed")
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : CLIP_VOCAB_SIZE - 512 - 2 + 1]
    pairs = [line.split() for line in lines]
    return tuple((left, right) for left, right in pairs)


class ClipTokenizer:
    """Text -> ids. Thread-safe: the word cache only ever gains equal entries. Raises UserError for a vocabulary size
    below 515 or above CLIP's."""

    def __init__(self, vocab_size: int = CLIP_VOCAB_SIZE) -> None:
        import regex

        merges = vocab_size - 512 - len(_SPECIALS)
        if not 0 <= merges <= CLIP_VOCAB_SIZE - 512 - len(_SPECIALS):
            raise UserError(f"vocab_size={vocab_size}: CLIP's vocabulary has 515 to {CLIP_VOCAB_SIZE} entries")
        self.vocab_size = vocab_size
        self.mask_id, self.start_id, self.end_id = range(vocab_size - 3, vocab_size)
        self._bytes = _byte_symbols()
        pairs = _merge_lines()[:merges]
        self._rank = {pair: rank for rank, pair in enumerate(pairs)}
        symbols = list(self._bytes.values())
        self._names = [*symbols, *(s + "</w>" for s in symbols), *(left + right for left, right in pairs), *_SPECIALS]
        self._id = {name: index for index, name in enumerate(self._names)}
        special = "|".join(regex.escape(name) for name in _SPECIALS)
        self._words = regex.compile(f"{special}|{_WORDS}", regex.IGNORECASE)
        self._cache: dict[str, tuple[int, ...]] = {name: (self._id[name],) for name in _SPECIALS}

    def clean(self, text: str) -> str:
        """Repair mojibake, undo HTML entities twice, collapse blanks, lower-case."""
        import ftfy

        if not (text.isascii() and text.isprintable() and "&" not in text):  # else there is nothing to repair
            text = ftfy.fix_text(text)
        text = html.unescape(html.unescape(text)).strip()
        return " ".join(text.split()).lower()

    def bpe(self, text: str) -> list[int]:
        """Ids of `text` without start, end and padding."""
        ids: list[int] = []
        for word in self._words.findall(self.clean(text)):
            known = self._cache.get(word)
            if known is None:
                known = self._cache[word] = self._pieces(word)
            ids += known
        return ids

    def _pieces(self, word: str) -> tuple[int, ...]:
        """Merge the pair of lowest rank, everywhere it occurs, until no pair is in the list."""
        parts = [self._bytes[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self._rank.get(pair, len(self._rank)))
            if best not in self._rank:
                break
            merged, index = [], 0
            while index < len(parts):
                if tuple(parts[index : index + 2]) == best:
                    merged.append(parts[index] + parts[index + 1])
                    index += 2
                else:
                    merged.append(parts[index])
                    index += 1
            parts = merged
        return tuple(self._id[part] for part in parts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; a blank follows every word. Pieces of a character that stand alone become question marks."""
        names, bytes_of = self._names, {symbol: byte for byte, symbol in self._bytes.items()}
        pieces = [names[index] for index in ids]
        text = b"".join(
            name.encode() if name in _SPECIALS else
            bytes(bytes_of[symbol] for symbol in name.removesuffix("</w>")) + b" " * name.endswith("</w>")
            for name in pieces
        )  # fmt: skip
        return text.decode("utf-8", errors="replace")

    def encode(self, text: str, length: int = 77) -> np.ndarray:
        """int64 [length]: start, ids, end, zeros; a longer text is cut and its last id becomes the end."""
        ids = [self.start_id, *self.bpe(text), self.end_id]
        if len(ids) > length:
            ids = [*ids[: length - 1], self.end_id]
        padded = np.zeros(length, dtype=np.int64)
        padded[: len(ids)] = ids
        return padded

    def encode_all(self, texts: Iterable[str], length: int = 77) -> np.ndarray:
        """int64 [N, length]."""
        rows = [self.encode(text, length) for text in texts]
        return np.stack(rows) if rows else np.zeros((0, length), dtype=np.int64)


@functools.lru_cache(maxsize=4)
def clip_tokenizer(vocab_size: int = CLIP_VOCAB_SIZE) -> ClipTokenizer:
    """One shared tokenizer per vocabulary size (its word cache fills up over a run)."""
    return ClipTokenizer(vocab_size)


def mask_tokens(
    ids: np.ndarray, uniform: np.ndarray, replacement: np.ndarray, mask_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Masked-word task of IRRA given its draws: (masked ids, labels), both int64 [L]; the caption itself is left alone.

    A position with 0 < id < mask_id and uniform u < 0.15 is labelled with its id; with v = u / 0.15, v < 0.8 puts the
    mask, v < 0.9 `replacement`, else nothing changes. Where nothing was chosen, position 1 is masked. Labels
    elsewhere are 0.
    """
    chosen = (ids > 0) & (ids < mask_id) & (uniform < 0.15)
    v = uniform / 0.15
    masked = np.where(chosen & (v < 0.8), mask_id, ids)
    masked = np.where(chosen & (v >= 0.8) & (v < 0.9), replacement, masked)
    label = np.where(chosen, ids, 0)
    if not chosen.any():
        masked[1], label[1] = mask_id, ids[1]
    return masked, label


def draw_masked(ids: np.ndarray, rng: np.random.Generator, mask_id: int) -> tuple[np.ndarray, np.ndarray]:
    """`mask_tokens` with draws of `rng` (one uniform and one replacement id 1 ... mask_id - 1 per position)."""
    return mask_tokens(ids, rng.random(len(ids)), rng.integers(1, mask_id, len(ids)), mask_id)
