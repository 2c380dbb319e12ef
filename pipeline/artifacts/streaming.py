"""A checkpoint seen through a delta: what ``deltas.target`` is for a module, one tensor in memory at a time."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from pipeline.artifacts.checkpoints import Checkpoint
from pipeline.deltas.delta import Delta
from pipeline.deltas.target import dtype_name, same_bits
from pipeline.errors import MismatchError
from pipeline.parameters import put_, take, tensor_digest

Writes = Mapping[str, tuple[Tensor | None, Tensor]]


class Streamed(Mapping[str, Tensor]):
    """The tensors of a checkpoint under a delta's names and in its dtypes, each read on access.

    Half-precision checkpoints are commonly trained in fp32, and the other way round: floats are converted as
    loading the model in the delta's dtypes does. Whether that is what the delta was trained from, the base's
    digest tells.

    Args:
        checkpoint: as opened.
        delta: whose names, shapes and dtypes it is to have.

    Attributes:
        checkpoint: under the delta's names.
        copies: parameter -> all its names in the checkpoint: several for a tied weight, none where it is lacking.
        dtypes: name -> the delta's dtype, where the checkpoint has another.

    Raises:
        MismatchError: if a tensor is of another shape, or of a dtype that is not converted.
    """

    def __init__(self, checkpoint: Checkpoint, delta: Delta) -> None:
        layout = delta.layout
        self.checkpoint = checkpoint.named_like([*layout.parameters, *layout.ties, *delta.buffers])
        self.copies = {name: [name] * (name in self.checkpoint) for name in layout.parameters}
        for alias, name in layout.ties.items():
            self.copies[name] += [alias] * (alias in self.checkpoint)
        self.dtypes: dict[str, torch.dtype] = {}
        for name, (dtype, shape) in layout.parameters.items():
            for copy in self.copies[name]:
                self._check(f"tensor '{name}'", copy, dtype, shape)
        for name, buffer in delta.buffers.items():
            if name in self.checkpoint:
                self._check(f"buffer '{name}'", name, buffer.dtype, tuple(buffer.shape))

    def _check(self, what: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        entry = self.checkpoint.entries[name]
        if entry.shape != shape:
            where = self.checkpoint.where
            raise MismatchError(f"{what} is {list(entry.shape)} in {where} and {list(shape)} in the delta")
        if entry.dtype != dtype:
            if not (dtype.is_floating_point and entry.dtype.is_floating_point):
                forms = (
                    f"{dtype_name(entry.dtype)} in {self.checkpoint.where} and {dtype_name(dtype)} in the delta"
                )
                raise MismatchError(f"{what} is {forms}; only floats are converted")
            self.dtypes[name] = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint[name].to(self.dtypes.get(name, self.checkpoint.entries[name].dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint

    @property
    def lacking(self) -> list[str]:
        """The parameters that the checkpoint does not have."""
        return [name for name, copies in self.copies.items() if not copies]

    def read(self, name: str, at: Tensor | None) -> Tensor:
        """Copy the values of a parameter at coordinates (None: all).

        Returns:
            [count].
        """
        return take(self[self.copies[name][0]], at)

    def digests(self, replaced: Writes | None = None) -> dict[str, str]:
        """Digest every parameter that is there, as it is or as it would be with other values.

        Args:
            replaced: name -> coordinates (None: all) and values [count].

        Returns:
            name -> ``tensor_digest``.

        Raises:
            MismatchError: if it holds two versions of a tied weight.
        """
        found: dict[str, str] = {}
        first = {copy: name for name, copies in self.copies.items() for copy in copies}
        for copy in self.checkpoint:  # file by file
            name = first.get(copy)
            if name is None:
                continue
            tensor = self[copy]
            if replaced and name in replaced:
                tensor = tensor.clone()
                put_(tensor, *replaced[name])
            digest = tensor_digest(tensor)
            if found.setdefault(name, digest) != digest:
                raise MismatchError(
                    f"tied tensor '{name}' has different values under its several names in {self.checkpoint.where}"
                )
        return found

    def unlike(self, delta: Delta) -> str | None:
        """Name the first tensor or buffer that does not hold the delta's values.

        Returns:
            For a message; None if all do.
        """
        for name, values in delta.values.items():
            for copy in self.copies[name] if values.numel() else ():
                if not same_bits(take(self[copy], delta.at(name)), values):
                    return f"tensor '{name}'"
        for name, buffer in delta.buffers.items():
            if name not in self or not same_bits(self[name], buffer):
                return f"buffer '{name}'"
        return None

    def spread(self, values: Mapping[str, Tensor], delta: Delta) -> dict[str, tuple[Tensor | None, Tensor]]:
        """Prepare writing values at a delta's mask, tied weights under all of their names.

        Returns:
            Names of the checkpoint -> coordinates and values.
        """
        return {
            copy: (delta.at(name), part)
            for name, part in values.items()
            if part.numel()
            for copy in self.copies[name]
        }

    def without(self, names: Iterable[str]) -> set[str]:
        """Find the tensors of the checkpoint that hold some parameters.

        Returns:
            Their names.
        """
        return {copy for name in names for copy in self.copies[name]}
