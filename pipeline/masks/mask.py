"""Mask: the chosen coordinates of a network, sorted int64 per tensor.

Density is chosen / all trainable parameters, tied weights once, head included.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import files
from pipeline.errors import ArtifactError, ParamsError
from pipeline.masks import codec
from pipeline.masks.budget import split_budget
from pipeline.masks.coordinates import Coordinates, checked, joined, refuse_unknown
from pipeline.masks.topk import top_coordinates
from pipeline.parameters import ParameterIndex, tensor_bytes
from pipeline.runtime.canonical import plain_json

FORMAT = "fishmask-mask"
VERSION = 1


class Mask:
    """The coordinates chosen for training; immutable, equal when their digests are.

    Args:
        index: the parameters of the network.
        indices: name -> coordinates within that tensor (row-major): int64 [count], strictly increasing, on any
            device; a name left out has none chosen.
        info: provenance (JSON-able), saved with the mask and no part of its digest. Standard keys, each where it
            is known: ``base`` and ``data`` (digests of the model and of the data it was chosen for), ``model``,
            ``kind`` and ``power`` of the score, ``examples``, ``seed``, ``density``, ``method``, ``fishmask`` (the
            code's version), ``parent`` (digest of the ranking it was cut from; ``parents`` of joined masks).

    Attributes:
        index: the parameters of the network.
        info: provenance.

    Raises:
        ParamsError: if coordinates are not int64, one-dimensional and strictly increasing, or info is no JSON.
        MismatchError: if a name is not in the index, or a coordinate lies outside its tensor.
    """

    def __init__(
        self, index: ParameterIndex, indices: Mapping[str, Tensor], info: Mapping[str, Any] | None = None
    ) -> None:
        self.index = index
        self.info: dict[str, Any] = plain_json(info or {}, "info of a mask")
        self._chosen = checked(index, indices)

    @classmethod
    def covering(
        cls,
        index: ParameterIndex,
        names: Sequence[str],
        indices: Mapping[str, Tensor] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> "Mask":
        """Build a mask of whole tensors, without storing their coordinates.

        Args:
            index: the parameters.
            names: the tensors that are wholly chosen.
            indices: coordinates of further tensors, as in ``Mask``.
            info: provenance.

        Returns:
            The mask.

        Raises:
            MismatchError: if a name is not in the index.
        """  # noqa: DOC502 - raised by what it calls
        refuse_unknown(index, names)
        mask = cls(index, indices or {}, info)
        mask._chosen.update(dict.fromkeys(names))
        return mask

    @classmethod
    def from_bool(cls, flags: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> "Mask":
        """Build a mask from boolean tensors shaped like the parameters, in flat order.

        Returns:
            The mask of their true elements.

        Raises:
            ParamsError: if a tensor is not boolean.
        """
        wrong = [f"tensor '{name}' is {flag.dtype}" for name, flag in flags.items() if flag.dtype != torch.bool]
        if wrong:
            raise ParamsError(f"{wrong[0]}; expected booleans")
        index = ParameterIndex({name: flag.shape for name, flag in flags.items()})
        return cls(index, {name: flag.reshape(-1).nonzero().reshape(-1) for name, flag in flags.items()}, info)

    @classmethod
    def top_k(
        cls,
        scores: Mapping[str, Tensor],
        density: float,
        always: Sequence[str] = (),
        *,
        info: Mapping[str, Any] | None = None,
    ) -> "Mask":
        """Choose the head and the largest other scores: exactly k = floor(density · n) coordinates.

        Ties go to the lower flat coordinate. Scores are read in chunks and never concatenated; they may lie on
        any device, the mask is on the CPU. Source: "Training Neural Networks with Fixed Sparse Masks", section 3.

        Args:
            scores: name -> finite non-negative floats shaped like the parameter, in flat order.
            density: chosen / all, in (0, 1], head included.
            always: module names of the head, chosen whatever their scores.
            info: provenance.

        Returns:
            The mask.

        Raises:
            ParamsError: if a score is NaN, infinite or negative, the density is out of range, or the head alone
                is larger than the budget.
            MismatchError: if a module name in ``always`` matches nothing.
        """  # noqa: DOC502 - raised by what it calls
        index = ParameterIndex({name: score.shape for name, score in scores.items()})
        head, rest = split_budget(index, density, always)
        skip = set(head)
        chosen = top_coordinates({name: score for name, score in scores.items() if name not in skip}, rest)
        return cls.covering(index, head, chosen, info)

    @cached_property
    def indices(self) -> Coordinates:
        """Name -> sorted int64 [count] coordinates on the CPU, one entry for every tensor of the index."""
        return Coordinates(self.index, self._chosen)

    def count(self, name: str) -> int:
        """Count the chosen elements of tensor ``name``.

        Returns:
            0..numel.
        """
        coordinates = self._chosen[name]
        return self.index.numel(name) if coordinates is None else coordinates.numel()

    def whole(self, name: str) -> bool:
        """Tell whether every element of tensor ``name`` is chosen.

        Returns:
            True if so.
        """
        return self.count(name) == self.index.numel(name)

    def at(self, name: str) -> Tensor | None:
        """Find the coordinates of tensor ``name``, those of a wholly chosen one not made.

        Returns:
            int64 [count] on the CPU; None for all.
        """
        return None if self.whole(name) else self.indices[name]

    @property
    def whole_tensors(self) -> list[str]:
        """The names of the tensors that are wholly chosen, in flat order."""
        return [name for name in self.index if self.whole(name)]

    @cached_property
    def nnz(self) -> int:
        """How many coordinates are chosen."""
        return sum(self.count(name) for name in self.index)

    @property
    def density(self) -> float:
        """Chosen / all parameters; 0 where there are none."""
        return self.nnz / max(self.index.total, 1)

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-256 (hex) over sorted names, shapes and coordinates; of neither file, coder, order nor info."""
        state = blake2b(digest_size=32)
        for name, shape in sorted(self.index.shapes.items()):
            state.update(f"{len(name)} {name} {list(shape)} {self.count(name)}\n".encode())
            if not self.whole(name):
                state.update(tensor_bytes(self.indices[name]))
        return state.hexdigest()

    def to_bool(self) -> dict[str, Tensor]:
        """Expand to boolean tensors shaped like the parameters.

        Returns:
            name -> bool tensor on the CPU.
        """
        flags = {}
        for name, shape in self.index.shapes.items():
            flat = torch.zeros(self.index.numel(name), dtype=torch.bool)
            flat[self.indices[name]] = True
            flags[name] = flat.reshape(shape)
        return flags

    def save(self, path: str | PathLike[str]) -> int:
        """Write the mask, atomically, with its coordinates entropy-coded (codec.py) and its provenance.

        Returns:
            The file's size in bytes.

        Raises:
            StorageError: if the file cannot be written.
        """  # noqa: DOC502 - raised by files
        meta = {"digest": self.digest, "info": self.info, "nnz": self.nnz, "total": self.index.total}
        return files.write_file(path, format=FORMAT, version=VERSION, meta=meta, sections=self.pack())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Mask":
        """Read a mask and verify all of it: checksums, bounds, order, counts and digest.

        Returns:
            The mask.

        Raises:
            ArtifactError: if the file is missing, corrupt, no mask, or of a newer version.
        """
        meta, sections = files.read_file(path, format=FORMAT, version=VERSION)
        mask = cls.unpack(sections, str(path), meta.get("info"))
        if (meta.get("digest"), meta.get("nnz")) != (mask.digest, mask.nnz):
            raise ArtifactError(f"{path}: section 'coordinates' is corrupt: it is not the mask the header names")
        return mask

    def pack(self, *, compact: bool = True) -> dict[str, Tensor]:
        """Code the coordinates as sections of a file (a delta holds them too).

        Args:
            compact: False codes several times faster and, where coordinates cluster, larger.

        Returns:
            The uint8 sections ``tensors`` and ``coordinates``.
        """
        return codec.encode(self.index, self._chosen, compact=compact)

    @classmethod
    def unpack(cls, sections: Mapping[str, Tensor], where: str, info: Any = None) -> "Mask":
        """Rebuild a mask from the sections that ``pack`` made.

        Args:
            sections: from a file; others than the two are ignored.
            where: the file, for messages.
            info: provenance.

        Returns:
            The mask.

        Raises:
            ArtifactError: if the sections are not exactly a mask.
        """
        index, chosen = codec.decode(sections, where)
        if not isinstance(info or {}, dict):
            raise ArtifactError(f"{where}: section 'header' is corrupt: the provenance is no mapping")
        mask = cls(index, {}, info)
        for name, part in chosen.items():  # the codec vouches for order and range: no second check
            mask._chosen[name] = None if part is None or part.numel() == index.numel(name) else part
        return mask

    def __or__(self, other: "Mask") -> "Mask":
        return self._combine(other, "union", np.union1d)

    def __and__(self, other: "Mask") -> "Mask":
        return self._combine(other, "intersection", lambda a, b: np.intersect1d(a, b, assume_unique=True))

    def __sub__(self, other: "Mask") -> "Mask":
        return self._combine(other, "difference", lambda a, b: np.setdiff1d(a, b, assume_unique=True))

    def __xor__(self, other: "Mask") -> "Mask":
        return self._combine(other, "symmetric difference", lambda a, b: np.setxor1d(a, b, assume_unique=True))

    def _combine(self, other: "Mask", made: str, join: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> "Mask":
        """Join two masks of the same parameters; of their provenance, the result names the two alone."""
        about = {"made": made, "parents": [self.digest, other.digest]}
        return Mask(self.index, joined(self.indices, other.indices, join), about)

    def overlap(self, other: "Mask") -> float:
        """Measure the overlap |A∩B| / min(|A|, |B|); 1 for two empty masks.

        Returns:
            0..1.

        Raises:
            MismatchError: if the masks are of different parameters.
        """  # noqa: DOC502 - raised by what it calls
        least = min(self.nnz, other.nnz)
        return (self & other).nnz / least if least else float(self == other)

    def jaccard(self, other: "Mask") -> float:
        """Measure the Jaccard index |A∩B| / |A∪B|; 1 for two empty masks.

        Returns:
            0..1.

        Raises:
            MismatchError: if the masks are of different parameters.
        """  # noqa: DOC502 - raised by what it calls
        both = (self & other).nnz
        either = self.nnz + other.nnz - both
        return both / either if either else 1.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Mask({self.nnz} of {self.index.total}, density {self.density:.3g}, digest {self.digest[:12]})"
