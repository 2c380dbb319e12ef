"""Values that a file codes against those of the delta's base, until the base is met."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.deltas import values as coding
from pipeline.deltas.prediction import Place
from pipeline.deltas.target import Layout, dtype_name
from pipeline.errors import ArtifactError
from pipeline.masks.mask import Mask
from pipeline.parameters import tensor_digest

_SECTION = "against"


class Row(NamedTuple):
    """The values of one dtype's tensors.

    Attributes:
        names: the tensors, in order.
        section: as the file has it.
        residuals: what it holds.
    """

    names: list[str]
    section: Tensor
    residuals: coding.Residuals


@dataclass(frozen=True)
class Thin:
    """The values of a delta as a file holds them: some as they are, the others coded against the base's.

    Attributes:
        where: the file, for messages.
        digest: of the delta, as the file states it.
        every: whether tensors that the mask covers whole are coded against the base too.
        ready: the values that need no base, name -> [count].
        rows: dtype -> what its section holds.
    """

    where: str
    digest: str
    every: bool
    ready: dict[str, Tensor]
    rows: dict[torch.dtype, Row]

    @property
    def names(self) -> list[str]:
        """The tensors whose values await the base."""
        return [name for row in self.rows.values() for name in row.names]

    def decode(self, mask: Mask, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decode all values.

        Args:
            mask: the delta's.
            before: the base's values at the mask, name -> [count] on the CPU; of the tensors in ``rows``.

        Returns:
            name -> [count], for every tensor of the mask's index.

        Raises:
            ArtifactError: if a section's values are none of their dtype.
        """
        found = dict(self.ready)
        for dtype, row in self.rows.items():
            try:
                flat = coding.restore(row.residuals, joined(before, row.names), places(mask, row.names))
            except ValueError as error:
                raise ArtifactError(
                    f"{self.where}: section '{section_of(dtype)}' is corrupt: {error}; make the delta again"
                ) from None
            found |= zip(row.names, flat.split([mask.count(name) for name in row.names]), strict=True)
        return {name: found[name] for name in mask.index}

    def verified(
        self, mask: Mask, base: str, buffers: Mapping[str, Tensor], before: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Decode all values and check that they have the digest that the file states.

        Returns:
            As ``decode``.

        Raises:
            ArtifactError: if they have not.
        """
        values = self.decode(mask, before)
        if content_digest(mask, base, values, buffers) != self.digest:
            raise ArtifactError(
                f"{self.where}: section '{_SECTION}' is corrupt, or the base is another: decoded with it, the "
                "values do not have the digest that the file states; make the delta again"
            )
        return values

    def refusal(self, base: str) -> str:
        """Say why the values cannot be read.

        Returns:
            The reason and what to do, for an error.
        """
        return (
            f"{self.where}: its values are coded against its base ({base[:12]}), which is needed to read them; "
            "apply it to the base, or give the base (Delta.resolve)"
        )


def section_of(dtype: torch.dtype) -> str:
    """Name the section of values that are coded against the base.

    Returns:
        Its name.
    """
    return f"{_SECTION}.{dtype_name(dtype)}"


def content_digest(mask: Mask, base: str, values: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> str:
    """Digest what a delta is: see ``Delta.digest``.

    Returns:
        64 hex digits.
    """
    state = blake2b(f"mask {mask.digest}\nbase {base}\n".encode(), digest_size=32)
    for kind, tensors in (("values", values), ("buffer", buffers)):
        for name in sorted(tensors):
            state.update(f"{kind} {name} {tensor_digest(tensors[name])}\n".encode())
    return state.hexdigest()


def joined(values: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """Join the values of tensors, which are of one dtype.

    Returns:
        [sum of counts].
    """
    return torch.cat([values[name].reshape(-1) for name in names])


def places(mask: Mask, names: list[str]) -> list[Place]:
    """Tell where the values of tensors stand.

    Returns:
        A place per name.
    """
    return [Place(mask.index.shapes[name], mask.at(name), mask.count(name)) for name in names]


def names_of(mask: Mask, layout: Layout, every: bool) -> dict[torch.dtype, list[str]]:
    """Name the tensors that may be coded against the base, by dtype.

    Args:
        mask: the delta's.
        layout: the delta's.
        every: whether those that the mask covers whole are among them. They may not where the base's digest leaves
            them out: a head drawn anew is another one in the reader's base.

    Returns:
        dtype -> names, in the order of the mask's index; of tensors that have coordinates.
    """
    names: dict[torch.dtype, list[str]] = {}
    for name in mask.index:
        if mask.count(name) and (every or not mask.whole(name)):
            names.setdefault(layout.parameters[name][0], []).append(name)
    return names
