"""Resume state of a distributed run: every rank keeps its own, and all go on from the same merge.

A rank's moments and random numbers are its own and are not sent to others, so each rank writes its own file. It
keeps the last two states: a run that is killed while some ranks have saved a merge and others have not goes on
from the one before, which all have.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.distributed.collectives import Collectives
from pipeline.masks.mask import Mask
from pipeline.training.fingerprint import fingerprint
from pipeline.training.resume import Position, ResumeFile, Saved


@dataclass(eq=False)
class JointResume(ResumeFile):
    """One rank's resume file; ``bound``, ``load``, ``due`` and ``save`` are called on all ranks alike.

    Args:
        path: the file, another one for each rank; two files are made, with ``-0`` and ``-1`` in their names.
        fingerprint: as in ``ResumeFile``.
        every_s: as in ``ResumeFile``; rank 0's clock decides for all.
        wire: joins the ranks.
    """

    wire: Collectives = field(default_factory=Collectives)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [self.path.with_name(f"{self.path.stem}-{i}{self.path.suffix}") for i in (0, 1)]
        self._slots = [ResumeFile(name, self.fingerprint, self.every_s) for name in names]

    def bound(self, **things: Any) -> "JointResume":
        """Tie the files to more things that determine the run.

        Returns:
            The same files under a fingerprint of their own and of ``things``.
        """
        return JointResume(self.path, fingerprint(own=self.fingerprint, **things), self.every_s, self.wire)

    def load(self) -> tuple[Saved | None, str]:
        """Read the newest state that every rank has.

        Returns:
            The state (None on every rank where they have none in common: start anew), and a note for the user.
        """
        found = [slot.load() for slot in self._slots]
        mine = [_place(saved.position) if saved is not None else -1 for saved, _ in found]
        common: set[int] = set(mine).intersection(
            *map(set, self.wire.gather("control", torch.tensor(mine)).tolist())
        )
        newest = max(common, default=-1)
        if newest < 0:
            return None, "; ".join(note for _, note in found if note)
        chosen = mine.index(newest)
        if chosen == 1:
            self._slots.reverse()  # the next save overwrites the other one
        return found[chosen][0], ""

    def due(self) -> bool:
        """Tell whether it is time to save, by rank 0's clock."""
        return bool(self.wire.largest("control", int(self.wire.rank == 0 and super().due())))

    def save(
        self,
        position: Position,
        model: nn.Module,
        values: Tensor,
        optimizer: Optimizer | None = None,
        more: Mapping[str, Tensor] | None = None,
        mask: Mask | None = None,
    ) -> None:
        """Write this rank's state over the older of its two."""
        self._slots.reverse()
        newest = self._slots[0]
        newest.save(position, model, values, optimizer, more, mask)
        self._saved_at, self._cost = newest._saved_at, newest._cost

    def clear(self) -> None:
        """Remove this rank's files."""
        for slot in self._slots:
            slot.clear()


def _place(position: Position) -> int:
    """Order positions: by step, and the end of an epoch after its last step."""
    return (position.step << 24) + position.epoch
