"""The folder of a chain: its files read as one consistent whole, written one at a time by one process."""

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pipeline.deltas import chain_base
from pipeline.deltas import steps as forms
from pipeline.deltas.chain_base import Root
from pipeline.deltas.overlay import Patch
from pipeline.deltas.steps import Step
from pipeline.deltas.target import Target
from pipeline.errors import ArtifactError, BusyError, ParamsError, StorageError
from pipeline.masks.mask import Mask
from pipeline.runtime.atomic import remove_file


class Folder:
    """The files of a chain.

    Foreign files and the leftovers of a killed writer are passed over; the next writer removes the leftovers.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        root: what the base's file says.
        steps: number -> step, oldest first. Each follows one that is there, or the base.

    Raises:
        ArtifactError: if a file is missing, corrupt, foreign, or of another chain; names it.
    """  # noqa: DOC502 - raised by refresh

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root: Root
        self.steps: dict[int, Step] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        self._mask: Mask | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read the headers of all files that are new or changed, and check that they belong together.

        Raises:
            ArtifactError: if they do not.
        """
        before, self._stamps = self._stamps, self._stamp()
        if chain_base.FILE not in self._stamps:
            raise ArtifactError(
                f"{self.path}: holds no chain: {chain_base.FILE} is missing; name a chain's folder"
            )
        changed = {name for name, stamp in self._stamps.items() if before.get(name) != stamp}
        if chain_base.FILE in changed:
            self.root = chain_base.read(self.path / chain_base.FILE)
        known, self.steps = self.steps, {}
        states, masks = {0: self.root.state}, set()
        for number in sorted(filter(None, map(forms.number_of, self._stamps))):
            name = forms.step_file(number)
            step = forms.read_step(self.path / name) if name in changed else known[number]
            if step.after not in states:
                raise ArtifactError(
                    f"{self.path / forms.step_file(step.after)}: is missing, and step {number} follows it; bring "
                    f"it back, or remove step {number} and all that follow"
                )
            if step.parent != states[step.after]:
                raise ArtifactError(
                    f"{self.path / name}: does not start from the state of step {step.after} that is here; bring "
                    "together the files of one chain"
                )
            states[number] = step.state
            coordinates = 0 if step.mask in masks else self._size(forms.mask_file(step.mask), number)
            masks.add(step.mask)
            self.steps[number] = replace(step, nbytes=step.nbytes | {"coordinates": coordinates})

    def mask(self, digest: str) -> Mask:
        """Read a mask, or take it from memory where it is the one read last.

        Returns:
            The mask.

        Raises:
            ArtifactError: if its file is no sound mask, or another one.
        """
        if self._mask is None or self._mask.digest != digest:
            path = self.path / forms.mask_file(digest)
            self._mask = Mask.load(path)
            if self._mask.digest != digest:
                raise ArtifactError(f"{path}: is another mask than a step of the chain needs; bring back its own")
        return self._mask

    def read(self, step: Step, base: Target | None) -> tuple[Patch, dict[str, Tensor]]:
        """Read a step's values and buffers.

        Args:
            step: which.
            base: the base's values, where its file has them.

        Returns:
            The patch, and the buffers by name.
        """
        path = self.path / forms.step_file(step.number)
        return forms.read_content(path, step, self.mask(step.mask), self.root, base)

    def write(
        self,
        step: Step,
        mask: Mask,
        values: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        base: Target | None,
    ) -> None:
        """Write a step: its mask first where no file has it, then the step's file, by which it comes to be.

        Args:
            step: what its file is to say.
            mask: its mask.
            values: name -> [count] for the tensors that have coordinates.
            buffers: those that changed.
            base: the base's values, where its file has them.
        """
        path = self.path / forms.mask_file(mask.digest)
        if not path.exists():
            mask.save(path)
        else:
            self.mask(mask.digest)  # a damaged file is noticed now, and not when the step is needed
        self._mask = mask
        forms.write_step(self.path / forms.step_file(step.number), step, mask, values, buffers, base)

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove steps, the newest first, so that none is left that follows one that is gone."""
        for number in sorted(numbers, reverse=True):
            remove_file(self.path / forms.step_file(number))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder for writing; read it again afterwards, whether that went well or not.

        Yields:
            None, while no other process can write.

        Raises:
            BusyError: if another process writes, or wrote since the folder was read.
        """
        with _locked(self.path):
            if self._stamp() != self._stamps:
                raise BusyError(
                    f"{self.path}: another process changed the chain since it was opened; open it again"
                )
            try:
                yield
            finally:
                self.refresh()
                self._clean()

    def _clean(self) -> None:
        """Remove the leftovers of killed writers, and masks that no step has."""
        needed = {forms.mask_file(step.mask) for step in self.steps.values()}
        for name in sorted(os.listdir(self.path)):
            if forms.LEFTOVER.fullmatch(name) or (forms.MASK_FILE.fullmatch(name) and name not in needed):
                remove_file(self.path / name)

    def _size(self, name: str, number: int) -> int:
        """Size of a mask's file that a step needs."""
        try:
            return (self.path / name).stat().st_size
        except OSError:
            raise ArtifactError(
                f"{self.path / name}: is missing, and step {number} needs it; bring it back"
            ) from None

    def _stamp(self) -> dict[str, tuple[int, int]]:
        """Tell the base's and the steps' files apart from any that were or will be there."""
        try:
            with os.scandir(self.path) as entries:
                found = {e.name: e.stat() for e in entries if forms.is_part(e.name)}
        except OSError as error:
            raise ArtifactError(f"{self.path}: is no folder of a chain: {error.strerror}") from None
        return {name: (about.st_ino, about.st_mtime_ns) for name, about in found.items()}


@contextmanager
def starting(path: Path) -> Iterator[Path]:
    """Make a folder for a chain, and hold it.

    Yields:
        Where its base goes.

    Raises:
        ParamsError: if it holds a chain already.
        StorageError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be made: {error.strerror}; choose another folder") from None
    with _locked(path):
        taken = sorted(name for name in os.listdir(path) if forms.is_part(name))
        if taken:
            raise ParamsError(f"{path}: holds a chain already ({taken[0]}); open it, or choose another folder")
        yield path / chain_base.FILE


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a folder against other writers; the kernel lets go with the process, and no lock file is left."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"{path}: cannot be locked: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{path}: another process is writing this chain; wait for it, or end it") from None
        except OSError as error:
            raise StorageError(f"{path}: cannot be locked: {error.strerror}; choose another file system") from None
        yield
    finally:
        os.close(handle)
