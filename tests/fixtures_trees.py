"""Smallest faithful trees of the layouts, made in code, with what a parser must say of them.

Datasets specification 8.1. A good tree carries its expected records; a nasty one the words that the error must hold.
The root lies below a folder called x_2024_c3_cam (ids and cameras must not be read from there) and its files are listed
in shuffled order.
"""

from __future__ import annotations

import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from reid_dist.storage.base import Entry

TRAP = "x_2024_c3_cam"
Row = tuple[str, str, int, int | None, tuple[str, ...]]  # path, split, pid, camid, captions


def jpeg(seed: int = 0, size: tuple[int, int] = (8, 16), mode: str = "RGB", **options: Any) -> bytes:
    """A small JPEG that differs by seed; size is (width, height)."""
    file = io.BytesIO()
    Image.new(mode, size, (seed * 37 % 256,) * len(mode) if mode != "L" else seed * 37 % 256).save(
        file, "JPEG", **options
    )
    return file.getvalue()


def png(mode: str = "RGB") -> bytes:
    """A small PNG."""
    file = io.BytesIO()
    Image.new(mode, (8, 16), (90, 60, 30, 128)[: len(mode)]).save(file, "PNG")
    return file.getvalue()


class ShuffledStore:
    """A read-only folder whose listing comes in random order, as some places give it."""

    def __init__(self, root: Path, seed: int = 7) -> None:
        self.root, self.uri, self.seed = root, str(root), seed

    def list(self, prefix: str = "") -> list[Entry]:
        files = [p for p in self.root.rglob("*") if p.is_file()]
        random.Random(self.seed).shuffle(files)
        keys = [(p.relative_to(self.root).as_posix(), p.stat().st_size) for p in files]
        return [Entry(key=key, size=size, modified=0.0) for key, size in keys if key.startswith(prefix)]

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()


@dataclass(frozen=True)
class TreeCase:
    """One tree: its files, and either the records or the words of the error."""

    name: str
    layout: str
    files: dict[str, bytes]
    rows: tuple[Row, ...] = ()
    ignored: tuple[str, ...] = ()
    error: tuple[str, ...] = ()  # all of these stand in the DatasetError
    lenient: tuple[Row, ...] | None = None  # what strict=False still reads from a tree that strict refuses
    notes: dict[str, str] = field(default_factory=dict)

    def write(self, tmp: Path) -> Path:
        """Write below the trap folder and return the root."""
        root = tmp / TRAP / self.layout
        for path, data in self.files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return root


# ---- Market-1501

_MARKET: tuple[Row, ...] = (
    ("bounding_box_train/0002_c1s1_000451_03.jpg", "train", 2, 0, ()),
    ("bounding_box_train/0002_c2s1_000776_01.JPG", "train", 2, 1, ()),
    ("bounding_box_train/0007_c3s3_077419_03.jpg", "train", 7, 2, ()),
    ("bounding_box_train/0007_c6s4_010827_01.jpg", "train", 7, 5, ()),
    ("query/0001_c1s1_001051_00.jpg", "query", 1, 0, ()),
    ("query/0003_c4s6_015641_00.jpg", "query", 3, 3, ()),
    ("query/0004_c5s1_000001_00.jpg", "query", 4, 4, ()),  # query-only id: an invalid query
    ("query/0005_c2s1_000001_00.jpg", "query", 5, 1, ()),  # gallery of the same camera alone: an invalid query
    ("bounding_box_test/0000_c6s4_010827_01.jpg", "gallery", 0, 5, ()),
    ("bounding_box_test/0001_c2s1_000301_00.jpg", "gallery", 1, 1, ()),
    ("bounding_box_test/0003_c1s6_011741_02.jpg", "gallery", 3, 0, ()),
    ("bounding_box_test/0005_c2s1_000026_01.jpg", "gallery", 5, 1, ()),
)
MARKET_INVALID_QUERIES = (4, 5)
_MARKET_KEEPING = (
    "bounding_box_test/Thumbs.db",
    "bounding_box_train/.DS_Store",
    "__MACOSX/query/._0001_c1s1_001051_00.jpg",
)


def _market_files() -> dict[str, bytes]:
    files = {row[0]: jpeg(i) for i, row in enumerate(_MARKET)}
    files |= {"bounding_box_test/-1_c3s2_102946_04.jpg": jpeg(99), "readme.txt": b"about", "gt_query/a.mat": b"MATLAB"}
    return files | dict.fromkeys(_MARKET_KEEPING, b"housekeeping")


