"""The metadata of deltas and chains: read type by type, and the file blamed for what does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any, TypeVar

from pipeline.deltas.target import dtype_name
from pipeline.errors import ArtifactError, FishmaskError
from pipeline.files import DTYPES
from pipeline.parameters import Shape

T = TypeVar("T")
DTYPE_OF = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
"""The dtypes that files hold, by the names that metadata gives them."""


def of_type(kind: type[T], value: Any) -> T:
    """Take a value that must be of exactly this type.

    Returns:
        The value.

    Raises:
        TypeError: if it is not.
    """
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} is expected where the metadata has {type(value).__name__}")
    return value


def shape_of(value: Any) -> Shape:
    """Take a list of sizes as a shape.

    Returns:
        The shape.

    Raises:
        ValueError: if a size is negative; a TypeError if it is no list of integers.
    """
    shape = tuple(of_type(int, size) for size in of_type(list, value))
    if any(size < 0 for size in shape):
        raise ValueError(f"{list(shape)} is no shape")
    return shape


@contextmanager
def sound(path: str | PathLike[str], what: str, advice: str) -> Iterator[None]:
    """Blame the file for content that does not fit.

    Args:
        path: the file.
        what: it should be, for the message.
        advice: what to do.

    Yields:
        None, while the content is read.

    Raises:
        ArtifactError: for whatever reading raises.
    """
    try:
        yield
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, FishmaskError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{path}: is no sound {what}: {reason}; {advice}") from None
