"""YAML files: read with their line numbers, asked for a key's line, changed without losing a comment.

One reader for the whole project: YAML 1.2 (as DVC reads it, so that ``5e-5`` is a number and ``off`` a string).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import ParamsError, unknown


def read_yaml(path: Path | str) -> Any:
    """Read a YAML 1.2 file, keeping line numbers and comments.

    Returns:
        The round-trip mapping.

    Raises:
        ParamsError: if the file is missing, no YAML, or no mapping.
    """
    path = Path(path)
    try:
        raw = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(
            f"{path.name}: no such file in {path.resolve().parent}; run from the project's folder"
        ) from None
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        row = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ParamsError(f"{path.name}{row}: not valid YAML: {problem}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path.name}: expected a mapping of keys at the top level, found {type(raw).__name__}")
    return raw


def plain(node: Any) -> Any:
    """Turn what ``read_yaml`` returned into plain dicts, lists and numbers."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    return float(node) if isinstance(node, float) else node


def set_key(raw: Any, key: str, value: Any, file: str) -> None:
    """Set a dotted key of a document; its parents must be there.

    Raises:
        ParamsError: if one is not.
    """
    *parents, last = key.split(".")
    here = raw
    for part in parents:
        if not isinstance(here, dict) or part not in here:
            known = here if isinstance(here, dict) else ()
            raise ParamsError(f"{file}: {key}: unknown {unknown(part, known)}")
        here = here[part]
    here[last] = value


def row_of(raw: Any, parts: Iterable[Any]) -> int:
    """The line (from 1) of the deepest part of a key path that the file holds."""
    row = 1
    here: Any = raw
    for part in parts:
        try:
            row = (here.lc.item if isinstance(here, list) else here.lc.key)(part)[0] + 1  # type: ignore[attr-defined]
            here = here[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    return row


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` arguments; a value is read as YAML.

    Returns:
        Dotted key -> value.

    Raises:
        ParamsError: if a pair has no ``=`` or its value is no YAML.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ParamsError(f"--set {pair}: expected KEY=VALUE, such as tasks.words.density=0.01")
        try:
            overrides[key] = YAML(typ="safe").load(value)
        except YAMLError:
            raise ParamsError(f"--set {pair}: the value is not valid YAML") from None
    return overrides


def edit_yaml(path: Path, changes: Mapping[str, Any]) -> None:
    """Change values of a YAML file in place; comments, order and every other character of it stay.

    Args:
        path: the file.
        changes: dotted key -> new scalar value; each key must be there.

    Raises:
        ParamsError: if a key is not there, or its value is not a plain scalar on one line.
    """
    from pipeline.files import write_bytes  # imports torch, which most readers of params.yaml do without

    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for key, value in changes.items():
        raw: Any = YAML(typ="rt").load("".join(lines))
        *parents, last = key.split(".")
        here: Any = raw
        for part in parents:
            here = here.get(part) if isinstance(here, dict) else None
        if not isinstance(here, dict) or last not in here:
            raise ParamsError(f"{path.name}: {key}: no such key to change")
        row, column = here.lc.value(last)  # type: ignore[attr-defined]
        old = re.match(r"[^\s,}\]#]+", lines[row][column:])
        if old is None or isinstance(here[last], (dict, list)):
            raise ParamsError(f"{path.name}:{row + 1}: {key}: expected a plain value there")
        text = repr(value) if isinstance(value, float) else str(value)
        lines[row] = lines[row][:column] + text + lines[row][column + old.end() :]
    write_bytes(path, "".join(lines).encode())
