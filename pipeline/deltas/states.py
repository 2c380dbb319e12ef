"""The states of a chain: each put together from the base and the last writers, and verified by its digest."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from safetensors import safe_open
from torch import Tensor, nn

from pipeline import files
from pipeline.deltas import chain_base
from pipeline.deltas.base import SHORT, Base
from pipeline.deltas.folder import Folder
from pipeline.deltas.overlay import Patch, mask_of, merge
from pipeline.deltas.steps import Step
from pipeline.deltas.target import Model, Target, persistent_buffers
from pipeline.errors import ArtifactError, MismatchError, ParamsError
from pipeline.masks.mask import Mask
from pipeline.parameters import ParameterIndex, digest_of_digests, tensor_digest

State = tuple[dict[str, Tensor], dict[str, Tensor]]  # parameters and buffers by name


class States:
    """Reads the states of the chain in a folder.

    Args:
        path: the folder.
        base: the base's parameters, where the chain does not keep them; they must not change meanwhile.

    Attributes:
        folder: the chain's files.
        base: the base's parameters; None where they are not at hand.
        buffers: the base's buffers.

    Raises:
        ArtifactError: if the files are no sound chain.
        MismatchError: if ``base`` is not the base.
    """

    def __init__(self, path: Path, base: Model | None) -> None:
        self.folder = Folder(path)
        root, file = self.folder.root, path / chain_base.FILE
        with safe_open(file, framework="pt") as opened:  # mapped, not read; a state's digest vouches for the bytes
            held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        self.buffers: dict[str, Tensor] = {name: held[name] for name in root.buffers}
        self.base: Target | None = None
        if root.keeps_values:
            try:
                self.base = Target(held, root.layout, {})
            except MismatchError as error:
                raise ArtifactError(f"{file}: does not hold the tensors that it names: {error}") from None
        elif base is not None:
            self.base = Target(base, root.layout, {})
            found = self.base.digests()
            if not self.known().is_of(found, ()):
                raise MismatchError(f"{path}: {self.known().difference(found, ())}")

    @property
    def source(self) -> Target:
        """The base's parameters.

        Raises:
            ParamsError: if they are not at hand.
        """
        if self.base is None:
            raise ParamsError(f"{self.folder.path}: holds digests of its base only; open it with base=MODEL")
        return self.base

    @property
    def stored(self) -> Target | None:
        """The base's parameters where its file has them, which steps are then coded against."""
        return self.base if self.folder.root.keeps_values else None

    def target(self, model: Model) -> Target:
        """See a model as one of the chain's network.

        Returns:
            Its parameters and buffers.

        Raises:
            MismatchError: if it is of another network.
        """
        try:
            target = Target(model, self.folder.root.layout, self.buffers)
        except MismatchError as error:
            raise MismatchError(f"{self.folder.path}: the model is of another network: {error}") from None
        extra = sorted(set(persistent_buffers(model)) - set(self.buffers)) if isinstance(model, nn.Module) else []
        if extra:
            raise MismatchError(
                f"{self.folder.path}: the model is of another network: it has a buffer '{extra[0]}'"
            )
        return target

    def known(self, without: Iterable[str] = ()) -> Base:
        """Tell what deltas know of the base.

        Args:
            without: tensors that the delta replaces whole.

        Returns:
            Its digests.
        """
        digests = {name: self.folder.root.digests[name] for name in self.folder.root.layout.parameters}
        short = {name: digest[:SHORT] for name, digest in digests.items()}
        return Base(digest_of_digests(digests, without=without), tensors=short)

    def lineage(self, step: int) -> list[Step]:
        """Follow a step back to the base.

        Args:
            step: its number; 0 for the base; -1 for the newest, -2 for the one before it.

        Returns:
            The steps that lead to it, oldest first, itself included.

        Raises:
            ParamsError: if there is no such step.
        """
        have = self.folder.steps
        numbers = [0, *have]
        number = step if step >= 0 else numbers[step] if -step <= len(numbers) else None
        if number not in numbers:
            listed = ", ".join(map(str, list(have)[:8])) + (f" ... {numbers[-1]}" if len(have) > 8 else "")
            raise ParamsError(f"{self.folder.path}: has no step {step}; it has {listed or 'no step yet'}")
        lineage = []
        while number:
            lineage.append(have[number])
            number = have[number].after
        return lineage[::-1]

    def digest(self, lineage: list[Step]) -> str:
        """Tell what the state after these steps must digest to.

        Returns:
            The digest of all its parameters and buffers.
        """
        return lineage[-1].state if lineage else self.folder.root.state

    def overlay(self, lineage: Iterable[Step]) -> tuple[Patch, dict[str, Tensor]]:
        """Join steps that follow each other: the last writers of values and of buffers.

        A step whose mask a later one has, and whose buffers later ones hold, is not read.

        Returns:
            The patch, and the buffers by name.
        """
        patches: list[Patch] = []
        buffers: dict[str, Tensor] = {}
        covered: set[str] = set()
        for step in reversed(list(lineage)):
            missing = set(step.buffers) - set(buffers)
            if step.mask in covered and not missing:
                continue
            patch, held = self.step(step)
            buffers |= {name: held[name] for name in missing}
            if step.mask not in covered:
                patches.append(patch)
            covered.add(step.mask)
        return merge(reversed(patches)), buffers

    def step(self, step: Step) -> tuple[Patch, dict[str, Tensor]]:
        """Read one step.

        Returns:
            The patch, and the buffers by name.

        Raises:
            ArtifactError: if its file is corrupt, or the base's that it is coded against.
        """
        try:
            return self.folder.read(step, self.stored)
        except ArtifactError:
            self.check_base()
            raise

    def mask(self, patch: Patch, lineage: list[Step]) -> Mask:
        """Take the coordinates of joined steps.

        Returns:
            The mask, of the parameters that the newest step's mask speaks of if those are enough, else of all.
        """
        index = ParameterIndex({name: shape for name, (_, shape) in self.folder.root.layout.parameters.items()})
        if not lineage:
            return mask_of(patch, index)
        newest = self.folder.mask(lineage[-1].mask)
        mask = mask_of(patch, newest.index if all(name in newest.index for name in patch) else index)
        return newest if mask == newest else mask  # the mask that was read has its provenance

    def read(self, lineage: list[Step], source: Target) -> State:
        """Put a state together and check its digest.

        Args:
            lineage: the steps that lead to it.
            source: what holds the base's values wherever these steps wrote nothing.

        Returns:
            Its parameters and buffers; some are the source's own tensors.
        """
        patch, changed = self.overlay(lineage)
        parameters = {name: source.changed(name, *patch.get(name, (None, None))) for name in source.parameters}
        buffers = self.buffers | changed
        digests = {name: tensor_digest(tensor) for name, tensor in {**parameters, **buffers}.items()}
        if digest_of_digests(digests) != self.digest(lineage):
            self.refuse(lineage, source, digests)
        return parameters, buffers

    def check_base(self) -> None:
        """Read the base's file, every byte of it verified; an ArtifactError names the section that is corrupt."""
        path = self.folder.path / chain_base.FILE
        files.read_file(path, format=chain_base.FORMAT, version=chain_base.VERSION)

    def refuse(self, lineage: list[Step], source: Target, digests: Mapping[str, str]) -> NoReturn:
        """Say why a state is not what it was.

        Args:
            lineage: the steps that lead to it.
            source: as in ``read``.
            digests: name -> ``tensor_digest`` as found.

        Raises:
            ArtifactError: if the files are to blame.
            MismatchError: if the source is not the base.
        """
        self.check_base()
        where = f"{self.folder.path}: step {lineage[-1].number if lineage else 0}"
        if self.folder.root.keeps_values:
            raise ArtifactError(f"{where} does not restore to the state it was taken of; restore another step")
        found = {name: digests[name] for name in self.folder.root.layout.parameters}
        raise MismatchError(
            f"{where} cannot be restored: {self.known().difference(found, self.overlay(lineage)[0])}"
        )
