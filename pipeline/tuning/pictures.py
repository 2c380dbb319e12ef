"""A user's images at the size that the model takes: decoded, resized, cropped to the middle, kept without loss."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.tasks.custom import FILE
from pipeline.tasks.raw import RawSplit
from pipeline.tuning.columns import picture_column


@dataclass(frozen=True)
class Frame:
    """What a model looks at.

    Attributes:
        channels: 3, or 1 for grey.
        height: in pixels.
        width: likewise.
    """

    channels: int
    height: int
    width: int


def pictures_of(split: RawSplit, frame: Frame) -> Iterator[bytes | None]:
    """Bring a split's images into one form.

    The shorter side is resized (bicubic, antialiased) to fill the frame, the longer one is cropped to the middle.
    Transparent pixels are laid on white.

    Args:
        split: image files by path, or encoded images in a column.
        frame: the form.

    Yields:
        A PNG per row; None for what cannot be read as an image.
    """
    for data in encoded_pictures(split):
        yield None if data is None else _framed(data, frame)


def encoded_pictures(split: RawSplit) -> Iterator[bytes | None]:
    """Read a split's images as they are.

    Args:
        split: image files by path, or encoded images in a column.

    Yields:
        A file's bytes per row; None for what is not there.
    """
    name = picture_column(split.table)
    assert name is not None
    for value in split.table.column(name).to_pylist():
        if name == FILE:
            try:
                yield Path(value).read_bytes()
            except OSError:
                yield None
        else:
            yield value.get("bytes") if isinstance(value, dict) else value


def _framed(data: bytes, frame: Frame) -> bytes | None:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("L" if frame.channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if image.size != (frame.width, frame.height):
        image = ImageOps.fit(image, (frame.width, frame.height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
