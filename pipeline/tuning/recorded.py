"""Small results of an unfinished run, kept as JSON beside its state so that they are not computed twice."""

import json
from pathlib import Path
from typing import Any


def recorded(file: Path, otherwise: Any) -> Any:
    """Read a result.

    Returns:
        What the file holds; ``otherwise`` where there is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return otherwise
