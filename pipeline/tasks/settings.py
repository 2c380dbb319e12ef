"""What a task is made from: the attributes of ``tasks.<name>.data`` and ``tasks.<name>.model`` in params.yaml.

``pipeline.params`` has models of these shapes; so has any other object with the same attributes.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol


class DataSettings(Protocol):
    """Where the examples come from, and which columns and rows are used.

    Attributes:
        source: ``package:NAME``, a hub id (``owner/name`` or ``owner/name:config``), or a folder.
        revision: of a hub id; null is the newest.
        text: one or two columns, for text tasks.
        label: the column of labels; null is ``label``.
        limit: split -> rows to keep; null or absent keeps all.
    """

    @property
    def source(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def text(self) -> Sequence[str] | None: ...
    @property
    def label(self) -> str | None: ...
    @property
    def limit(self) -> Mapping[str, int] | None: ...


class ModelSettings(Protocol):
    """Where the base model comes from.

    Attributes:
        source: ``package:NAME``, ``builtin:NAME``, a hub id, or a folder in the hub's layout.
        revision: of a hub id; null is the newest.
        max_length: tokens, special ones included, to which texts are cut; null is the tokenizer's own.
    """

    @property
    def source(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def max_length(self) -> int | None: ...
