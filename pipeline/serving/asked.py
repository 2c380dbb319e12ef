"""Deltas that are to be asked, as a command names them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.artifacts.delta_files import delta_file
from pipeline.deltas.delta import Delta
from pipeline.errors import MismatchError, ParamsError
from pipeline.tuning.interface import Interface
from pipeline.tuning.manifest import DELTA, FILE, Tuned


@dataclass(frozen=True)
class Asked:
    """A delta that is to be asked.

    Attributes:
        delta: with the ``info`` that loads its base.
        interface: how to ask it.
        tuned: the description beside it, where there is one.
        file: where it was read from.
    """

    delta: Delta
    interface: Interface
    tuned: Tuned | None
    file: Path


def read_delta(path: Path, base: str | None = None) -> Asked:
    """Read a delta and what is known of how to ask it.

    Args:
        path: a delta file, or a tuned or published folder. A file beside its ``tune.json`` is as its folder.
        base: the base's source, in place of the one it names.

    Returns:
        The delta, ready to be asked.

    Raises:
        MismatchError: if the folder's delta is not the one that it describes.
        ArtifactError: if a file is damaged.
        ParamsError: if something that is needed is said nowhere.
    """  # noqa: DOC502 - the last two are raised by what it calls
    file = delta_file(path)
    delta = Delta.load(file)
    if not (file.parent / FILE).is_file():
        return Asked(delta, Interface.of_info(delta.info, base, file), None, file)
    tuned = Tuned.load(file.parent)
    if tuned.delta.digest != delta.digest:
        raise MismatchError(
            f"{file}: is not the delta that {FILE} beside it describes (expected {tuned.delta.digest[:12]}, found "
            f"{delta.digest[:12]}); copy the folder again, or move the file away from it"
        )
    interface = Interface.of_tuned(tuned)
    if base is not None and base != interface.base:
        interface = replace(interface, base=base, revision=None)
    return Asked(delta, interface, tuned, file)


def parse_deltas(texts: Sequence[str]) -> dict[str, Path]:
    """Read deltas as a command names them: ``PATH``, or ``NAME=PATH``.

    Returns:
        Name -> path; a path alone is named as its folder is, or as its file where that tells more
        (``delta.safetensors`` does not).

    Raises:
        ParamsError: if two names are alike, or one is of other characters than a file's name.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        named = equals and name and rest and not Path(text).expanduser().exists()
        path = Path(rest if named else text).expanduser()
        name = name if named else _name(path)
        if not re.fullmatch(r"[\w-][\w. -]{0,99}", name):
            raise ParamsError(
                f"--delta: the name '{name}' is not letters, digits, '_', '-' and '.'; write NAME=PATH"
            )
        if name in found:
            raise ParamsError(f"--delta: two are named '{name}'; write --delta NAME=PATH to tell them apart")
        found[name] = path
    return found


def _name(path: Path) -> str:
    file = delta_file(path)
    return file.resolve().parent.name if file.name == DELTA else file.stem
