"""Task: the data of a fetched folder, the base model to train on it, and the metrics to judge it by.

Reading needs torch, numpy and pyarrow only; ``Task.model`` imports transformers where the model is one of its.
"""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import DataError, ModelError, ParamsError
from pipeline.losses import Batch
from pipeline.tasks import cifar, metrics
from pipeline.tasks.batches import Batches, by_length, cut, shuffled
from pipeline.tasks.draws import Rows, permutation, split_by_group
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.image import ImageSplit, pixel_array
from pipeline.tasks.models import load_model
from pipeline.tasks.settings import ModelSettings
from pipeline.tasks.store import read_manifest, read_split, values_of
from pipeline.tasks.text import TextSplit

TUNE = 0.2  # of train, held out to choose learning rates on
_FETCH = "run `fishmask fetch` again"


class Task:
    """A fetched data set, a base model, a metric.

    Splits are those fetched (``train``, ``validation``, ``test``), and two parts of train: ``tune`` (a fifth,
    whole groups) to choose learning rates on, and ``fit`` (the rest) to train on meanwhile.

    Attributes:
        name: of the task.
        kind: ``text``, ``image`` or ``causal``.
        classes: their names; None for regression and completions.
        metric: how it is scored.
        data_digest: of everything in the data that reaches a model.
        model_source: where the base model comes from.
        reported: the split whose scores are reported: validation, or test where that is the only labelled one.
        manifest: all that fetch recorded.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], model: ModelSettings, metric: str) -> None:
        """Use ``Task.load``, which checks its arguments."""
        self._folder = folder
        self._model = model
        self.manifest = manifest
        self.metric = metric
        self.name: str = manifest["task"]
        self.kind: str = manifest["kind"]
        self.classes: list[str] | None = manifest["classes"]
        self.data_digest: str = manifest["data_digest"]
        self.model_source = model.source
        self.reported = "validation" if "validation" in manifest["splits"] else "test"
        self._splits: dict[str, TextSplit | ImageSplit] = {}
        self._groups: Rows | None = None
        self._parts: dict[str, Rows] = {}
        self._tried = False  # whether an image went through the network

    @classmethod
    def load(cls, folder: Path | str, model: ModelSettings, metric: str) -> "Task":
        """Open a fetched folder; its splits are read, and their digests checked, when first used.

        Args:
            folder: what ``fetch`` wrote.
            model: the base model; for text, the one the data was tokenised for.
            metric: one of ``metrics.METRICS``.

        Returns:
            The task.

        Raises:
            DataError: if the folder is none of fetch's, or was fetched for another model.
            ParamsError: if the metric is unknown or does not fit the labels.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        labels = "decimal numbers" if manifest["classes"] is None else f"{len(manifest['classes'])} classes"
        objective = "regression" if manifest["classes"] is None else "classification"
        if manifest["kind"] == "causal":
            labels, objective = "completions", "completion"
        if metrics.objective_of(metric) != objective:
            fitting = metrics.OBJECTIVES[objective]
            raise ParamsError(
                f"tasks.{manifest['task']}.metric: '{metric}' does not fit labels that are {labels}; "
                f"expected one of {', '.join(fitting)}"
            )
        for key, held in manifest.get("tokenizer", {}).items():
            wanted = getattr(model, key, None)
            if key != "pad" and wanted != held and not (key == "max_length" and wanted is None):
                raise DataError(
                    f"{folder}: tokenised for model.{key} {held}, not {wanted} as params.yaml has it now; {_FETCH}"
                )
        return cls(folder, manifest, model, metric)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each fetched split."""
        return {name: split["rows"] for name, split in self.manifest["splits"].items()}

    def summary(self) -> dict[str, Any]:
        """What a table must say of the data: source, digest, sizes, remarks, classes, the reported split.

        Returns:
            Plain values for JSON.
        """
        splits = self.manifest["splits"]
        remarks = {name: split["remark"] for name, split in splits.items() if split["remark"]}
        if "remark" in self.manifest.get("image", {}):
            remarks["images"] = self.manifest["image"]["remark"]
        return {
            "source": self.manifest["source"],
            "revision": self.manifest["revision"],
            "digest": self.data_digest,
            "rows": self.sizes,
            "remarks": remarks,
            "reported": self.reported,
            "classes": len(self.classes) if self.classes else None,
            "metric": self.metric,
        }

    @property
    def model_info(self) -> dict[str, Any]:
        """What ``pipeline.tasks.saved.load_model`` needs, beside a seed, to load the base model without data."""
        image = self.manifest.get("image")
        return {
            "model": self.model_source,
            "revision": self._model.revision,
            "kind": self.kind,
            "outputs": len(self.classes) if self.classes else int(self.kind != "causal"),
            "classes": self.classes,
            "channels": image["shape"][0] if image else None,
        }

    def model(self, seed: int) -> nn.Module:
        """Load the base model with a fresh head drawn with the seed (see ``pipeline.tasks.models.load_model``).

        Returns:
            The model in fp32 and eval mode, on the CPU; a ModelError if it is not to be had, or does not fit the
            data.
        """
        info = self.model_info
        model = load_model(
            self._model, kind=self.kind, outputs=info["outputs"], seed=seed, classes=self.classes,
            channels=info["channels"] or 3,
        )  # fmt: skip
        self._check_fit(model)
        if self.kind == "causal":
            config: Any = model.config
            config.use_cache = False  # it serves generation only, and holds memory in training
        return model

    def _check_fit(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        if config is None:
            self._check_takes_images(model)
            return
        if self.kind != "image":
            split = self._split("train")
            assert isinstance(split, TextSplit)
            ids, longest = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
            kinds = getattr(config, "type_vocab_size", None)
            for name, module in model.named_modules():
                if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
                    # RoBERTa counts positions from beyond its padding id
                    longest = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            if ids is not None and split.largest_id >= ids:
                raise ModelError(
                    f"model.source: '{self.model_source}' knows {ids} token ids; its tokenizer "
                    f"gave {split.largest_id}"
                )
            if kinds and split.largest_kind >= kinds:  # DeBERTa-v3 has none, and leaves them unread
                raise ModelError(
                    f"model.source: '{self.model_source}' knows {kinds} kinds of tokens (type_vocab_size); its "
                    f"tokenizer gave kind {split.largest_kind}, as BERT's does for pairs"
                )
            if longest is not None and split.lengths.max() > longest:
                raise ModelError(
                    f"model.max_length: texts of {split.lengths.max()} tokens; '{self.model_source}' "
                    f"takes {longest}"
                )
            if config.pad_token_id is None:
                config.pad_token_id = self.manifest["tokenizer"]["pad"]
            return
        shape = self.manifest["image"]["shape"]
        size = getattr(config, "image_size", None)
        wanted = [getattr(config, "num_channels", shape[0])] + (
            [size, size] if isinstance(size, int) else shape[1:]
        )
        if wanted != shape:
            raise ModelError(f"model.source: '{self.model_source}' takes images {wanted}; the data's are {shape}")

    def _check_takes_images(self, model: nn.Module) -> None:
        """Show a network that says nothing of its sizes one black image, once."""
        if self.kind != "image" or self._tried:
            return
        shape = self.manifest["image"]["shape"]
        try:
            with torch.no_grad():
                model(torch.zeros(1, *shape))
        except (RuntimeError, ValueError, AssertionError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"model.source: '{self.model_source}' does not take the data's images {shape}: {why}"
            ) from None
        self._tried = True

    def rows(self, split: str) -> Rows:
        """The rows of a split: of its own file, or of train for ``fit`` and ``tune``.

        Returns:
            int64, ascending.

        Raises:
            DataError: if there is no such split.
        """
        if split in ("fit", "tune"):
            return self._tuning["fit tune".split().index(split)]
        if split in self._parts:
            return self._parts[split]
        if split not in self.sizes:
            raise DataError(f"{self._folder}: no split '{split}'; expected {', '.join(self.sizes)}, fit or tune")
        return np.arange(self.sizes[split], dtype=np.int64)

    def name_part(self, name: str, rows: Rows) -> None:
        """Give some rows of train a name, to train or evaluate on them as on a split."""
        self._parts[name] = rows

    @cached_property
    def _tuning(self) -> tuple[Rows, Rows]:
        self._split("train")
        groups = np.arange(self.sizes["train"], dtype=np.int64) if self._groups is None else self._groups
        return split_by_group(groups, TUNE, 0)

    def batches(
        self, split: str, batch_size: int, *, seed: int | None = None, epoch: int = 0,
        device: torch.device | None = None, among: Rows | None = None,
    ) -> Batches:  # fmt: skip
        """Cut a split into batches.

        With a seed: one training epoch, every row once in an order that (seed, epoch) decides, texts of similar
        length together, images augmented where the data set is trained so. Without: the rows in order.

        Args:
            split: its name.
            batch_size: B; the last batch of an order may be smaller.
            seed: of the order and the augmentation.
            epoch: from 0.
            device: where to make the batches; images are kept and augmented there.
            among: only these rows of the split.

        Returns:
            The batches, each made when asked for: text a mapping of int64 ``input_ids``, ``attention_mask``,
            perhaps ``token_type_ids`` [B, T] and ``labels`` [B]; images (float32 [B, C, H, W], targets [B]).
        """
        data, rows = self._split(split), self.rows(split) if among is None else among
        if seed is None:
            return Batches(cut(rows, batch_size), lambda _, group: data.batch(group, device))
        groups = shuffled(rows, batch_size, data.lengths, seed, epoch)
        if isinstance(data, ImageSplit) and self.manifest["image"]["augment"] == cifar.AUGMENT:
            return Batches(groups, partial(_augmented, data, device, seed, epoch))
        return Batches(groups, lambda _, group: data.batch(group, device))

    def examples(
        self, count: int, batch_size: int, *, seed: int, skip: int = 0, split: str = "train",
        device: torch.device | None = None,
    ) -> Batches:  # fmt: skip
        """Draw examples for scoring: never augmented, a fixed choice that the seed decides.

        A draw of n holds the draw of any m < n: ``examples(n, ..., skip=m)`` is the rest. Within a draw texts of
        similar length stand together, since scores do not depend on the order. Where the split
        has fewer than ``count`` examples, all of them are drawn (``.examples`` says how many).

        Args:
            count: examples to draw.
            batch_size: B.
            seed: of the draw.
            skip: leave out so many from the start of the draw.
            split: what to draw from.
            device: where to make the batches.

        Returns:
            The batches.
        """
        data, rows = self._split(split), self.rows(split)
        drawn = rows[permutation(len(rows), seed, 3)][skip:count]
        return Batches(by_length(drawn, batch_size, data.lengths), lambda _, group: data.batch(group, device))

    def evaluate(
        self, model: nn.Module, split: str, batch_size: int,
        device: torch.device | str | None = None, autocast: torch.dtype | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Score a model on a split, in eval mode and without gradients.

        Args:
            model: on the device; left in the mode it was in.
            split: its name.
            batch_size: B; metrics do not depend on it.
            device: where the model is; None finds out.
            autocast: dtype of ``torch.autocast``, if any.

        Returns:
            ``self.metric`` first, what is usually shown beside it, and ``loss``, the mean over examples.

        Raises:
            DataError: if the split is missing or unlabelled.
        """
        self.rows(split)
        if not self.manifest["splits"].get(split, {"labelled": True})["labelled"]:
            raise DataError(f"{self._folder}: split '{split}' has no labels to score against; use {self.reported}")
        where = torch.device(device) if device is not None else next(model.parameters()).device
        return evaluate(model, self.ordered(split, batch_size, where), self.metric, where, autocast)

    def ordered(self, split: str, batch_size: int, device: torch.device | None = None) -> Batches:
        """Cut a split into batches with the least padding, the longest texts first; labels are not needed.

        Args:
            split: its name.
            batch_size: B.
            device: where to make the batches.

        Returns:
            The batches; ``rows`` says which row each example is.
        """
        data = self._split(split)
        groups = by_length(self.rows(split), batch_size, data.lengths)
        return Batches(groups, lambda _, group: data.batch(group, device))

    def _split(self, split: str) -> TextSplit | ImageSplit:
        file = "train" if split in ("fit", "tune") or split in self._parts else split
        if file not in self._splits:
            self.rows(file)
            table = read_split(self._folder, file, self.manifest["splits"][file])
            labels = None
            if "label" in table.column_names:
                labels = torch.from_numpy(values_of(table.column("label").combine_chunks()).copy())
            if file == "train" and "group" in table.column_names:
                self._groups = values_of(table.column("group").combine_chunks())
            if self.kind != "image":
                self._splits[file] = TextSplit(table, labels, self.manifest["tokenizer"]["pad"])
            else:
                image = self.manifest["image"]
                pixels = pixel_array(table.column("pixels").combine_chunks(), tuple(image["shape"]))
                self._splits[file] = ImageSplit(pixels, labels, image["mean"], image["std"])
        return self._splits[file]


def _augmented(
    data: ImageSplit, device: torch.device | None, seed: int, epoch: int, position: int, rows: Rows
) -> Batch:
    """One augmented batch: its draws depend on (seed, epoch, position), so that a resumed epoch goes on alike."""
    drawn = int(np.random.SeedSequence((seed, epoch, position)).generate_state(1, np.uint64)[0] >> 1)
    return data.batch(rows, device, partial(cifar.augment, seed=drawn))
