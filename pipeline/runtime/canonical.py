"""JSON in one canonical form, read strictly: what digests and checksums of metadata are taken over."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from pipeline.errors import ParamsError


def canonical_json(value: Any) -> str:
    """Write JSON in its one canonical form: keys sorted, no spaces, ASCII.

    Returns:
        The text.

    Raises:
        ValueError: if the value holds NaN or an infinity.
    """  # noqa: DOC502 - raised by json
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def strict_json(text: str) -> Any:
    """Parse JSON strictly: no repeated key (two readers would see two files), no NaN, bounded depth.

    Returns:
        The data.

    Raises:
        ValueError: if the text is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is repeated")
        return result

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def plain_json(value: Any, what: str) -> Any:
    """Reduce a value to plain JSON data, as it will be read back from a file.

    Args:
        value: anything made of mappings with string keys, lists, strings, finite numbers, booleans and None.
        what: its name in the error.

    Returns:
        A copy of dicts, lists and scalars.

    Raises:
        ParamsError: if the value is no JSON.
    """
    try:
        return json.loads(canonical_json(dict(value) if isinstance(value, Mapping) else value))
    except (TypeError, ValueError) as error:
        raise ParamsError(
            f"{what} is no JSON ({error}); use strings, finite numbers, lists and mappings"
        ) from None
