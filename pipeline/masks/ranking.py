"""Ranking: the top of all scores, enough to cut the mask of every smaller density from."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from pipeline import files
from pipeline.errors import ArtifactError, ParamsError
from pipeline.masks.budget import budget, split_budget
from pipeline.masks.mask import Mask
from pipeline.masks.topk import top_coordinates
from pipeline.parameters import ParameterIndex, tensor_bytes

FORMAT = "fishmask-ranking"
VERSION = 1
_SCORES = "scores"


class Ranking:
    """The top ``keep`` of all scores, the head treated like any tensor, so that any head can be cut later.

    Attributes:
        mask: the coordinates kept, exactly floor(keep · n).
        scores: name -> fp32 [count], the score of each kept coordinate.
        keep: the largest density that can be cut.
        always: the head's module names that ``cut`` takes unless told otherwise.
        summary: name -> ``sum`` and ``max`` over all scores of the tensor, ``count`` of those kept.
    """

    def __init__(
        self,
        mask: Mask,
        scores: Mapping[str, Tensor],
        keep: float,
        always: Sequence[str],
        summary: Mapping[str, Mapping[str, float]],
    ) -> None:
        self.mask = mask
        self.scores = dict(scores)
        self.keep = keep
        self.always = list(always)
        self.summary = {name: dict(row) for name, row in summary.items()}

    @classmethod
    def of(
        cls,
        scores: Mapping[str, Tensor],
        keep: float = 0.1,
        always: Sequence[str] = (),
        info: Mapping[str, Any] | None = None,
    ) -> "Ranking":
        """Rank scores and keep the top.

        Args:
            scores: name -> finite non-negative floats shaped like the parameter, in flat order, on any device;
                float64 is rounded to fp32 before it is ranked.
            keep: the fraction of all coordinates to keep, in (0, 1].
            always: the head's module names.
            info: provenance (JSON-able), handed on to every mask.

        Returns:
            The ranking.

        Raises:
            ParamsError: if a score is NaN, infinite or negative, or keep is out of range.
            MismatchError: if a module name in ``always`` matches nothing.
        """  # noqa: DOC502 - raised by what it calls
        flat = {name: s.float() if s.dtype == torch.float64 else s for name, s in scores.items()}
        mask = Mask.top_k(flat, keep, info=info)
        mask.index.within(always)
        summary = {
            name: {
                "sum": float(s.sum(dtype=torch.float64)) if s.device.type != "mps" else float(s.sum()),
                "max": float(s.max()) if s.numel() else 0.0,
                "count": mask.count(name),
            }
            for name, s in flat.items()
        }
        kept = {name: _taken(s, mask, name) for name, s in flat.items()}
        return cls(mask, kept, float(keep), always, summary)

    @property
    def index(self) -> ParameterIndex:
        """The parameters of the network."""
        return self.mask.index

    @property
    def nnz(self) -> int:
        """How many coordinates are kept."""
        return self.mask.nnz

    @property
    def info(self) -> dict[str, Any]:
        """Provenance."""
        return self.mask.info

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-256 (hex) over the kept coordinates and their scores."""
        state = blake2b(self.mask.digest.encode(), digest_size=32)
        for name in sorted(self.scores):
            state.update(tensor_bytes(self.scores[name]))
        return state.hexdigest()

    def cut(self, density: float, always: Sequence[str] | None = None) -> Mask:
        """Cut the mask of one density: the same as ``Mask.top_k`` on all scores.

        Among coordinates outside the head, the largest k - head of all scores are among the largest k, whatever
        the head; so the ranking holds them whenever k is no more than it keeps.

        Args:
            density: chosen / all, at most ``keep``, head included.
            always: the head's module names; None: those the ranking was made with.

        Returns:
            The mask, with the ranking's provenance, its digest as ``parent``, and the density.

        Raises:
            ParamsError: if the density is above ``keep``, out of range, or smaller than the head.
            MismatchError: if a module name matches nothing.
        """  # noqa: DOC502 - raised by split_budget
        if budget(density, self.index.total) > self.nnz:
            raise ParamsError(
                f"density {density} is above the {self.keep} that the ranking keeps; score with more"
            )
        head, rest = split_budget(self.index, density, self.always if always is None else always)
        outside = {name: score for name, score in self.scores.items() if name not in head}
        # The kept scores stand in the order of their coordinates, so that ties fall as they do among all scores.
        places = top_coordinates(outside, rest)
        chosen = {name: self.mask.indices[name][place] for name, place in places.items() if place.numel()}
        about = {**self.info, "density": float(density), "parent": self.digest}
        return Mask.covering(self.index, head, chosen, about)

    def save(self, path: str | PathLike[str]) -> int:
        """Write the ranking, atomically.

        Returns:
            The file's size in bytes.

        Raises:
            StorageError: if the file cannot be written.
        """  # noqa: DOC502 - raised by files
        meta = {
            "digest": self.digest,
            "keep": self.keep,
            "always": self.always,
            "summary": self.summary,
            "info": self.info,
        }
        scores = torch.cat([torch.empty(0), *(self.scores[name] for name in self.index)])
        sections = {**self.mask.pack(compact=False), _SCORES: scores}
        return files.write_file(path, format=FORMAT, version=VERSION, meta=meta, sections=sections)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Ranking":
        """Read a ranking and verify all of it.

        Returns:
            The ranking.

        Raises:
            ArtifactError: if the file is missing, corrupt, no ranking, or of a newer version.
        """
        meta, sections = files.read_file(path, format=FORMAT, version=VERSION)
        mask = Mask.unpack(sections, str(path), meta.get("info"))
        flat = sections.get(_SCORES, torch.empty(0))
        if flat.dtype != torch.float32 or flat.shape != (mask.nnz,):
            raise ArtifactError(f"{path}: section '{_SCORES}' is corrupt: expected {mask.nnz} fp32 scores")
        scores = dict(zip(mask.index, flat.split([mask.count(name) for name in mask.index]), strict=True))
        try:
            keep, always, summary = float(meta["keep"]), list(meta["always"]), dict(meta["summary"])
            ranking = cls(mask, scores, keep, always, summary)
        except (KeyError, TypeError, ValueError):
            raise ArtifactError(
                f"{path}: section 'header' is corrupt: keep, always or summary is missing"
            ) from None
        if meta.get("digest") != ranking.digest:
            raise ArtifactError(f"{path}: section '{_SCORES}' is corrupt: it is not the ranking the header names")
        return ranking


def _taken(scores: Tensor, mask: Mask, name: str) -> Tensor:
    """Take the scores at a tensor's coordinates: fp32 [count] on the CPU."""
    flat = scores.detach().reshape(-1)
    if not mask.whole(name):
        flat = flat[mask.indices[name].to(flat.device)]
    return flat.to("cpu", torch.float32, copy=True)
