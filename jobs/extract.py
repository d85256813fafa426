"""Features of a table or a folder of images with a trained run: `python -m jobs.extract RUN SOURCE out=FILE.npz`.

The file has the columns that `jobs.evaluate --features` reads: feat [N, D] float32, pid, camid [N], split [N], and path, so
other tools can score or search them. Several embeddings are joined, each at unit length and weighted as the method weighs
their similarities, so that the inner product of two rows is the method's own similarity.
"""

from __future__ import annotations

import io
import logging
import math
from pathlib import Path
from typing import Any

from jobs._job import refuse_unknown_flags, run_job, split_words
from jobs.evaluate import take_options
from reid_dist.errors import UserError

USAGE = """usage: python -m jobs.extract RUN SOURCE out=FILE.npz [kind=image|text] [checkpoint=best] [split=test] [data.root=URI]
  RUN      a run's folder or s3:// prefix
  SOURCE   a packed table's name, or a folder (or s3:// prefix) of images
  out=     the feature file to write (.npz; local or s3://)
  kind=    image (default), or text: a row per caption of a table
  split=   only rows of this split of a table (default: all)"""

logger = logging.getLogger("reid_dist.jobs.extract")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp")


def main(argv: list[str]) -> dict[str, Any]:
    words, values, flags = split_words(argv, USAGE)
    refuse_unknown_flags(flags, set(), USAGE)
    options, overrides = take_options(values, ("out", "kind", "checkpoint", "split"))
    if len(words) != 2 or "out" not in options:
        raise UserError(f"expected RUN, SOURCE and out=. {USAGE.splitlines()[0]}")
    if not options["out"].endswith(".npz"):
        raise UserError(f"out={options['out']}: the feature file's name ends in .npz")
    return extract(words[0], words[1], options, overrides)


def extract(run: str, source: str, options: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """Encode and write; returns the record."""
    import numpy as np

    from reid_dist.methods.spec import EvalSide
    from reid_dist.storage import open_store
    from reid_dist.training.encode import encode_side
    from reid_dist.training.loaded import load_run

    kind = options.get("kind", "image")
    if kind not in ("image", "text"):
        raise UserError(f"kind={kind}: choose image or text")
    loaded = load_run(run, options.get("checkpoint", "best"), overrides)
    view = open_source(loaded.recipe, source, options.get("split"))
    counts = [len(texts) if kind == "text" else 1 for texts in view.captions]
    rows = np.repeat(np.arange(len(view)), counts)
    part = np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0)
    if not len(rows):
        raise UserError(
            f"{source}: nothing of kind {kind} there" + (f" in split {options['split']}" if "split" in options else "")
        )
    features = encode_side(loaded, view, EvalSide(kind, rows.astype(np.int64), part.astype(np.int64)))
    weights = loaded.spec.similarity
    unit = [math.sqrt(weights[name]) * _unit(features[name].numpy()) for name in sorted(weights)]
    columns = {
        "feat": np.concatenate(unit, axis=1).astype(np.float32),
        "pid": np.asarray(view.pid)[rows],
        "camid": np.asarray(view.camid)[rows],
        "split": np.asarray(view.split).astype(str)[rows],
        "modality": np.asarray(view.modality).astype(str)[rows],
        "path": np.array([view.path(int(row)) for row in rows]),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **columns)
    folder, _, name = options["out"].rpartition("/")
    open_store(folder or ".").write(name, buffer.getvalue())
    return {"out": options["out"], "rows": len(rows), "dim": columns["feat"].shape[1], "checkpoint": loaded.checkpoint}


def _unit(values: Any) -> Any:
    import numpy as np

    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def open_source(recipe: Any, source: str, split: str | None) -> Any:
    """A view of a packed table, or of the images in a folder. Raises UserError."""
    from reid_dist.data.store import open_view

    if "/" not in source and not Path(source).is_dir():
        return open_view(recipe.data, (source,), (split,) if split else ())
    if split:
        raise UserError(f"split={split}: {source} is a folder of images, which has no splits")
    return FolderView(source)


class FolderView:
    """Images of a folder or bucket prefix in bytewise order, with the columns of a view that say nothing."""

    def __init__(self, place: str) -> None:
        import numpy as np

        from reid_dist.storage import open_store

        self.store = open_store(place)
        self.paths = [entry.key for entry in self.store.list() if entry.key.lower().endswith(IMAGES)]
        if not self.paths:
            raise UserError(f"{place}: no images ({', '.join(IMAGES)}) there, and no packed table has that name")
        count = len(self.paths)
        self.pid = self.camid = np.full(count, -1, np.int64)
        self.split, self.modality = np.full(count, "gallery"), np.full(count, "rgb")
        self.captions: list[tuple[str, ...]] = [()] * count

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> str:
        return self.paths[row]

    def images(self, rows: Any) -> list[Any]:
        from reid_dist.data.decode import decode

        return [decode(self.store.read(self.paths[int(row)]), self.paths[int(row)]) for row in rows]


if __name__ == "__main__":
    run_job("extract", main)
