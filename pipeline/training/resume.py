"""The state of an unfinished run: saved now and then and on a signal, and put back by the next run.

A run that is killed at any moment and started again ends with the same bytes (on the CPU) as one that was never
stopped. The state lies outside DVC's outs, which are wiped before a stage runs (TRAPS D1).
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.errors import ArtifactError, MismatchError, StorageError
from pipeline.files import read_file, write_file
from pipeline.masks.mask import Mask
from pipeline.parameters import unwrapped
from pipeline.training.fingerprint import fingerprint
from pipeline.training.generators import random_state, set_random_state

FORMAT = "fishmask-resume"
VERSION = 2
_MASK = "mask."
_SHARE = 20  # of the elapsed time, saving takes one part in this many at most: 5 %


@dataclasses.dataclass
class Position:
    """Where a run stands, between two optimizer steps.

    Attributes:
        epoch: epochs finished, evaluation included.
        batch: batches used of the epoch that is under way.
        length: batches in an epoch.
        step: optimizer steps done.
        epoch_loss, epoch_examples: sum of the example losses of this epoch, and their number.
        window_loss, window_examples: the same since the loss was last logged.
        seconds: time spent in the loop, over all its lives.
        peak_memory_bytes: the most memory used, over all its lives.
        micro: examples in a micro-batch, where batches did not fit the memory; 0 for whole batches.
        history: one dict per finished epoch.
    """

    epoch: int = 0
    batch: int = 0
    length: int = 0
    step: int = 0
    epoch_loss: float = 0.0
    epoch_examples: int = 0
    window_loss: float = 0.0
    window_examples: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    micro: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a resume file held: the position, θ, buffers, optimizer state and random number generators.

    Where the mask was no longer the one that the run began with: also the mask, and all parameters, since values
    that an earlier mask trained are neither in θ nor the base's.
    """

    position: Position
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]
    mask: Mask | None = None

    @property
    def more(self) -> dict[str, Tensor]:
        """The further tensors that ``save`` was given."""
        return {n.removeprefix("more."): t for n, t in self.tensors.items() if n.startswith("more.")}

    @torch.no_grad()
    def restore(self, model: nn.Module, values: nn.Parameter, optimizer: Optimizer) -> None:
        """Put the state back; the caller writes θ into the model. All or nothing.

        Args:
            model: its buffers are overwritten.
            values: θ of the saved mask, overwritten.
            optimizer: its state is replaced; its groups' settings stay as they are.

        Raises:
            MismatchError: if θ or the buffers have other shapes or names; nothing was changed.
        """
        targets = {"theta": values.detach(), **buffers(model)}
        if self.mask is not None:
            targets |= weights(model, self.mask)
        kinds = ("theta", "buffer.", "weight.")
        saved = {name: t for name, t in self.tensors.items() if name.startswith(kinds)}
        if _signature(targets) != _signature(saved):
            raise MismatchError("the saved state does not fit the model: names, shapes or dtypes differ")
        for name, target in targets.items():
            target.copy_(saved[name])
        state: dict[int, dict[str, Any]] = {int(i): dict(rest) for i, rest in self.scalars.items()}
        for name, tensor in self.tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".", 2)
                state.setdefault(int(i), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        set_random_state(self.tensors, values.device)


@dataclasses.dataclass(eq=False)
class ResumeFile:
    """The file that holds the state of one unfinished run.

    One process at a time may use it: hold a lock around the run.

    Args:
        path: the file; its folder is made when it is first written.
        fingerprint: of everything that determines the run, see ``fingerprint``: base model, data, batch size, ....
            ``fit`` adds the recipe, the mask, the initial θ, the precision and the thread count itself. A file of
            another fingerprint is ignored and replaced.
        every_s: seconds between two saves; longer where saving takes more than 5 % of the time; 0 saves after
            every step, whatever it costs.
    """

    path: Path
    fingerprint: str
    every_s: float = 15.0

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        self._saved_at, self._cost = time.monotonic(), 0.0  # seconds; of the last save

    def bound(self, **things: Any) -> "ResumeFile":
        """Tie the file to more things that determine the run.

        Returns:
            The same file under a fingerprint of its own and of ``things``.
        """
        return ResumeFile(self.path, fingerprint(own=self.fingerprint, **things), self.every_s)

    def load(self) -> tuple[Saved | None, str]:
        """Read the state, if there is one and it is this run's; never fails on a bad file.

        Returns:
            The state (None: start anew), and a note for the user: why a file that is there was not used, or "".
        """
        self._sweep()
        if not self.path.exists():
            return None, ""
        try:
            meta, tensors = read_file(self.path, format=FORMAT, version=VERSION)
            if meta["fingerprint"] != self.fingerprint:
                return None, f"{self.path} is the state of another run; started anew"
            position = Position(**json.loads(meta["position"]))
            mask = None
            if meta["mask"] is not None:
                packed = {n.removeprefix(_MASK): t for n, t in tensors.items() if n.startswith(_MASK)}
                mask = Mask.unpack(packed, str(self.path), meta["mask"])
            return Saved(position, tensors, meta["optimizer"], mask), ""
        except (ArtifactError, OSError, KeyError, TypeError, ValueError) as error:
            return None, f"the saved state cannot be used, started anew ({error})"

    def due(self) -> bool:
        """Tell whether it is time to save."""
        if self.every_s == 0:
            return True
        return time.monotonic() - self._saved_at >= max(self.every_s, _SHARE * self._cost)

    def save(
        self,
        position: Position,
        model: nn.Module,
        values: Tensor,
        optimizer: Optimizer | None = None,
        more: Mapping[str, Tensor] | None = None,
        mask: Mask | None = None,
    ) -> None:
        """Write the state between two optimizer steps, atomically and durably.

        Args:
            position: where the run stands.
            model: its buffers are saved; the base weights are the caller's to rebuild, but for a changed mask.
            values: θ.
            optimizer: None for a run that is finished and needs its moments no more.
            more: further tensors by name.
            mask: the mask in force, where it is not (or was not always) that of the run's start; all weights are
                saved with it.

        Raises:
            StorageError: if the file cannot be written.
        """
        start = time.monotonic()
        tensors = {"theta": values.detach(), **buffers(model), **random_state(values.device)}
        tensors |= {f"more.{name}": tensor for name, tensor in (more or {}).items()}
        scalars: dict[str, Any] = {}
        if optimizer is not None:
            for i, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer.{i}.{key}"] = value
                    else:
                        scalars.setdefault(str(i), {})[key] = value
        if mask is not None:
            tensors |= weights(model, mask) | {_MASK + n: t for n, t in mask.pack(compact=False).items()}
        meta = {
            "fingerprint": self.fingerprint,
            "mask": None if mask is None else mask.info,
            "position": json.dumps(dataclasses.asdict(position)),  # as text: a metric may be NaN
            "optimizer": scalars,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path.parent}: cannot be created: {error.strerror}") from None
        write_file(self.path, format=FORMAT, version=VERSION, meta=meta, sections=tensors)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - start

    def clear(self) -> None:
        """Remove the file: call it when the run's outputs are written."""
        self.path.unlink(missing_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what a kill during a save left beside the file."""
        if self.path.parent.is_dir():
            for entry in os.scandir(self.path.parent):
                if entry.name.startswith(f".{self.path.name[:200]}.") and entry.name.endswith(".tmp"):
                    Path(entry.path).unlink(missing_ok=True)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Collect the model's buffers (BatchNorm's statistics and counters, ...).

    Returns:
        ``buffer.<name>`` -> the buffer itself.
    """
    return {f"buffer.{name}": buffer for name, buffer in unwrapped(model).named_buffers()}


def weights(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Collect the parameters that a mask speaks of.

    Returns:
        ``weight.<name>`` -> the parameter itself, detached.
    """
    have = dict(unwrapped(model).named_parameters())
    return {f"weight.{name}": have[name].detach() for name in mask.index}


def _signature(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}
