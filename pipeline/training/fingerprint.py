"""Name a run by everything that determines it, so that a state is never taken up by another run."""

import dataclasses
import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch


def fingerprint(**things: Any) -> str:
    """Digest everything that determines a run: BLAKE2b-256 over canonical JSON.

    Equal things give equal digests, in any order of mappings and sets, in any process.

    Args:
        things: JSON values, dataclasses, mappings, sequences, sets, paths, dtypes, devices. A tensor has no place
            here; pass its digest.

    Returns:
        64 hex digits.

    Raises:
        TypeError: if a value is none of these.
    """  # noqa: DOC502 - raised by what it calls
    text = json.dumps(_plain(things), sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=32).hexdigest()


def _plain(value: Any) -> Any:
    """Reduce a value to JSON data of one form."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=json.dumps)
    if isinstance(value, (os.PathLike, torch.dtype, torch.device)):
        return str(value)
    raise TypeError(f"a fingerprint is made of plain values; got {type(value).__name__} (pass its digest)")
