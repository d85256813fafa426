"""Question pairs to tune a multimodal model on: is the person in this picture the one described (methods/icl.md section 6)?

A positive is a training caption with its own picture (answer Yes). A negative is the same caption with one of the ten
best-ranked training pictures of *other* identities according to a trained retrieval run (answer No): the confusions that
interaction will meet. How many texts and negatives the authors took is not published; one negative per positive is ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reid_dist.data.draws import plan_rng
from reid_dist.errors import UserError
from reid_dist.generation.prompts import LOCATE

HARD = 10  # best-ranked pictures of other people among which a negative is drawn


@dataclass(frozen=True, slots=True)
class Pair:
    """One question: does the picture of view row `row` show the person of `text`?"""

    row: int
    text: str
    answer: bool


def build_pairs(
    texts: Sequence[str],
    rows: np.ndarray,
    pids: np.ndarray,
    gallery_rows: np.ndarray,
    gallery_pids: np.ndarray,
    ranked: np.ndarray,
    seed: int,
    negatives: int = 1,
) -> list[Pair]:
    """A positive and `negatives` hard negatives per text.

    Args:
        texts: [M] captions; `rows`, `pids` int64 [M]: the picture and identity each belongs to.
        gallery_rows, gallery_pids: int64 [G], the pictures that were ranked.
        ranked: int64 [M, k], for each text the best places in the gallery, best first; k large enough that some are of
            other people.
    Draws follow from (seed, position of the text). Raises UserError: a text whose list holds nobody else.
    """
    pairs: list[Pair] = []
    for place, text in enumerate(texts):
        others = [int(i) for i in ranked[place] if gallery_pids[i] != pids[place]][:HARD]
        if len(others) < negatives:
            raise UserError(
                f"caption {place} has {len(others)} pictures of other people among its {ranked.shape[1]} best, "
                f"{negatives} are needed: rank more pictures"
            )
        chosen = plan_rng(seed, place, "negatives").permutation(len(others))[:negatives]
        pairs.append(Pair(int(rows[place]), text, True))
        pairs += [Pair(int(gallery_rows[others[int(i)]]), text, False) for i in chosen]
    return pairs


def llama_factory_records(pairs: Sequence[Pair], paths: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    """Records of LLaMA-Factory's "sharegpt" multimodal format; `paths`: picture of each view row."""
    for pair in pairs:
        yield {
            "messages": [
                {"role": "user", "content": f"<image>{LOCATE.render(text=pair.text)}"},
                {"role": "assistant", "content": "Yes" if pair.answer else "No"},
            ],
            "images": [paths[pair.row]],
        }


def llama_factory_entry(file_name: str) -> dict[str, Any]:
    """The entry of LLaMA-Factory's dataset_info.json for a file of such records."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    return {"file_name": file_name, "formatting": "sharegpt", "columns": columns, "tags": tags}


def llama_factory_files(name: str, pairs: Sequence[Pair], paths: Mapping[int, str]) -> dict[str, str]:
    """{file name: content}: the records and dataset_info.json."""
    records = list(llama_factory_records(pairs, paths))
    info = {name: llama_factory_entry(f"{name}.json")}
    return {
        f"{name}.json": json.dumps(records, ensure_ascii=False, indent=1),
        "dataset_info.json": json.dumps(info, indent=1),
    }
