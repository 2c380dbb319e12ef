"""How to ask a tuned model: its base, the columns it reads, what its outputs mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ParamsError
from pipeline.tuning.manifest import ImageInput, Tuned


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