def market_cases() -> list[TreeCase]:
    """The good tree and one nasty tree per rule."""
    good = _market_files()

    def bad(name: str, path: str, data: bytes, *error: str, lenient: bool = True) -> TreeCase:
        rows, files = _MARKET if lenient else None, good | {path: data}
        return TreeCase(f"market-{name}", "market-1501", files, error=(path, *error), lenient=rows)

    without_query = {path: data for path, data in good.items() if not path.startswith("query/")}
    return [
        TreeCase("market-good", "market-1501", good, rows=_MARKET, ignored=tuple(sorted(_MARKET_KEEPING)),
                 notes={"junk": "1 images with id -1 dropped", "distractors": "1 gallery images with id 0"}),
        bad("double-extension", "query/0001_c1s1_001051_01.jpg.jpg", jpeg(), "twice"),
        bad("stray-text", "query/notes.txt", b"x"),
        bad("stray-folder", "other/0001_c1s1_001051_00.jpg", jpeg()),
        bad("too-deep", "query/extra/0001_c1s1_001051_00.jpg", jpeg()),
        bad("camera-7", "query/0001_c7s1_001051_00.jpg", jpeg()),
        bad("png", "query/0001_c1s1_001051_02.png", png()),
        bad("distractor-query", "query/0000_c1s1_001051_00.jpg", jpeg(), "distractor", lenient=False),
        bad("zero-bytes", "query/0001_c1s1_001051_02.jpg", b"", "0 bytes", lenient=False),
        TreeCase("market-no-query", "market-1501", without_query, error=("query/", "bounding_box_test")),
    ]  # fmt: skip


# ---- text sets

UNUSUAL = (
    "A man \u2013 \u201cnavy\u201d caf\u00e9 coat\u2026",
    " \u7a7f\u7ea2\u8272\u4e0a\u8863\u7684\u4eba ",
    "a red " * 60 + "top",
)


@dataclass(frozen=True)
class TextSet:
    """What differs between the caption sets, stated anew here and not read from the code under test."""

    layout: str
    file: str
    key: str
    first: int
    has_val: bool = True
    folder: str = "imgs/"  # what paths are relative to

    def entry(self, split: str, pid: int, image: str, *captions: str, **more: Any) -> dict[str, Any]:
        """One entry; `pid` counts from 0."""
        return {"split": split, "id": pid + self.first, self.key: image, "captions": list(captions), **more}


TEXT_SETS = (
    TextSet("cuhk-pedes", "reid_raw.json", "file_path", 1),
    TextSet("icfg-pedes", "ICFG-PEDES.json", "file_path", 0, has_val=False),
    TextSet("rstpreid", "data_captions.json", "img_path", 0),
    TextSet("ufine6926", "UFine6926_Annotations.json", "file_path", 1, has_val=False, folder=""),
)


def _good_entries(kind: TextSet) -> list[dict[str, Any]]:
    middle = "val" if kind.has_val else "test"
    return [
        kind.entry("test", 4, "train/z.jpg", "first in the file, last by name"),  # folder names are no splits
        kind.entry("train", 1, "cam_a/0001_c2.jpg", "two", "captions", processed_tokens=[["two"], ["captions"]]),
        kind.entry("train", 0, "cam_a/0000.PNG", "one caption"),
        kind.entry(middle, 3, "test/0003 b.jpeg", *UNUSUAL),
        kind.entry("train", 2, "a.b/c.bmp", "Two  blanks kept ", "\u00e9"),
    ]


def _text_files(kind: TextSet, entries: list[Any], name: str = "", bom: bool = False) -> dict[str, bytes]:
    text = json.dumps(entries, ensure_ascii=False).encode("utf-8-sig" if bom else "utf-8")
    images = {kind.folder + entry[kind.key]: jpeg(i) for i, entry in enumerate(_good_entries(kind))}
    return {name or kind.file: text, f"{kind.folder}.DS_Store": b"x", **images}


def _rows(kind: TextSet) -> tuple[Row, ...]:
    entries = _good_entries(kind)
    return tuple(
        (kind.folder + e[kind.key], e["split"], e["id"] - kind.first, None, tuple(e["captions"])) for e in entries
    )


def text_cases() -> list[TreeCase]:
    """Good and nasty trees of each caption set."""
    return [case for kind in TEXT_SETS for case in (*_good_text(kind), *_nasty_entries(kind), *_nasty_files(kind))]


def _good_text(kind: TextSet) -> list[TreeCase]:
    rows, entries, keeping = _rows(kind), _good_entries(kind), (f"{kind.folder}.DS_Store",)
    cases = [
        TreeCase(f"{kind.layout}-good", kind.layout, _text_files(kind, entries), rows, keeping,
                 notes={"annotation": kind.file, "unread keys": "processed_tokens"}),
        TreeCase(f"{kind.layout}-bom", kind.layout, _text_files(kind, entries, bom=True), rows, keeping),
    ]  # fmt: skip
    if kind.layout == "icfg-pedes":
        other = _text_files(kind, entries, name="ICFG_PEDES.json")
        cases.append(TreeCase("icfg-pedes-underscore", kind.layout, other, rows, keeping))
    return cases


