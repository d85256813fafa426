"""No secret is written: values of secret environment variables, user info in URLs and signatures are replaced by ***.

Applied to everything a run stores: records, cards, notes, metrics and log lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_NAMES = re.compile(
    r"(SECRET|PASSWORD|PASSWD|(^|_)TOKEN|API_?KEY|SECRET_?KEY|ACCESS_KEY(_ID)?|CREDENTIALS?)$", re.IGNORECASE
)
_SHORTEST = 8  # shorter values are words like "true", whose removal would only garble the text
_KEY = r"\b(?:secret|password|token|api_?key|authorization)\b['\"]?"
_PATTERNS = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s:@'\"]*:[^/\s@'\"]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (re.compile(r"(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(rf"({_KEY}\s*[:=]\s*['\"]?(?:Bearer )?)[^\s'\",;}}]{{8,}}", re.IGNORECASE), rf"\1{HIDDEN}"),
)


def secrets() -> list[str]:
    """Values of the environment variables whose names say that they are secret, longest first."""
    values = {value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST}
    return sorted(values, key=len, reverse=True)


def redact(value: Any) -> Any:
    """`value` (text, or a tree of mappings and lists) without secrets."""
    return _redact(value, secrets())


def _redact(value: Any, hidden: list[str]) -> Any:
    if isinstance(value, str):
        for secret in hidden:
            value = value.replace(secret, HIDDEN)
        for pattern, replacement in _PATTERNS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, Mapping):
        return {_redact(key, hidden): _redact(item, hidden) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact(item, hidden) for item in value]
    return value
