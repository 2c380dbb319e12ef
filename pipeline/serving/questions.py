"""The rows to be answered: where they are read from, which are complete, and what a model is given of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import DataError, unknown
from pipeline.tasks.batches import cut
from pipeline.tasks.columns import is_text
from pipeline.tasks.custom import CLASS, FILE, PICTURES, read_own
from pipeline.tasks.decode import decode
from pipeline.tasks.draws import Rows
from pipeline.tasks.image import ImageSplit
from pipeline.tasks.raw import RawSplit
from pipeline.tuning.columns import picture_column, values_in
from pipeline.tuning.manifest import ImageInput
from pipeline.tuning.pictures import Frame, pictures_of

IMAGE = "image"
"""The column of encoded images in a request."""


def read_rows(source: str, told: list[str]) -> RawSplit:
    """Read the rows to be answered, as ``fishmask tune`` reads those to learn from.

    Args:
        source: a file, a folder of images (their classes in folders or not), a folder of split files (its
            validation rows are taken), or a hub id (likewise).
        told: takes a sentence for each liberty taken.

    Returns:
        The rows.

    Raises:
        DataError: if they are not there or not readable.
    """  # noqa: DOC502 - raised by what it calls
    folder = Path(source).expanduser()
    if folder.is_dir() and (files := _pictures(folder)):
        parts = [file.relative_to(folder).parts for file in files]
        classes = [part[0] if len(part) > 1 else None for part in parts]
        table = pa.table({FILE: [str(file) for file in files], CLASS: pa.array(classes, pa.string())})
        return RawSplit(table, source)
    own = read_own(source, None, told)
    chosen = "validation" if "validation" in own.splits else "train"
    if len(own.splits) > 1:
        told.append(f"{source}: its {chosen} rows are taken")
    return own.splits[chosen]


def _pictures(folder: Path) -> list[Path]:
    if any((folder / name).is_dir() for name in ("train", "validation", "test", "val", "dev")):
        return []
    found = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in PICTURES)
    return [file for file in found if file.is_file() and not any(p.startswith(".") for p in file.parts[-2:])]


@dataclass(frozen=True)
class Texts:
    """The texts of complete rows.

    Attributes:
        columns: one string array a column, of the complete rows only.
        rows: their places in the table, ascending.
        missing: column -> rows that lack a value there, where there are any.
    """

    columns: list[pa.Array]
    rows: Rows
    missing: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, split: RawSplit, names: Sequence[str]) -> "Texts":
        """Take the texts of a table; a row is complete where every one of them holds more than blanks.

        Args:
            split: the rows.
            names: the columns to read; numbers are read as they are written.

        Returns:
            The complete rows' texts.

        Raises:
            DataError: if a column is missing or holds what is no text.
        """  # noqa: DOC502 - raised by what it calls
        held = [_texts(split, name) for name in names]
        missing = {name: count for name, texts in zip(names, held, strict=True) if (count := texts.count(None))}
        rows = [row for row, parts in enumerate(zip(*held, strict=True)) if None not in parts]
        arrays = [pa.array([texts[row] for row in rows], pa.string()) for texts in held]
        return cls(arrays, np.array(rows, dtype=np.int64), missing)


def _texts(split: RawSplit, name: str) -> list[str | None]:
    if name not in split.table.column_names:
        raise DataError(f"{split.where}: no column {unknown(name, split.table.column_names)}")
    kind = split.table.schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise DataError(f"{split.where}: column '{name}' holds {kind}; expected text")
    return [value if value is None else str(value) for value in values_in(split, name)]


@dataclass
class Pictures:
    """The images of a table, decoded a batch at a time.

    Attributes:
        rows: places of the images that could be read, known once all were.
        column: where they are.
    """

    split: RawSplit
    form: ImageInput
    batch_size: int
    rows: list[int] = field(default_factory=list)

    @property
    def column(self) -> str:
        """Where the images are; a DataError if there are none."""
        name = picture_column(self.split.table)
        if name is None:
            raise DataError(
                f"{self.split.where}: no column of encoded images; expected one, or a folder of image files"
            )
        return name

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, int]]:
        """Read, resize and normalise.

        Args:
            device: where the batches go.

        Yields:
            float32 [B, C, H, W] of the images that can be read, and how many rows are done.
        """
        table, _ = self.split.table, self.column
        frame = Frame(*self.form.shape)
        for group in cut(np.arange(table.num_rows, dtype=np.int64), self.batch_size):
            part = RawSplit(table.slice(int(group[0]), len(group)), self.split.where)
            files = dict(zip(group.tolist(), pictures_of(part, frame), strict=True))
            read = [row for row, file in files.items() if file is not None]
            self.rows += read
            if read:
                encoded = pa.table({IMAGE: pa.array([files[row] for row in read], pa.binary())})
                pixels, _ = decode(RawSplit(encoded, self.split.where), np.arange(len(read)))
                images = ImageSplit(pixels, None, self.form.mean, self.form.std)
                yield images.batch(np.arange(len(read)), device)[0], int(group[-1]) + 1


def columns_to_read(names: Sequence[str], split: RawSplit) -> list[str]:
    """Settle the columns of texts.

    Args:
        names: those that are known.
        split: the rows.

    Returns:
        Those; where none is known, ``text`` or ``prompt``, or the only column of texts.

    Raises:
        DataError: if none can be told.
    """
    if names:
        return list(names)
    texts = [field.name for field in split.table.schema if is_text(field.type)]
    usual = [name for name in ("text", "prompt") if name in texts]
    if usual or len(texts) == 1:
        return (usual or texts)[:1]
    raise DataError(
        f"{split.where}: cannot tell which column the model reads (columns of text: "
        f"{', '.join(texts) or 'none'}); add --text COLUMN, twice for pairs"
    )
