"""CIFAR's "Python version", as torchvision lays it out: read without unpickling.

    cifar-10-batches-py/   data_batch_1 ... data_batch_5, test_batch
    cifar-100-python/      train, test

Each file is a pickle of a dict with ``data`` (uint8 [N, 3072], each row an image's planes of red, green and blue)
and lists of labels. Its instructions are read one by one, and those that only put such values together are
followed: no name in it is looked up, nothing is called, so that a foreign file can do no harm.
"""

import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.tasks.image import pixel_column

SHAPE = (3, 32, 32)
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]], Mapping[bytes, str]]] = {
    "cifar-10-batches-py": ("cifar10", {"train": _TRAIN, "test": ("test_batch",)}, {b"labels": "label"}),
    "cifar-100-python": (
        "cifar100",
        {"train": ("train",), "test": ("test",)},
        {b"fine_labels": "fine_label", b"coarse_labels": "coarse_label"},
    ),
}
"""Name of the folder -> the data set in it, its splits' files, and the columns that its lists of labels become."""


def find_layout(folder: Path) -> Path | None:
    """Find such a folder: the folder itself, or one inside it, as torchvision's ``root`` holds it.

    Returns:
        Its path; None where there is none.

    Raises:
        DataError: if there are two.
    """
    if folder.name in LAYOUTS:
        return folder
    found = [folder / name for name in LAYOUTS if (folder / name).is_dir()]
    if len(found) > 1:
        raise DataError(f"{folder}: holds {' and '.join(path.name for path in found)}; name one of them as source")
    return found[0] if found else None


def layout_files(folder: Path) -> list[Path]:
    """Name the files that ``read_layout`` reads."""
    return [folder / name for names in LAYOUTS[folder.name][1].values() for name in names]


def read_layout(folder: Path) -> dict[str, pa.Table]:
    """Read both splits.

    Args:
        folder: what ``find_layout`` found.

    Returns:
        ``train`` and ``test``: ``pixels`` (uint8 [3, 32, 32], see ``pixel_column``) and int64 labels, in the order
        of the files.

    Raises:
        DataError: if a file is missing, or holds something else; names it.
    """  # noqa: DOC502 - raised by what it calls
    _, files, labels = LAYOUTS[folder.name]
    return {
        split: pa.concat_tables([_read(folder / name, labels) for name in names]) for split, names in files.items()
    }


def _read(path: Path, labels: Mapping[bytes, str]) -> pa.Table:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected the files of CIFAR's Python version") from None
    try:
        held = {_bytes(key): value for key, value in _described(content).items()}
        pixels, size = _pixels(held[b"data"]), int(np.prod(SHAPE))
        columns = {name: np.array(held[key], dtype=np.int64) for key, name in labels.items()}
        if pixels.ndim != 2 or pixels.shape[1] != size or {c.shape for c in columns.values()} != {(len(pixels),)}:
            raise ValueError(f"pixels {list(pixels.shape)}; expected {size} in each row, and a label for it")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{path}: is no file of CIFAR's Python version ({why}); expected a dict of 'data' (uint8 [N, 3072]) "
            f"and {', '.join(repr(key.decode()) for key in labels)}"
        ) from None
    return pa.table({"pixels": pixel_column(pixels.reshape(-1, *SHAPE)), **columns})


class _Made:
    """What a call in the file would have made: the function's name, its arguments, the state it was given."""

    def __init__(self, name: str, arguments: Any = ()) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None


def _described(content: bytes) -> Any:
    """Put together the value that a pickle of plain values and arrays describes.

    Returns:
        It, with a ``_Made`` wherever a call would have been.

    Raises:
        ValueError: if it has an instruction that serves for other values, or is cut short.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def last(count: int) -> list[Any]:
        if count > len(stack):
            raise ValueError("it takes what is not there")
        values = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return values

    def since_mark() -> list[Any]:
        return last(len(stack) - marks.pop())

    argument: Any
    for instruction, argument, _ in pickletools.genops(content):
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in _LITERAL:
                stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "NONE" | "NEWTRUE" | "NEWFALSE" as name:
                empty = {"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": (), "NEWTRUE": True, "NEWFALSE": False}
                stack.append(empty.get(name))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(last(int(name[-1]))))
            case "APPEND" | "APPENDS" as name:
                values = last(1) if name == "APPEND" else since_mark()
                stack[-1].extend(values)
            case "SETITEM" | "SETITEMS" as name:
                values = last(2) if name == "SETITEM" else since_mark()
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Made(argument.rpartition(" ")[2]))
            case "STACK_GLOBAL":
                stack.append(_Made(last(2)[1]))
            case "REDUCE":
                function, arguments = last(2)
                stack.append(_Made(function.name, arguments))
            case "BUILD":
                (state,) = last(1)
                stack[-1].state = state
            case "STOP":
                return last(1)[0]
            case name:
                raise ValueError(f"it is a pickle with the instruction {name}")
    raise ValueError("it ends too early")


_LITERAL = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip


def _bytes(value: Any) -> bytes:
    """Text of Python 2 is bytes, and so are the bytes that a newer Python wrote in the older form."""
    if isinstance(value, _Made) and value.name == "encode":
        value = value.arguments[0]
    return value.encode("latin-1") if isinstance(value, str) else bytes(value)


def _pixels(array: _Made) -> np.ndarray:
    """The array that was described, by its shape, its type, its order and its bytes."""
    if array.name == "_frombuffer":
        data, kind, shape, order = array.arguments
        fortran = order == "F"
    else:
        _, shape, kind, fortran, data = array.state
    if kind.arguments[0] != "u1":
        raise ValueError(f"its pixels are of type {kind.arguments[0]}")
    return np.frombuffer(_bytes(data), dtype=np.uint8).reshape(shape, order="F" if fortran else "C")
