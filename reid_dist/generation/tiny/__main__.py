"""Train the small model into a folder: `python -m reid_dist.generation.tiny FOLDER [key=value of Recipe ...]`.

Interrupted, the same line goes on where FOLDER.checkpoint stands.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

from reid_dist.generation.tiny.model import save_folder
from reid_dist.generation.tiny.train import Recipe, Trained, facts, train


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    folder = Path(argv[0])
    numbers = {key: value for key, _, value in (word.partition("=") for word in argv[1:])}
    defaults = Recipe()
    recipe = replace(defaults, **{key: type(getattr(defaults, key))(value) for key, value in numbers.items()})

    def save(state: Trained) -> None:
        save_folder(state.model, state.tokenizer, folder, facts(recipe, state))

    train(recipe, save, folder.with_suffix(".checkpoint"))


if __name__ == "__main__":
    main(sys.argv[1:])
