"""Question pairs to tune a multimodal model on: is the person in this picture the one described (methods/icl.md section 6)?

A positive is a training caption with its own picture (answer Yes). A negative is the same caption with one of the ten
best-ranked training pictures of *other* identities according to a trained retrieval run (answer No): the confusions that
interaction will meet. How many texts and negatives the authors took is not published; one negative per positive is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reid_dist.data.draws import plan_rng
from reid_dist.errors import UserError
from reid_dist.generation.prompts import family

HARD = 10  # best-ranked pictures of other people among which a negative is drawn


@dataclass(frozen=True, slots=True)
class Pair:
    """One question: does the picture of view row `row` show the person of `text`?"""

    row: int
    text: str
    answer: bool


@dataclass(frozen=True, slots=True)
class Localiser:
    """How a prompt family asks whether a picture shows the person of a text."""

    version: str  # of the prompt
    ask: Callable[[str], str]  # "": the text states nothing that can be asked about
    answers: tuple[str, str]  # it does, it does not


def localiser(prompts: str) -> Localiser:
    """The question that interaction will ask a model of this family (dialogues: locate). Raises UserError."""
    chosen = family(prompts).locate
    if prompts != "tiny":
        return Localiser(chosen.version, lambda text: chosen.render(text=text), ("Yes", "No"))
    from reid_dist.data.synthetic.words import read_phrases
    from reid_dist.generation.tiny.questions import NO, YES, match_question

    return Localiser(chosen.version, lambda text: match_question(read_phrases(text)), (YES, NO))


def hard_pairs(
    texts: Sequence[str], rows: np.ndarray, pids: np.ndarray, query: Any, gallery: Any, shares: Mapping[str, float], seed: int,
    negatives: int,
) -> list[Pair]:  # fmt: skip
    """`build_pairs` over all pictures of a view: `pids` int64 [G] of its rows, `rows` int64 [M] of the texts; query [M, D]
    and gallery [G, D] named embeddings of texts and rows by a trained run, `shares` their weights.
    """
    from reid_dist.evaluation.neighbours import nearest

    most = int(np.unique(pids, return_counts=True)[1].max())
    ranked = nearest(query, gallery, min(len(pids), HARD + most), weights=shares).index
    everything = np.arange(len(pids))
    return build_pairs(texts, rows, pids[rows], everything, pids, ranked, seed, negatives)


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


def llama_factory_records(pairs: Sequence[Pair], paths: Mapping[int, str], asks: Localiser) -> Iterator[dict[str, Any]]:
    """Records of LLaMA-Factory's "sharegpt" multimodal format; `paths`: picture of each view row."""
    for pair in pairs:
        yield {
            "messages": [
                {"role": "user", "content": f"<image>{asks.ask(pair.text)}"},
                {"role": "assistant", "content": asks.answers[not pair.answer]},
            ],
            "images": [paths[pair.row]],
        }


def llama_factory_entry(file_name: str) -> dict[str, Any]:
    """The entry of LLaMA-Factory's dataset_info.json for a file of such records."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    return {"file_name": file_name, "formatting": "sharegpt", "columns": columns, "tags": tags}


def llama_factory_files(
    name: str, pairs: Sequence[Pair], paths: Mapping[int, str], asks: Localiser | None = None
) -> dict[str, str]:
    """{file name: content}: the records and dataset_info.json. `asks`: default that of Qwen2-VL."""
    records = list(llama_factory_records(pairs, paths, asks or localiser("qwen2-vl")))
    info = {name: llama_factory_entry(f"{name}.json")}
    return {
        f"{name}.json": json.dumps(records, ensure_ascii=False, indent=1),
        "dataset_info.json": json.dumps(info, indent=1),
    }
