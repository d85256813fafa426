"""What the command files of methods (`python -m reid_dist.methods.NAME VERB ...`) do the same: words, files, record, exit codes.

Progress goes to stderr, the record is the last line of stdout; exit 2 for bad input.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from reid_dist.config import parse_yaml
from reid_dist.errors import UserError

logger = logging.getLogger("reid_dist.methods")


def words_and_options(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Plain words, and values of `key=value` words read as YAML. Raises UserError."""
    words = [word for word in argv if "=" not in word]
    pairs = (word.partition("=") for word in argv if "=" in word)
    return words, {key: parse_yaml(value, key) for key, _, value in pairs}


def content_of(uri: str) -> bytes:
    """A whole file, local or s3://. Raises UserError when there is none."""
    from reid_dist.storage import cached_file

    return Path(cached_file(uri)).read_bytes()


def run_command(main: Callable[[list[str]], dict[str, Any]]) -> NoReturn:
    """Run `main` on the words of the command line, print its record and exit."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        sys.stdout.write(json.dumps(main(sys.argv[1:])) + "\n")
    except UserError as error:
        logger.error("%s", error)
        sys.exit(2)
    sys.exit(0)
