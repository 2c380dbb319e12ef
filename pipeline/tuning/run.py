"""One run of `fishmask tune`: rates, epochs, each method trained and judged, the folder written.

All that is unfinished lies in a folder of its own beside the output. Killed at any moment and resumed, a run ends
with the same bytes: what is settled is kept, and ``fit`` goes on from its saved state.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.deltas.base import Base
from pipeline.deltas.delta import Delta
from pipeline.errors import DivergedError
from pipeline.files import write_json
from pipeline.masks.mask import Mask
from pipeline.runtime.workspace import VERSION, code_digest
from pipeline.tasks.base import Task
from pipeline.tasks.fitting import EVALUATION, fit_task
from pipeline.tasks.scoring import scores_for
from pipeline.tracking import Run, Tracker
from pipeline.training.device import Device, choose_device
from pipeline.training.fingerprint import fingerprint
from pipeline.training.memory import in_pieces_that_fit
from pipeline.training.methods import mask_for
from pipeline.training.recipe import Recipe
from pipeline.training.resume import ResumeFile
from pipeline.tuning.budget import fit_epochs
from pipeline.tuning.features import HeadTask, head_task
from pipeline.tuning.manifest import DELTA
from pipeline.tuning.plan import Plan
from pipeline.tuning.rates import search
from pipeline.tuning.recorded import recorded

EXPERIMENT = "fishmask-tune"
_FEW = 128  # examples scored for a search of rates, where the mask need not be the final one


@dataclass
class Trainer:
    """A plan at work.

    Attributes:
        plan: what to do; replaced as rates and epochs are settled.
        task: its data and base model.
        folder: of the unfinished run.
        device: where.
        say: shows a sentence.
    """

    plan: Plan
    task: Task
    folder: Path
    device: Device
    say: Callable[[str], None]

    @classmethod
    def open(cls, plan: Plan, folder: Path, say: Callable[[str], None]) -> "Trainer":
        """Open the data that was fetched into the folder."""
        torch.set_num_threads(plan.threads)
        device = choose_device(plan.device, plan.precision)
        task = Task.load(folder / "fetched", plan.task.model, plan.task.metric)
        return cls(plan, task, folder, device, say)

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.plan.options.seed

    @property
    def _settings(self) -> dict[str, Any]:
        """What decides a run beside its data, rates and recipe."""
        return self.plan.task.model_dump(exclude={"data"})

    def recipe(self, method: str) -> Recipe:
        """How a method is trained."""
        settings = self.plan.task.train.model_dump(exclude={"batch_size"})
        return Recipe(lr=self.plan.lr.get(method, 1.0), seed=self.seed, **settings)

    def task_of(self, method: str) -> Task:
        """The task that a method is trained on: the head's on features, where its network allows that."""
        return self._head_task or self.task if method == "head" else self.task

    @cached_property
    def _head_task(self) -> HeadTask | None:
        names, size = self.plan.task.head, EVALUATION * self.plan.task.train.batch_size
        found, _ = in_pieces_that_fit(
            lambda most: head_task(self.task, self.seed, names, most, self.device), size, "batches", self.say
        )
        return found

    def run(self, track: bool) -> dict[str, Any]:
        """Settle, train and judge.

        Args:
            track: log to MLflow.

        Returns:
            method -> its result: scores of each epoch, seconds, trained values, and fish's delta.
        """
        plan = self.plan
        key = fingerprint(plan=plan.asked, data=self.task.data_digest, code=code_digest())
        tags = {"task": plan.name, "data_digest": self.task.data_digest, "model": plan.task.model.source}
        settings = {k: v for k, v in plan.asked.items() if v not in (None, [])} | {"rows": self.task.sizes}
        with Tracker.open(EXPERIMENT, enabled=track).cell(
            "tune", plan.name, params=settings, tags=tags, fingerprint=key
        ) as run:
            self._settle()
            results = {method: self._method(method, run) for method in self.plan.methods}
            if not self.plan.task.head:  # a language model answers before it is tuned
                results = {"base": self._untuned()} | results
            metric = plan.task.metric
            run.log(
                {f"{metric}.{m}": r["epochs"][-1][metric] for m, r in results.items() if r.get("epochs")}, step=0
            )
            run.table(
                [{"method": m} | entry for m, r in results.items() for entry in r.get("epochs", [])], "epochs"
            )
        return results

    def mask(self, method: str, model: nn.Module, split: str = "train", examples: int | None = None) -> Mask:
        """Choose what a method trains of the base, by all the examples that are scored or by fewer."""
        settings = self.plan.task
        scores = scores_for(
            method, self.task, model, examples=examples or settings.score.examples[-1], seed=self.seed,
            split=split, head=settings.head, say=self.say, **settings.score.how(),
        )  # fmt: skip
        mask = mask_for(
            method, model, density=settings.density, head=settings.head, seed=self.seed, ranking=scores
        )
        mask.info |= {"task": self.plan.name, "seed": self.seed, "fishmask": VERSION}
        return mask

    def _rough_mask(self, method: str) -> Mask:
        """What a search trains: chosen on the ``fit`` part of train, by few examples."""
        model = self.task_of(method).model(self.seed).to(self.device.device)
        return self.mask(method, model, "fit", _FEW)

    def _settle(self) -> None:
        """Find the rates, then the epochs that a budget leaves; kept in the plan."""
        if self.plan.settled:
            return
        begun, plan = time.monotonic(), self.plan
        batch, rates = plan.task.train.batch_size, dict(plan.lr)
        for method in plan.methods:
            if method not in rates:
                choose = partial(self._rough_mask, method)
                rates[method], tried = search(
                    self.task_of(method), method, choose, self.recipe(method), batch, self.device, self.folder
                )
                losses = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(tried.items()))
                self.say(
                    f"learning rate of {method}: {rates[method]:g}"
                    + (f" (loss by rate {losses})" if losses else " (the usual one: too few rows to search)")
                )
        self.plan = plan.model_copy(update={"lr": rates})
        budget = plan.options.seconds()
        if budget is not None:
            self._fit_budget(budget - (time.monotonic() - begun))
        self.plan = self.plan.model_copy(update={"settled": True})
        self.plan.save(self.folder)

    def _fit_budget(self, left: float) -> None:
        fitting = fit_epochs(self, left)
        self.plan = self.plan.with_training(epochs=fitting.epochs)
        self.say(fitting.said)

    def _method(self, method: str, run: Run) -> dict[str, Any]:
        """Train one method, unless that is done; fish leaves its delta."""
        folder = self.folder / method
        done: dict[str, Any] | None = recorded(folder / "result.json", None)
        if done is not None:
            return done
        task = self.task_of(method)
        model = task.model(self.seed).to(self.device.device)
        mask = self.chosen(method, model)
        with run.child(method, params={"lr": self.plan.lr[method]}, fingerprint=mask.digest) as child:
            result = self._trained(method, task, model, mask, folder, child)
        write_json(folder / "result.json", result)
        return result

    def _untuned(self) -> dict[str, Any]:
        """Judge the base as it is."""
        file = self.folder / "base.json"
        done: dict[str, Any] | None = recorded(file, None)
        if done is None:
            model = self.task.model(self.seed).to(self.device.device)
            size = EVALUATION * self.plan.task.train.batch_size
            scores, _ = in_pieces_that_fit(
                lambda most: self.task.evaluate(model, self.task.reported, most, autocast=self.device.autocast),
                size, "evaluation batches", self.say,
            )  # fmt: skip
            done = {"epochs": [scores]}
            write_json(file, done)
        return done

    def chosen(self, method: str, model: nn.Module) -> Mask:
        """The mask of a method, kept so that nothing is scored twice."""
        file = self.folder / method / "mask.safetensors"
        file.parent.mkdir(exist_ok=True)
        if file.is_file():
            return Mask.load(file)
        mask = self.mask(method, model)
        mask.save(file)
        return mask

    def _trained(
        self, method: str, task: Task, model: nn.Module, mask: Mask, folder: Path, run: Run
    ) -> dict[str, Any]:
        recipe = self.recipe(method)
        outcome: dict[str, Any] = {"values": mask.nnz, "parameters": mask.index.total, "lr": recipe.lr}
        key = fingerprint(data=self.task.data_digest, code=code_digest(), method=method, task=self._settings)
        base = Base.of(model, mask) if method == "fish" else None
        try:
            result = fit_task(
                task, model, mask, recipe, self.plan.task.train.batch_size, self.device, name=method,
                resume=ResumeFile(folder / "state.safetensors", key), log=run.log,
            )  # fmt: skip
        except DivergedError as error:
            if method == "fish":
                raise
            return outcome | {"diverged": str(error)}
        if result.note:
            self.say(result.note)
        seconds = result.seconds + (task.seconds if isinstance(task, HeadTask) else 0.0)
        outcome |= {"epochs": result.history, "seconds": round(seconds, 3)}
        if base is not None:
            tokens = self.task.manifest.get("tokenizer")
            info = self.task.model_info | ({"pad": tokens["pad"]} if tokens else {}) | {
                "task": self.plan.name, "method": method, "setting": "main", "seed": self.seed,
                "data": self.task.data_digest, "fishmask": VERSION, "mask": mask.info,
            }  # fmt: skip
            delta = Delta.of(model, mask, base=base, info=info)
            outcome |= {
                "bytes": delta.save(folder / DELTA, base=base),
                "digest": delta.digest,
                "base": base.digest,
            }
        run.log({"seconds": result.seconds, "peak_mib": result.peak_memory_bytes / 2**20}, step=result.steps)
        return outcome
