"""What a delta knows of its base, and whether a model or another delta has the same one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pipeline.parameters import digest_of_digests

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
    """

    digest: str
    values: dict[str, Tensor] | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)

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
