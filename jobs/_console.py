"""The interactive console of `jobs.interact`: a person describes somebody, sees the ten best pictures, and answers in the
model's place.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from reid_dist.generation.interaction import NO_ANCHOR, Policy, blended, place_anchors, unit_rows

SHOWN = 10


class Console:
    """Asks on stderr and reads from stdin, until an empty line or the end of input. `page`: an HTML file, written anew with
    every ranking.
    """

    def __init__(self, encoded: Any, view: Any, policy: Policy, run: str, page: str = "") -> None:
        self.encoded, self.view, self.policy = encoded, view, policy
        self.page = Path(page or f"{tempfile.gettempdir()}/reid-interact-{os.getpid()}.html")
        self.run_name, self.lists = run, list[Any]()

    def run(self) -> dict[str, Any]:
        """The record."""
        count = 0
        while text := ask("\ndescription (empty: end)> "):
            count += 1
            self.describe(text)
        return {"descriptions": count} | ({"page": str(self.page)} if self.lists else {})

    def describe(self, text: str) -> None:
        """One description, refined once at most."""
        query, nobody = self.encoded.encode([text]), np.array([NO_ANCHOR])
        scores = self.scores(blended(query, query, nobody, self.policy.weight))
        for item in self.show(scores[0], text)[: self.policy.rounds]:
            answer = ask(f"does {self.path(item)} show this person? [y/n, empty: stop]> ")
            if not answer:
                return
            if answer.lower().startswith("y"):
                seen = ask("what else do you see on this picture, in sentences> ")
                merged = f"{text.rstrip(' .')}. {seen}" if seen else text
                anchor, weight = np.array([item]), self.policy.weight
                refined = self.scores(blended(query, self.encoded.encode([merged]), anchor, weight))
                sys.stderr.write(f"searching with: {merged}\n")
                self.show(place_anchors(refined, scores[0][anchor], anchor, weight)[0], merged)
                return

    def scores(self, query: Any) -> np.ndarray:
        """[1, G] of a query."""
        gallery, shares = self.encoded.gallery, self.encoded.shares
        return np.asarray(sum(share * (query[name] @ unit_rows(gallery[name]).T) for name, share in shares.items()))

    def path(self, item: int) -> str:
        return str(self.view.path(int(self.encoded.gallery_rows[item])))

    def show(self, scores: np.ndarray, text: str) -> list[int]:
        """List the best, add them to the page; gallery items, best first."""
        best = [int(item) for item in np.argsort(-scores, kind="stable")[:SHOWN]]
        for place, item in enumerate(best, start=1):
            sys.stderr.write(f"  {place:2d}  {scores[item]:.3f}  {self.path(item)}\n")
        self.write(text, best, scores)
        sys.stderr.write(f"  pictures: {self.page}\n")
        return best

    def write(self, text: str, best: list[int], scores: np.ndarray) -> None:
        """The page, the newest ranking first."""
        from reid_dist.reporting import RankedItem, RankList, render_search

        pictures = self.view.encoded(np.asarray(self.encoded.gallery_rows)[best])
        items = [
            RankedItem(None, picture, label=self.path(item), score=float(scores[item]))
            for item, picture in zip(best, pictures, strict=True)
        ]
        self.lists.insert(0, RankList(items, caption=text))
        command = shlex.join(["python", "-m", "jobs.interact", *sys.argv[1:]])
        told = f"{len(self.lists)} rankings of {len(scores)} pictures, the newest first. Reload after every answer."
        self.page.write_text(render_search(told, self.lists, {"run": self.run_name}, command, "Best first."))


def ask(text: str) -> str:
    """A line from the person; empty at the end of input."""
    sys.stderr.write(text)
    sys.stderr.flush()
    return sys.stdin.readline().strip()
