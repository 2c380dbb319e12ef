"""A run whose every epoch is a step of a chain: masks chosen anew, checkpoints counted, restored and judged again.

The paper's Table 4. Each epoch's step holds what the epoch's mask touched; it is read back from its files into
another model, compared with the trained one bit for bit, and scored. So the numbers are those of the checkpoints.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.deltas import chain_base
from pipeline.deltas.chain import Chain
from pipeline.deltas.steps import PARTS
from pipeline.deltas.target import same_bits
from pipeline.errors import ArtifactError
from pipeline.masks.mask import Mask
from pipeline.schema import ScoreParams
from pipeline.tasks.base import Task
from pipeline.tasks.fitting import EVALUATION
from pipeline.tasks.scoring import scores_for
from pipeline.training.device import Device
from pipeline.training.methods import mask_for, method_named


@dataclass(frozen=True)
class Masks:
    """How masks are chosen, at the start of a run and again after some of its epochs.

    Attributes:
        task: the data to score on.
        method: a method's name.
        density: chosen / all.
        head: the head's modules.
        score: how coordinates are scored, for methods that are.
        seed: of the run. Each later mask has examples, or a draw, of its own.
        device: where to score.
        split: the examples come from it.
    """

    task: Task
    method: str
    density: float
    head: Sequence[str]
    score: ScoreParams
    seed: int
    device: Device
    split: str = "train"

    def choose(self, model: nn.Module, epoch: int) -> Mask:
        """Choose the mask of an epoch.

        Args:
            model: as it is before that epoch, on the device.
            epoch: from 0; the mask of epoch 0 is the one of the mask stage, at the last count of examples.

        Returns:
            The mask.
        """
        seed, score = _drawn(self.seed, epoch), self.score.variant(method_named(self.method).variant)
        scores = scores_for(
            self.method, self.task, model, examples=score.examples[-1], seed=seed, split=self.split,
            head=self.head, **score.how(fresh=epoch == 0),
        )  # fmt: skip
        mask = mask_for(self.method, model, density=self.density, head=self.head, seed=seed, ranking=scores)
        mask.info |= {"task": self.task.name, "data": self.task.data_digest, "epoch": epoch}
        return mask


def _drawn(seed: int, epoch: int) -> int:
    """The seed of an epoch's mask: the run's own for the first, independent ones for the others."""
    return seed if epoch == 0 else int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint32)[0])


class Checkpoints:
    """What a run does after each epoch, as ``after_epoch`` of ``fit``: a proven checkpoint, perhaps a new mask.

    Args:
        folder: the chain's; one of an earlier life of the run is gone on with.
        info: the chain's provenance.
        masks: how masks are chosen.
        first: the run's first mask.
        every: epochs between two masks; None keeps the first, and then the frozen values are watched too.
        judged: the split that checkpoints are scored on.
        batch_size: of training.

    Attributes:
        chain: the checkpoints so far.
    """

    def __init__(
        self,
        folder: Path,
        info: Mapping[str, Any],
        masks: Masks,
        first: Mask,
        every: int | None,
        judged: str,
        batch_size: int,
    ) -> None:
        self._folder, self._info, self._masks, self._every = folder, info, masks, every
        self._judged, self._batch_size = judged, EVALUATION * batch_size
        self._model = masks.task.model(masks.seed)  # what checkpoints are restored into
        self._frozen = _frozen_values(self._model, first) if every is None else None
        self._first = first
        base = folder / chain_base.FILE
        self.chain = Chain.open(folder) if base.is_file() else self._begin()
        self._model.to(masks.device.device)

    def __call__(self, entry: Mapping[str, float], model: nn.Module, mask: Mask) -> Mask | None:
        """Take, restore, compare and score the checkpoint of an epoch.

        Args:
            entry: the epoch's entry of the history.
            model: the trained model.
            mask: all that may have changed in the epoch.

        Returns:
            The mask from the next epoch on, where it is to change.

        Raises:
            ArtifactError: if what was restored is not what was trained, or scores otherwise.
        """
        epoch = int(entry["epoch"])
        if epoch > len(self.chain) or not self._holds(epoch, model):  # a killed life may have taken it already
            self._rewind(epoch)
            about = {k: v for k, v in entry.items() if v == v} | self._drift(model)
            self.chain.append(model, mask, info=about)
            if not self._holds(epoch, model):
                raise ArtifactError(
                    f"{self._folder}: step {epoch} does not restore to what was trained; report this"
                )
        metric, where = self._masks.task.metric, self._masks.device
        again = self._masks.task.evaluate(
            self._model, self._judged, self._batch_size, where.device, where.autocast
        )[metric]
        if where.device.type == "cpu" and again != entry[metric] and again == again:
            raise ArtifactError(
                f"{self._folder}: step {epoch} scores {again}, the trained model {entry[metric]}; report this"
            )
        if self._every is None or epoch % self._every:
            return None
        return self._masks.choose(model, epoch)

    def rows(self) -> list[dict[str, Any]]:
        """Describe the checkpoints: the entries of the history, with ``bytes`` by part."""
        return [{**step.info, "bytes": {part: step.nbytes[part] for part in PARTS}} for step in self.chain.steps]

    def summary(self) -> dict[str, Any]:
        """What the whole chain weighs.

        Returns:
            ``checkpoints`` (how many, each restored bit for bit), ``checkpoint_bytes`` (of all of them together),
            ``base_bytes`` (the base's file) and ``dense_bytes`` (one state's parameters and buffers).
        """
        steps = self.chain.steps
        return {
            "checkpoints": len(steps),
            "checkpoint_bytes": sum(sum(step.nbytes.values()) for step in steps),
            "base_bytes": self.chain.nbytes - sum(sum(step.nbytes.values()) for step in steps),
            "dense_bytes": self.chain.state_nbytes,
            "state_digest": steps[-1].state,
        }

    def _begin(self) -> Chain:
        shutil.rmtree(self._folder, ignore_errors=True)
        return Chain.create(self._folder, self._masks.task.model(self._masks.seed), info=self._info)

    def _rewind(self, epoch: int) -> None:
        """Drop the steps from an epoch on, which a killed life took and this one has to take anew."""
        if len(self.chain) >= epoch > 1:
            self.chain.prune(range(1, epoch))
        elif len(self.chain) >= epoch:
            self.chain = self._begin()

    def _holds(self, epoch: int, model: nn.Module) -> bool:
        """Restore a step, and compare every parameter and buffer with the model's."""
        self.chain.restore_(self._model, epoch)
        mine, theirs = self._model.state_dict(), model.state_dict()
        return mine.keys() == theirs.keys() and all(same_bits(mine[name], theirs[name]) for name in mine)

    def _drift(self, model: nn.Module) -> dict[str, float]:
        """Tell what became of the values outside the first mask: how many changed, and ‖now‖ / ‖base‖."""
        if self._frozen is None:
            return {}
        now = _frozen_values(model, self._first)
        changed = sum(int((now[name] != base).sum()) for name, base in self._frozen.items())
        lengths = [
            float(sum(t.double().square().sum() for t in values.values())) for values in (now, self._frozen)
        ]
        return {"frozen_changed": changed, "frozen_norm": (lengths[0] / lengths[1]) ** 0.5 if lengths[1] else 1.0}


def _frozen_values(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Copy the values outside a mask, tensor by tensor, to the CPU."""
    parameters = dict(model.named_parameters())
    frozen = {}
    for name in mask.index:
        if not mask.whole(name):
            keep = torch.ones(mask.index.numel(name), dtype=torch.bool)
            keep[mask.indices[name]] = False
            frozen[name] = parameters[name].detach().cpu().reshape(-1)[keep]
    return frozen
