"""The table of coded coordinates: the parameters, the coder of each tensor, and what each stream holds.

LZMA of a JSON object {names, shapes, coders (one a tensor), streams (one [coder, coordinates, bytes] each)}.
A name is written as the number of leading components it shares with the one before, a space, and the rest:
``encoder.0.weight``, ``encoder.0.bias`` are ``0 encoder.0.weight``, ``2 bias``.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from pipeline.masks.squeeze import bound, expand, squeeze
from pipeline.parameters import ParameterIndex
from pipeline.runtime.canonical import canonical_json, strict_json

_DIMENSIONS = 64  # of a tensor, as in numpy: the product of very many sizes would take a reader minutes


class Stream(NamedTuple):
    """One run of bytes: the coder of all tensors in it, how many coordinates, how many bytes."""

    coder: str
    held: int
    size: int


def write_table(index: ParameterIndex, coders: Mapping[str, str], streams: Sequence[Stream]) -> bytes:
    """Write the table.

    Args:
        index: the parameters.
        coders: name -> coder.
        streams: in the order of their bytes.

    Returns:
        Its bytes.
    """
    table = {
        "names": _shorten(index),
        "shapes": [list(shape) for shape in index.shapes.values()],
        "coders": [coders[name] for name in index],
        "streams": streams,
    }
    return squeeze(canonical_json(table).encode())


def read_table(code: bytes) -> tuple[ParameterIndex, dict[str, str], list[Stream]]:
    """Read the table, checking each value's type and range.

    Returns:
        What was given to ``write_table``.

    Raises:
        ValueError: if the bytes are anything else.
    """
    try:
        table = strict_json(expand(code).decode())
        short, shapes, coders = (list(table[key]) for key in ("names", "shapes", "coders"))
        streams = [Stream(*stream) for stream in table["streams"]]
        numbers = [n for shape in shapes for n in shape] + [n for s in streams for n in (s.held, s.size)]
        texts = [*short, *coders, *(stream.coder for stream in streams)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no table of tensors and streams ({error})") from None
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name is no text")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError("a size is no number of elements")
    if any(len(shape) > _DIMENSIONS for shape in shapes):
        raise ValueError(f"a tensor has more than {_DIMENSIONS} dimensions")
    names = _lengthen(short, bound(code))
    if not len(names) == len(shapes) == len(coders) == len(set(names)):
        raise ValueError("its names, shapes and coders do not pair up")
    index = ParameterIndex(dict(zip(names, shapes, strict=True)))
    if index.total >= 1 << 61:
        raise ValueError(f"it has {index.total} parameters")
    return index, dict(zip(names, coders, strict=True)), streams


def _shorten(names: Iterable[str]) -> list[str]:
    short, before = [], list[str]()
    for name in names:
        parts = name.split(".")
        pairs = zip(before, parts[:-1], strict=False)  # something is left to write: "a" is not "a."
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        short.append(f"{same} {'.'.join(parts[same:])}")
        before = parts
    return short


def _lengthen(short: Iterable[str], limit: int) -> list[str]:
    """Undo ``_shorten``, into ``limit`` characters at most: what is shared costs a reader memory each time."""
    names, before = [], list[str]()
    for text in short:
        same, _, rest = text.partition(" ")
        before = [*before[: int(same)], *rest.split(".")]
        names.append(".".join(before))
        limit -= len(names[-1])
        if limit < 0:
            raise ValueError("its names are too long")
    return names
