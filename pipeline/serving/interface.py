"""How to ask a delta: its base, the columns it reads, what its outputs mean."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.artifacts.delta_files import delta_file
from pipeline.deltas.delta import Delta
from pipeline.errors import MismatchError, ParamsError
from pipeline.tuning.manifest import DELTA, FILE, ImageInput, Tuned


@dataclass(frozen=True)
class Interface:
    """What is needed, beside base and delta, to turn rows into answers.

    Attributes:
        base: source of the base: package:, builtin:, a hub id, a folder, ...
        revision: of a hub id.
        kind: ``text``, ``image`` or ``causal``.
        classes: their names; None for regression and completions.
        text: the columns read, one or two; empty where not known, and for images.
        label: the column of labels; None where not known, or where folders are the classes.
        max_length: tokens to which texts are cut; None is the tokenizer's own limit.
        image: how images are read; None for texts.
        metric: how it is scored; None where not known.
    """

    base: str
    revision: str | None
    kind: str
    classes: list[str] | None
    text: list[str]
    label: str | None
    max_length: int | None
    image: ImageInput | None
    metric: str | None

    @property
    def objective(self) -> str:
        """``classification``, ``regression`` or ``completion``."""
        return "completion" if self.kind == "causal" else "classification" if self.classes else "regression"

    @classmethod
    def of_tuned(cls, tuned: Tuned) -> "Interface":
        """Take it from the description of a tuned folder.

        Returns:
            All of it.
        """
        return cls(
            base=tuned.base.source,
            revision=tuned.base.revision,
            kind=tuned.kind,
            classes=tuned.classes,
            text=tuned.columns.text,
            label=tuned.columns.label,
            max_length=tuned.text.max_length if tuned.text else None,
            image=tuned.image,
            metric=tuned.metric,
        )

    @classmethod
    def of_info(cls, info: Mapping[str, Any], base: str | None, where: Path) -> "Interface":
        """Take it from the provenance that a delta keeps (see ``Task.model_info``).

        Args:
            info: of the delta.
            base: its source, where given.
            where: the file, for messages.

        Returns:
            What is known: neither columns, lengths nor the metric.

        Raises:
            ParamsError: if the delta does not say what it is; of images, it never says how they are read.
        """
        source, kind, outputs = base or info.get("model"), info.get("kind"), info.get("outputs")
        if source is None:
            raise ParamsError(f"{where}: does not name its base; add --base MODEL")
        if kind not in {"text", "image", "causal"} or type(outputs) is not int:
            raise ParamsError(
                f"{where}: does not say what its outputs mean; name a folder that `fishmask tune` or "
                "`fishmask publish` wrote"
            )
        if kind == "image":
            raise ParamsError(
                f"{where}: does not say how images are read; name a folder that `fishmask tune` or "
                "`fishmask publish` wrote"
            )
        classes = info.get("classes") or ([str(number) for number in range(outputs)] if outputs > 1 else None)
        revision = info.get("revision") if source == info.get("model") else None
        return cls(str(source), revision, kind, classes, [], None, None, None, None)


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
