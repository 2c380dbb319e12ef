"""Chain: the checkpoints of a run as one base and a sparse step each time; any of them restored bit for bit.

A step holds the values at its mask, themselves and not differences, and the buffers that changed; so a state is
the base overwritten once, each coordinate by the last step that wrote it (overlay.py, states.py), however many
steps there are. The files (steps.py, folder.py) tell all of a chain. An append is one file put in place whole. At
every moment of a squash or a prune the folder holds a sound chain as well: a step is restored along the steps that
it follows, and files are removed last, the newest first.
"""

import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import files
from pipeline.deltas import chain_base
from pipeline.deltas.appending import Writer
from pipeline.deltas.base import Base
from pipeline.deltas.delta import Delta
from pipeline.deltas.folder import starting
from pipeline.deltas.states import States
from pipeline.deltas.steps import Step
from pipeline.deltas.target import Layout, Model, Target, persistent_buffers, write_all
from pipeline.errors import ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import tensor_digest


class Chain:
    """A run's checkpoints: a base, then steps of the coordinates that were trained since the step before.

    Build one with ``Chain.create`` or ``Chain.open``. Steps are numbered from 1 and keep their numbers when others
    are squashed or pruned; 0 is the base. Where a step is asked for, -1 is the newest, -2 the one before.

    Args:
        folder: of an existing chain.
        base: as in ``Chain.open``.
    """

    def __init__(self, folder: Path, base: Model | None) -> None:
        self._states = States(folder, base)
        self._folder = self._states.folder
        self._writer = Writer(self._states)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module,
        *,
        keep_base: bool = True,
        info: Mapping[str, Any] | None = None,
    ) -> "Chain":
        """Start a chain at a model as it is now.

        Args:
            folder: made if missing; must hold no chain.
            model: the base, not yet trained.
            keep_base: False stores digests instead of the parameters' values, for a base that can be had again (a
                published model). This object then keeps a copy in memory; ``open`` takes the base again.
            info: provenance (JSON-able). With ``Task.model_info`` and the seed in it, ``fishmask checkpoint
                restore`` writes whole model folders.

        Returns:
            The chain, without a step.

        Raises:
            ParamsError: if the folder holds a chain already.
            StorageError: if it cannot be written.
        """  # noqa: DOC502 - raised by what it calls
        about = files.plain_json(info or {}, "info of a chain")
        with starting(Path(folder)) as path:
            layout, buffers = Layout.of(model), persistent_buffers(model)
            target = Target(model, layout, buffers)
            digests = target.digests() | {name: tensor_digest(buffer) for name, buffer in buffers.items()}
            values = {name: tensor.detach().to("cpu") for name, tensor in target.parameters.items()}
            chain_base.write(path, layout, values if keep_base else {}, buffers, digests, about)
        return cls(Path(folder), None if keep_base else {name: tensor.clone() for name, tensor in values.items()})

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, base: Model | None = None) -> "Chain":
        """Open a chain. The headers of all files are verified; what they hold is verified when it is read.

        Args:
            folder: the chain's.
            base: the base's parameters, a module or a state dict that does not change meanwhile, where the chain
                was created without ``keep_base``. Restoring onto the base itself does without.

        Returns:
            The chain.

        Raises:
            ArtifactError: if a file is missing, corrupt, foreign, or of another chain; names it.
            MismatchError: if ``base`` is not the base.
        """  # noqa: DOC502 - raised by what it calls
        return cls(Path(folder), base)

    def __len__(self) -> int:
        return len(self._folder.steps)

    def __repr__(self) -> str:
        return f"Chain({str(self._folder.path)!r}, {len(self)} steps, {self.nbytes} of {self.dense_nbytes} bytes)"

    @property
    def steps(self) -> list[Step]:
        """The steps, oldest first, each with its bytes on disk."""
        return list(self._folder.steps.values())

    @property
    def info(self) -> dict[str, Any]:
        """The chain's provenance."""
        return self._folder.root.info

    @property
    def layout(self) -> Layout:
        """Names, dtypes and shapes of all parameters."""
        return self._folder.root.layout

    @property
    def keeps_base(self) -> bool:
        """Whether the folder holds the base's parameters."""
        return self._folder.root.keeps_values

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the chain, its base included."""
        return self._folder.root.nbytes + sum(sum(step.nbytes.values()) for step in self.steps)

    @property
    def state_nbytes(self) -> int:
        """Bytes of the parameters and buffers of one state: what a dense checkpoint holds at least."""
        root = self._folder.root
        tensors = (*root.layout.parameters.values(), *root.buffers.values())
        return sum(prod(shape) * dtype.itemsize for dtype, shape in tensors)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of dense checkpoints of the same states; the base counts where the chain keeps it."""
        return self.state_nbytes * (len(self) + self.keeps_base)

    def append(self, model: nn.Module, mask: Mask, *, info: Mapping[str, Any] | None = None) -> Step:
        """Add the model's state as a step, after checking that nothing outside the mask changed since the newest.

        This compares the model with the base's file and the steps, and digests the tensors that have coordinates.

        Args:
            model: the trained model, its values written back.
            mask: all coordinates that may have changed since the newest step.
            info: free (JSON-able): epoch, metrics.

        Returns:
            The step.

        Raises:
            MismatchError: if the model or the mask is of another network, or a tensor changed outside the mask.
            ParamsError: if the base's values are not at hand.
            BusyError: if another process writes the chain.
            StorageError: if the step cannot be written; the chain is as it was.
        """  # noqa: DOC502 - raised by what it calls
        about = files.plain_json(info or {}, "info of a step")
        self._writer.append(model, mask, about)
        return self.steps[-1]

    def digest(self, step: int = -1) -> str:
        """Tell the digest of a state.

        Args:
            step: which.

        Returns:
            The digest of all its parameters and buffers.

        Raises:
            ParamsError: if there is no such step.
        """  # noqa: DOC502 - raised by what it calls
        return self._states.digest(self._states.lineage(step))

    def state(self, step: int = -1, *, copy: bool = True) -> dict[str, Tensor]:
        """Read a state.

        Args:
            step: which.
            copy: False saves memory: what the step did not change is the base's, mapped from its file, and must
                not be written on.

        Returns:
            Every parameter (a tied weight under its first name) and persistent buffer, on the CPU.

        Raises:
            ParamsError: if there is no such step, or the base's values are not at hand.
            ArtifactError: if a file is corrupt; names it.
        """  # noqa: DOC502 - raised by what it calls
        parameters, buffers = self._states.read(self._states.lineage(step), self._states.source)
        return {name: tensor.detach().to("cpu", copy=copy) for name, tensor in {**parameters, **buffers}.items()}

    def restore_(self, model: Model, step: int = -1) -> None:
        """Turn a model into a state, bit for bit, all or nothing: the result is digested before the first write.

        What the model holds does not matter. Only where the base's values are not at hand, the model's own serve:
        it must hold the base, or a state that differs from it at no other coordinates than the one asked for.

        Args:
            model: a module (plain, compiled, data-parallel) or a state dict, on any device.
            step: which.

        Raises:
            ParamsError: if there is no such step.
            MismatchError: if the model is of another network, or does not hold the base where it must.
            ArtifactError: if a file is corrupt; names it.
        """  # noqa: DOC502 - raised by what it calls
        target = self._states.target(model)
        parameters, buffers = self._states.read(self._states.lineage(step), self._states.base or target)
        writes = [
            write
            for name, tensor in parameters.items()
            if tensor is not target.parameters[name] or target.copies[name]
            for write in target.writes(name, None, tensor.detach().reshape(-1))
        ]
        write_all([*writes, *target.buffer_writes(buffers)])

    def delta(self, step: int = -1, *, keep_base: bool = False) -> Delta:
        """Take a state as a delta of the base, so that it can be applied, reverted, swapped and exported.

        Args:
            step: which.
            keep_base: store the base's values too.

        Returns:
            The delta, its ``parent`` the digest of the state.

        Raises:
            ParamsError: if there is no such step, or ``keep_base`` is asked for and the base's values are not at
                hand.
            ArtifactError: if a file is corrupt; names it.
        """  # noqa: DOC502 - raised by what it calls
        states, layout = self._states, self._folder.root.layout
        lineage = states.lineage(step)
        if states.base is not None:
            states.read(lineage, states.base)  # which checks it
        patch, changed = states.overlay(lineage)
        mask = states.mask(patch, lineage)
        known = states.known(without=mask.whole_tensors)
        if keep_base:
            parameters, buffers = states.read([], states.source)
            source = Target(parameters, layout, {})
            before = {name: source.read(name, mask.at(name)) for name in mask.index}
            known = Base(known.digest, before, {n: b.clone() for n, b in buffers.items()}, known.tensors)
        values = {
            n: patch[n][1] if n in patch else torch.empty(0, dtype=layout.parameters[n][0]) for n in mask.index
        }
        held = {name: tensor.clone() for name, tensor in (states.buffers | changed).items()}
        about = self.info | (lineage[-1].info if lineage else {})
        about |= {"parent": states.digest(lineage), "step": lineage[-1].number if lineage else 0}
        return Delta(mask, values, held, known, layout, about)

    def squash(self, first: int, last: int) -> None:
        """Join steps ``first`` to ``last`` into one, which keeps the number of the last; the states between go.

        Args:
            first: the first step of the range, there or not: a squash that was cut short can be done again.
            last: the last, which must be there; it and all later steps restore as before.

        Raises:
            ParamsError: if there is no such step, or the first comes after the last.
            BusyError: if another process writes the chain.
        """  # noqa: DOC502 - raised by what it calls
        if not 0 < first <= last or last not in self._folder.steps:
            have = ", ".join(map(str, self._folder.steps)) or "none"
            raise ParamsError(f"{self._folder.path}: has no steps {first} to {last} to join; it has {have}")
        self.prune([number for number in self._folder.steps if not first <= number < last])

    def prune(self, keep: int | Iterable[int]) -> None:
        """Drop steps; those kept restore as before, since each takes over what it needs of the dropped ones.

        Nothing is removed before the kept steps were read back from their new files and verified.

        Args:
            keep: how many of the newest to keep, from 1; or the numbers of the steps to keep.

        Raises:
            ParamsError: if there is nothing to keep, or no such step.
            BusyError: if another process writes the chain.
        """  # noqa: DOC502 - raised by what it calls
        have = list(self._folder.steps)
        wanted = have[-keep:] if isinstance(keep, int) and keep > 0 else [] if isinstance(keep, int) else keep
        kept = sorted({self._states.lineage(number)[-1].number for number in wanted if number})
        if not kept:
            raise ParamsError(f"{self._folder.path}: a prune must keep at least one step that there is")
        with self._folder.writing():
            for number in kept:
                lineage = self._states.lineage(number)
                start = max((i + 1 for i, step in enumerate(lineage[:-1]) if step.number in kept), default=0)
                self._writer.join(lineage[start:])
            self._folder.refresh()
            if self._states.base:
                for number in kept:
                    self._states.read(self._states.lineage(number), self._states.base)
            self._folder.remove(number for number in have if number not in kept)

    def verify(self) -> None:
        """Read every file, and restore every state in memory.

        Raises:
            ParamsError: if the base's values are not at hand.
            ArtifactError: if a file is corrupt, or a step does not restore to the state it was taken of.
        """  # noqa: DOC502 - raised by what it calls
        self._states.check_base()
        for step in self.steps:
            self._states.step(step)
            self._states.read(self._states.lineage(step.number), self._states.source)
