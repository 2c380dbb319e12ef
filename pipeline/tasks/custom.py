"""A user's own data, as people have it: a file, a folder of splits, a folder of images by class, a hub id.

Nothing is checked here but that it is there and readable; ``pipeline.tuning.rows`` looks at the values.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.errors import DataError
from pipeline.tasks.folders import SPLITS, find_splits
from pipeline.tasks.published import Published, lookup
from pipeline.tasks.raw import RawSplit, read_hub
from pipeline.tasks.sources import data_folder, parse
from pipeline.tasks.tables import EXTENSIONS, read_table

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FILE, CLASS = "file", "class"
"""The columns of images by folder."""


@dataclass(frozen=True)
class Own:
    """What was read.

    Attributes:
        splits: train, and validation where there is one.
        pictures: whether the rows are image files (``FILE``) in folders named by their class (``CLASS``).
        revision: of a hub id, as asked for.
        published: what is known of the data set, where it is a known one.
    """

    splits: dict[str, RawSplit]
    pictures: bool = False
    revision: str | None = None
    published: Published | None = None


def read_own(train: str, validation: str | None, told: list[str], revision: str | None = None) -> Own:
    """Read a user's data from wherever it is.

    Args:
        train: a file (csv, tsv, json, jsonl, parquet; gzipped or not), a folder of such files named by split, a
            folder with a folder of images for each class, or a hub id (``owner/name`` or ``owner/name:config``).
        validation: likewise; its validation split (or else its test, or its only one) is taken. None takes the
            one that ``train`` brings along, if it does.
        told: takes a sentence for everything that was read otherwise than it stands.
        revision: of hub ids.

    Returns:
        The data; without validation where there is none.

    Raises:
        DataError: if it is not there or not readable, or one is of images and the other not.
    """
    own = _read(train, told, revision)
    if validation is None:
        return own
    other = _read(validation, told, revision)
    if own.pictures != other.pictures:
        raise DataError(f"{validation}: images by folder and a table cannot go together; expected both alike")
    judged = other.splits.get("validation", other.splits["train"])
    return Own({"train": own.splits["train"], "validation": judged}, own.pictures, revision, own.published)


def _read(name: str, told: list[str], revision: str | None) -> Own:
    path = Path(name).expanduser()
    if path.is_file():
        return Own({"train": RawSplit(read_table(path, told=told), name)})
    if path.is_dir():
        return _folder(path, told)
    source = parse(name)
    if source.kind != "hub":
        kinds = ", ".join("." + extension for extension in EXTENSIONS)
        raise DataError(
            f"{name}: no such file or folder; expected a file ({kinds}, .gz too), "
            "a folder of images by class, a folder of train and validation files, or a hub id (owner/name)"
        )
    task = (source.config or source.name).rpartition("/")[2]
    folder = data_folder(task, source)
    if folder is not None:
        return Own(_folder(folder, told).splits, published=lookup(source))
    try:
        splits = read_hub(task, source, revision, judged=False)
    except DataError as error:  # it speaks of params.yaml
        raise DataError(str(error).removeprefix(f"tasks.{task}.data.source: ")) from None
    return Own(_two(splits), revision=revision, published=lookup(source))


def _folder(folder: Path, told: list[str]) -> Own:
    pictures = {
        split: found
        for split, names in SPLITS.items()
        for name in names
        if (found := _pictures(folder / name)) is not None
    }
    if "train" not in pictures and (found := _pictures(folder)) is not None:
        pictures = {"train": found}
    if pictures:
        return Own(_two(pictures), pictures=True)
    splits = {}
    for split, files in find_splits(folder, judged=False).items():
        tables = [read_table(path, told=told) for path in files.paths]
        try:
            splits[split] = RawSplit(pa.concat_tables(tables, promote_options="default"), str(files.paths[0]))
        except pa.ArrowInvalid:
            raise DataError(f"{files.paths[0]}: its shards differ in their columns; expected the same") from None
    return Own(_two(splits))


def _two(splits: dict[str, RawSplit]) -> dict[str, RawSplit]:
    """Train and what is judged on: validation, else test."""
    judged = splits.get("validation", splits.get("test"))
    return {"train": splits["train"]} | ({} if judged is None else {"validation": judged})


def _pictures(folder: Path) -> RawSplit | None:
    """The images below a folder with a folder for each class; None where it is none."""
    if not folder.is_dir():
        return None
    files = [
        (str(file), below.name)
        for below in sorted(folder.iterdir())
        if below.is_dir() and not below.name.startswith(".")
        for file in sorted(below.rglob("*"))
        if file.suffix.lower() in PICTURES and not file.name.startswith(".") and file.is_file()
    ]
    if len({name for _, name in files}) < 2:
        return None
    paths, names = zip(*files, strict=True)
    return RawSplit(pa.table({FILE: list(paths), CLASS: list(names)}), str(folder))
