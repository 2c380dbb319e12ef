"""The head alone, trained on the features of a network that stands still: computed once, not at every step.

What is frozen gives a row the same features h(x) in every epoch, in eval mode: no dropout, BatchNorm on running
statistics. The head g is trained on them as on any input, g(h(x)), with the run's recipe and order of rows. A step
costs next to nothing, so that its rate is searched with whole runs, and fish is compared with a head at its best.
"""

import copy
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.losses import outputs_of, targets_of, to_device
from pipeline.parameters import ParameterIndex
from pipeline.runtime.progress import ProgressLine
from pipeline.tasks.base import Task
from pipeline.tasks.draws import Rows
from pipeline.training.device import Device

MOST_BYTES = 1 << 30
"""Of the features of one split; where they take more, the head is trained like any other method."""


class FeatureSplit:
    """The features of one split.

    Attributes:
        lengths: [N], tokens of each row's text, which decide the order of batches; None for images.
    """

    def __init__(self, values: Tensor, targets: Tensor, lengths: Rows | None) -> None:
        self._values, self._targets = values, targets
        self.lengths = lengths

    def batch(self, rows: Rows, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Take some rows.

        Returns:
            Features [B, ...] and targets [B].
        """
        chosen = torch.from_numpy(rows)
        return self._values[chosen].to(device), self._targets[chosen].to(device)


class Head(nn.Module):
    """The head by itself, its parameters named as in the whole network."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        self._path = path
        *outer, last = path.split(".")
        place: nn.Module = self
        for name in outer:
            place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.add_module(last, module)

    def forward(self, features: Tensor) -> Any:
        """Compute the outputs [B, C] from features [B, ...]."""
        return self.get_submodule(self._path)(features)


class HeadTask(Task):
    """A task as its head sees it: the splits are features, the model is the head as the seed drew it.

    Attributes:
        seconds: that the features took.
    """

    def __init__(self, task: Task, head: Head, splits: dict[str, FeatureSplit], seconds: float) -> None:
        super().__init__(task._folder, task.manifest, task._model, task.metric)
        self._groups, self._head = task._groups, head
        self._features, self.seconds = splits, seconds

    def model(self, seed: int) -> nn.Module:
        """Copy the head; it was drawn with the run's seed.

        Returns:
            The head, in eval mode.
        """
        return copy.deepcopy(self._head).eval()

    def _split(self, split: str) -> Any:
        return self._features[split if split in self._features else "train"]


def head_task(task: Task, seed: int, names: list[str], size: int, device: Device) -> HeadTask | None:
    """Compute the features of train and of the reported split.

    Args:
        task: the data and the base.
        seed: of the head.
        names: the head's module names.
        size: rows that go through the network together.
        device: where, and in which precision.

    Returns:
        The task of the head; None where the head is not one module that takes one tensor of one shape and whose
        output is the network's (a decoder's is applied to every token), or the features take too much memory.
    """
    begun = time.monotonic()
    model = task.model(seed).to(device.device).eval()
    path = _path(model, names)
    if path is None:
        return None
    splits = {}
    for split in ("train", task.reported):
        found = _features(task, model, model.get_submodule(path), split, size, device)
        if found is None:
            return None
        splits[split] = found
    return HeadTask(task, Head(path, model.get_submodule(path)), splits, time.monotonic() - begun)


def _path(model: nn.Module, names: list[str]) -> str | None:
    """The module that holds the head and nothing else."""
    parts = [name.split(".") for name in names]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    path, index = ".".join(common), ParameterIndex.of(model)
    return path if path and set(index.within([path])) == set(index.within(names)) else None


def _features(
    task: Task, model: nn.Module, module: nn.Module, split: str, size: int, device: Device
) -> FeatureSplit | None:
    """What the module is given for each row of a split; None where it is no head as ``head_task`` wants it."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    handle = module.register_forward_hook(
        lambda _, given, named, made: seen.append((given, named, made)), with_kwargs=True
    )
    batches, where = task.ordered(split, size, device.device), device.device
    values: list[Tensor] = []
    targets: list[Tensor] = []
    try:
        with ProgressLine(f"head: features of {split}") as line, torch.no_grad():
            for number, batch in enumerate(batches, 1):
                seen.clear()
                with torch.autocast(where.type, dtype=device.autocast, enabled=device.autocast is not None):
                    made = outputs_of(model, to_device(batch, where))
                features = _only_input(seen, made)
                if features is None or (values and features.shape[1:] != values[0].shape[1:]):
                    return None
                if features[0].nbytes * len(batches.rows) > MOST_BYTES:
                    return None
                values.append(features)
                targets.append(targets_of(batch))
                line.update(number, len(batches))
    finally:
        handle.remove()
    back = torch.from_numpy(np.argsort(batches.rows))
    return FeatureSplit(torch.cat(values)[back], torch.cat(targets)[back], task._split(split).lengths)


def _only_input(seen: list[tuple[tuple[Any, ...], dict[str, Any], Any]], made: Tensor) -> Tensor | None:
    """The one tensor that was given to a module whose output is the network's."""
    if len(seen) != 1:
        return None
    given, named, output = seen[0]
    alone = len(given) == 1 and not named and isinstance(given[0], Tensor) and isinstance(output, Tensor)
    return given[0] if alone and output.shape == made.shape and torch.equal(output, made) else None
