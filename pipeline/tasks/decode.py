"""Decode a split's images, once, when they are fetched."""

import io

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.tasks.draws import Rows
from pipeline.tasks.raw import RawSplit

_NAMES = ("img", "image", "pixels")


def decode(split: RawSplit, rows: Rows) -> tuple[np.ndarray, str]:
    """Decode a split's images: the first column of encoded files (bytes, or the struct that ``datasets`` writes).

    Args:
        split: the raw split.
        rows: which of its images, at least one.

    Returns:
        uint8 [N, C, H, W], C = 1 if all are grey and else 3; and their format, such as ``PNG``.

    Raises:
        DataError: if there is no such column, an image cannot be decoded, or sizes differ.
    """
    from PIL import Image

    name, files = _encoded(split)
    images, formats = [], set()
    for row in rows.tolist():
        try:
            with Image.open(io.BytesIO(files[row] or b"")) as file:
                formats.add(file.format or "?")
                images.append(file.convert("L" if file.mode in {"1", "L"} else "RGB"))
        except (OSError, ValueError, SyntaxError):
            raise DataError(
                f"{split.where}: column '{name}', row {row} (rows count from 0) is no image that can be decoded"
            ) from None
    first = images[0]
    for row, image in zip(rows.tolist(), images, strict=True):
        if image.size != first.size:
            raise DataError(
                f"{split.where}: image {row} is {image.width}x{image.height} pixels; expected "
                f"{first.width}x{first.height} as the first one"
            )
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    pixels = np.stack([np.asarray(image.convert(mode)) for image in images])
    pixels_NCHW = pixels[:, None] if mode == "L" else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return pixels_NCHW, "+".join(sorted(formats))


def _encoded(split: RawSplit) -> tuple[str, list[bytes | None]]:
    table = split.table
    there = sorted(table.column_names, key=lambda name: (name not in _NAMES, table.column_names.index(name)))
    for name in there:
        column = table.column(name).combine_chunks()
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            return name, column.field("bytes").to_pylist()
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            return name, column.to_pylist()
    raise DataError(
        f"{split.where}: no column of encoded images (bytes, or a struct with 'bytes'); its columns are "
        + ", ".join(f"{name} ({table.schema.field(name).type})" for name in table.column_names)
    )
