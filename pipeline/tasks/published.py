"""A published data set as data: what its columns are, what its classes are called, how it is scored."""

from dataclasses import dataclass
from typing import Any

from pipeline.tasks.sources import Source


@dataclass(frozen=True)
class Published:
    """What is known of a data set beforehand.

    Attributes:
        kind: ``text`` or ``image``.
        source: its hub id.
        text: its columns of text.
        label: its column of labels.
        metric: how it is scored (see ``pipeline.tasks.metrics``).
        classes: names in label order; empty for regression.
        train_rows: rows of the official train split, against which a subset is measured.
        licence: what is known of its terms.
        augment: the augmentation of its training images, if any.
    """

    kind: str
    source: str
    text: tuple[str, ...]
    label: str
    metric: str
    classes: tuple[str, ...]
    train_rows: int
    licence: str
    augment: str | None = None

    def defaults(self) -> dict[str, Any]:
        """The part of ``tasks.<name>`` in params.yaml that follows from the data set.

        Returns:
            ``kind``, ``data`` and ``metric``.
        """
        data: dict[str, Any] = {"source": self.source, "revision": None, "label": self.label}
        return {
            "kind": self.kind,
            "data": data | ({"text": list(self.text)} if self.text else {}),
            "metric": self.metric,
        }


def lookup(source: Source, task: str = "") -> Published | None:
    """What is known of a data set.

    Args:
        source: where it comes from.
        task: what it is called. A folder of a task that is called after a CIFAR is one: its images are augmented
            as the hub's are, wherever they lie.

    Returns:
        None, unless it is one of GLUE's from the hub, or a CIFAR.
    """
    from pipeline.tasks import cifar, glue

    name = f"{source.name}:{source.config}" if source.config else source.name
    known = {task.source: task for task in [*glue.TASKS.values(), *cifar.TASKS.values()]}
    if source.kind == "folder":
        return cifar.TASKS.get(task)
    return known.get(name) if source.kind == "hub" else None
