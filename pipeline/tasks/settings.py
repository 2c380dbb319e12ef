"""What a task is made from: the attributes of ``tasks.<name>.data`` and ``tasks.<name>.model`` in params.yaml.

``pipeline.params`` has models of these shapes; so has any other object with the same attributes.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol


class DataSettings(Protocol):
    """Where the examples come from, and which columns and rows are used."""

    @property
    def source(self) -> str:
        """``package:NAME``, a hub id (``owner/name`` or ``owner/name:config``), or a folder."""

    @property
    def revision(self) -> str | None:
        """Revision of a hub id; null is the newest."""

    @property
    def text(self) -> Sequence[str] | None:
        """One or two columns, for text tasks; null is the published data set's, or ``text``."""

    @property
    def label(self) -> str | None:
        """The column of labels; null is the published data set's, or ``label``."""

    @property
    def limit(self) -> Mapping[str, int] | None:
        """Split -> rows to keep; null or absent keeps all."""


class ModelSettings(Protocol):
    """Where the base model comes from."""

    @property
    def source(self) -> str:
        """``package:NAME``, ``builtin:NAME``, a hub id, or a folder in the hub's layout."""

    @property
    def revision(self) -> str | None:
        """Revision of a hub id; null is the newest."""

    @property
    def max_length(self) -> int | None:
        """Tokens, special ones included, to which texts are cut; null is the tokenizer's own limit."""
