"""Writing the steps of a chain: the next one, and one in place of several."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.deltas.overlay import Patch, merge
from pipeline.deltas.states import States
from pipeline.deltas.steps import Step
from pipeline.deltas.target import same_bits
from pipeline.errors import MismatchError
from pipeline.masks.mask import Mask
from pipeline.parameters import digest_of_digests, tensor_digest
from pipeline.training.masked import fitting_parameters


@dataclass
class _Head:
    """A state as the next append needs it: what differs from the base, and the digest of every tensor."""

    patch: Patch
    digests: dict[str, str]


class Writer:
    """Writes the steps of a chain; what the newest state is, it remembers from one append to the next.

    Args:
        states: of the chain.
    """

    def __init__(self, states: States) -> None:
        self._states = states
        self._folder = states.folder
        self._head: _Head | None = None

    def append(self, model: nn.Module, mask: Mask, info: Mapping[str, Any]) -> None:
        """Add a model's state as a step; see ``Chain.append``.

        Raises:
            MismatchError: if a tensor changed outside the mask.
        """
        fitting_parameters(model, mask)
        target = self._states.target(model)
        with self._folder.writing():
            newest = max(self._folder.steps, default=0)
            head, source = self._newest(), self._states.source
            at = {name: mask.at(name) for name in mask.index if mask.count(name)}
            patch: Patch = {name: (where, target.read(name, where)) for name, where in at.items()}
            after = merge([head.patch, patch])
            for name, tensor in target.parameters.items():
                if not same_bits(source.changed(name, *after.get(name, (None, None))), tensor):
                    self._states.check_base()
                    raise MismatchError(
                        f"{self._folder.path}: tensor '{name}' changed outside the mask since step {newest}; give "
                        "the mask of all that was trained since, or restore that step first"
                    )
            digests = head.digests | {name: tensor_digest(target.parameters[name]) for name in patch}
            digests |= {name: tensor_digest(buffer) for name, buffer in target.buffers.items()}
            buffers = {n: b for n, b in target.buffers.items() if digests[n] != head.digests[n]}
            step = Step(
                number=newest + 1,
                after=newest,
                parent=digest_of_digests(head.digests),
                state=digest_of_digests(digests),
                mask=mask.digest,
                count=mask.nnz,
                buffers=sorted(buffers),
                info=dict(info),
                joined=[],
                nbytes={},
            )
            self._write(step, mask, patch, buffers)
            self._head = _Head(after, digests)

    def _newest(self) -> _Head:
        """The newest state: remembered from the last append, or read."""
        lineage, source = self._states.lineage(-1), self._states.source
        if self._head is None or digest_of_digests(self._head.digests) != self._states.digest(lineage):
            patch, changed = self._states.overlay(lineage)
            values = {name: source.changed(name, *write) for name, write in patch.items()}
            found = {name: tensor_digest(tensor) for name, tensor in {**values, **changed}.items()}
            digests = self._folder.root.digests | found
            if digest_of_digests(digests) != self._states.digest(lineage):
                self._states.refuse(lineage, source, digests)
            self._head = _Head(patch, digests)
        return self._head

    def join(self, lineage: list[Step]) -> None:
        """Write one step in place of several that follow each other, under the number of the last."""
        if len(lineage) == 1:
            return
        patch, buffers = self._states.overlay(lineage)
        mask = self._states.mask(patch, lineage)
        first, last = lineage[0], lineage[-1]
        step = Step(
            number=last.number,
            after=first.after,
            parent=first.parent,
            state=last.state,
            mask=mask.digest,
            count=mask.nnz,
            buffers=sorted(buffers),
            info=last.info,
            joined=[state for step in lineage for state in (*step.joined, step.state)][:-1],
            nbytes={},
        )
        self._write(step, mask, patch, buffers)

    def _write(self, step: Step, mask: Mask, patch: Patch, buffers: Mapping[str, Tensor]) -> None:
        values = {name: row for name, (_, row) in patch.items()}
        self._folder.write(step, mask, values, buffers, self._states.stored)