def _nasty_entries(kind: TextSet) -> list[TreeCase]:
    """Entry 5 of each is the wrong one."""
    entry, spare = kind.entry, {f"{kind.folder}n.jpg": jpeg(50)}
    no_captions = entry("train", 2, "n.jpg")
    wrong: dict[str, tuple[Any, tuple[str, ...]]] = {
        "unknown-split": (entry("trian", 2, "n.jpg", "x"), ("entry 5", "'trian'")),
        "empty-caption": (entry("train", 2, "n.jpg", "x", "  "), ("entry 5", "n.jpg", "empty caption")),
        "no-captions": (no_captions, ("entry 5", "captions=[]")),
        "caption-string": (no_captions | {"captions": "x"}, ("entry 5", "captions='x'")),
        "missing-image": (entry("train", 2, "gone.jpg", "x"), ("entry 5", f"{kind.folder}gone.jpg")),
        "case-differs": (entry("train", 2, "N.jpg", "x"), ("entry 5", f"{kind.folder}N.jpg")),
        "gap-in-train": (entry("train", 8, "n.jpg", "x"), (kind.file, f"id {3 + kind.first} ")),
        "listed-twice": (
            entry("train", 1, "cam_a/0001_c2.jpg", "x"),
            ("entry 5", f"{kind.folder}cam_a/0001_c2.jpg", "twice"),
        ),
        "climbing-path": (entry("train", 2, "../n.jpg", "x"), ("entry 5", "'../n.jpg'")),
        "absolute-path": (entry("train", 2, "/n.jpg", "x"), ("entry 5", "'/n.jpg'")),
        "id-text": (no_captions | {"id": "2", "captions": ["x"]}, ("entry 5", "id='2'")),
        "id-below-first": (entry("train", -1, "n.jpg", "x"), ("entry 5", f"id={kind.first - 1}")),
        "no-id": ({"split": "train", kind.key: "n.jpg", "captions": ["x"]}, ("entry 5", "'id'")),
        "no-object": ("n.jpg", ("entry 5", "'n.jpg'")),
    }
    if not kind.has_val:
        wrong["val"] = (entry("val", 2, "n.jpg", "x"), ("entry 5", "'val'"))
    return [
        TreeCase(
            f"{kind.layout}-{name}", kind.layout, _text_files(kind, [*_good_entries(kind), last]) | spare, error=error
        )
        for name, (last, error) in wrong.items()
    ]


def _nasty_files(kind: TextSet) -> list[TreeCase]:
    entries, rows = _good_entries(kind), _rows(kind)
    good = _text_files(kind, entries)
    without = {path: data for path, data in good.items() if path != kind.file}

    def bad(name: str, changed: dict[str, bytes], *error: str, lenient: bool = False) -> TreeCase:
        files = good | changed if changed else without
        return TreeCase(f"{kind.layout}-{name}", kind.layout, files, error=error, lenient=rows if lenient else None)

    cases = [
        bad("stray", {f"{kind.folder}cam_a/list.txt": b"x"}, "cam_a/list.txt", lenient=True),
        bad("stray-top", {"split.csv": b"x"}, "split.csv", lenient=True),
        bad("zero-bytes", {f"{kind.folder}train/z.jpg": b""}, "train/z.jpg", "0 bytes"),
        bad("not-json", {kind.file: b'[{"split":'}, kind.file, "JSON"),
        bad("latin", {kind.file: '["\u00e9"]'.encode("latin-1")}, kind.file, "UTF-8"),
        bad("object", {kind.file: b"{}"}, kind.file, "list"),
        bad("no-annotation", {}, kind.file, kind.folder.rstrip("/") or "cam_a"),
    ]
    if kind.layout == "icfg-pedes":
        both = good | {"ICFG_PEDES.json": good[kind.file]}
        cases.append(
            TreeCase("icfg-pedes-both", kind.layout, both, error=("ICFG-PEDES.json", "ICFG_PEDES.json", "both"))
        )
    return cases


# ---- corruption


@dataclass(frozen=True)
class ImageCase:
    """An odd image file and what decoding to upright RGB must give: its (width, height), or None for a refusal."""

    name: str
    data: bytes
    size: tuple[int, int] | None


def image_cases() -> list[ImageCase]:
    """The corruption row of 8.1; decoders are tested with these."""
    turned = Image.Exif()
    turned[0x0112] = 6  # shown after a quarter turn
    whole = jpeg(3, (64, 128))
    return [
        ImageCase("truncated.jpg", whole[: len(whole) // 2], None),
        ImageCase("zero.jpg", b"", None),
        ImageCase("text.jpg", b"this is no picture", None),
        ImageCase("png_inside.jpg", png(), (8, 16)),
        ImageCase("grey.jpg", jpeg(3, mode="L"), (8, 16)),
        ImageCase("rgba.png", png("RGBA"), (8, 16)),
        ImageCase("cmyk.jpg", jpeg(3, mode="CMYK"), (8, 16)),
        ImageCase("turned.jpg", jpeg(3, exif=turned.tobytes()), (16, 8)),
        ImageCase("one.jpg", jpeg(3, (1, 1)), (1, 1)),
    ]
