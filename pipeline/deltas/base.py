"""What a delta knows of its base, and whether a model or another delta has the same one."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from pipeline.deltas.target import Layout, Target, persistent_buffers
from pipeline.errors import ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import digest_of_digests

_DIGEST = re.compile("[0-9a-f]{64}")
SHORT = 16  # hex digits kept of a single tensor's digest: 64 bits tell tensors apart, the full digest vouches


@dataclass(frozen=True)
class Base:
    """What a delta knows of its base.

    Attributes:
        digest: ``base_digest`` of it, of all parameters or of those that the mask does not cover whole.
        values: its values at the mask, name -> [count]; None where not kept.
        buffers: its buffers; empty where not kept.
        tensors: name -> the first 16 hex digits of the tensor's digest; empty where only the digest was given.
            They name the tensor in which a wrong base differs, and tell that two deltas share a base although
            their masks cover different tensors whole.

    Raises:
        ParamsError: if the digest is none.
    """

    digest: str
    values: dict[str, Tensor] | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest):
            raise ParamsError(f"base {self.digest[:80]!r} is no digest of 64 hex digits; give base_digest(model)")

    @classmethod
    def of(cls, model: nn.Module, mask: Mask) -> "Base":
        """Take what a delta needs to know of a model that is about to be trained in place: O(k) values.

        Args:
            model: the base.
            mask: the coordinates that will be trained.

        Returns:
            Digest (without the tensors that the mask covers whole), values, buffers and digests of tensors.
        """
        source = Target(model, Layout.of(model), persistent_buffers(model))
        return cls.seen(source, mask, source.digests())

    @classmethod
    def seen(cls, source: Target, mask: Mask, digests: Mapping[str, str]) -> "Base":
        """Take the same from a target, whose digests are known.

        Returns:
            As ``of``, with the buffers that the target was asked for.
        """
        values = {name: source.read(name, mask.at(name)) for name in mask.index}
        return cls(
            digest_of_digests(digests, without=mask.whole_tensors),
            values,
            source.copied_buffers(),
            {name: found[:SHORT] for name, found in digests.items()},
        )

    def is_of(self, digests: Mapping[str, str], whole: Iterable[str]) -> bool:
        """Tell whether parameters of these digests are the base, with or without those covered ``whole``.

        Returns:
            True if so.
        """
        return self.digest in (digest_of_digests(digests), digest_of_digests(digests, without=whole))

    def difference(self, digests: Mapping[str, str], whole: Iterable[str]) -> str:
        """Say how parameters of these digests are not the base, as far as is known.

        Returns:
            The reason and what to do, for an error.
        """
        replaced = set(whole)
        wrong = [
            n for n, d in digests.items() if n not in replaced and self.tensors.get(n, d[:SHORT]) != d[:SHORT]
        ]
        where = f"tensor '{wrong[0]}' differs ({len(wrong)} of {len(digests)} do); " if wrong else ""
        found = digest_of_digests(digests, without=replaced)
        return (
            f"the model is not the delta's base: {where}expected {self.digest[:12]}, found {found[:12]}; "
            "load the base that the delta was trained from"
        )


@dataclass(frozen=True)
class Undo:
    """What a delta overwrites on one model.

    Attributes:
        values: name -> values at the delta's mask [count].
        buffers: name -> buffer, whole.
    """

    values: dict[str, Tensor]
    buffers: dict[str, Tensor]
