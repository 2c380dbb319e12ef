"""Texts: tokenised once when fetched, padded batch by batch when read.

Shape legend: B examples, T tokens of the longest one in the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import ParamsError
from pipeline.losses import IGNORED, sent
from pipeline.tasks.draws import Rows
from pipeline.tasks.models import load_tokenizer, model_config
from pipeline.tasks.settings import ModelSettings
from pipeline.tasks.store import values_of

FIELDS = ("input_ids", "token_type_ids")
_UNLIMITED = 1_000_000  # transformers says "no limit" with 1e30
_DEFAULT_LENGTH = 512


class Tokenizer:
    """Texts to token ids, special tokens included, cut to the model's length.

    Attributes:
        settings: what decides its output: the model's source and revision, ``max_length`` in tokens, ``pad``.
    """

    def __init__(self, model: ModelSettings) -> None:
        """Load the model's tokenizer.

        Raises:
            ParamsError: if ``max_length`` is more than it allows.
        """
        self._tokenizer = load_tokenizer(model)
        limit = min(int(self._tokenizer.model_max_length), _UNLIMITED)
        if model.max_length and model.max_length > limit:
            raise ParamsError(
                f"model.max_length: {model.max_length} tokens; '{model.source}' takes at most {limit}"
            )
        length = model.max_length or (limit if limit < _UNLIMITED else _DEFAULT_LENGTH)
        self.settings: dict[str, Any] = {
            "source": model.source,
            "revision": model.revision,
            "max_length": length,
            "pad": int(self._tokenizer.pad_token_id),
        }

    def columns(self, texts: Sequence[pa.Array]) -> dict[str, pa.Array]:
        """Tokenise one split.

        Args:
            texts: one or two string arrays of equal length; of a pair, the longer text is cut first.

        Returns:
            ``input_ids`` (list of int32) and, where the tokenizer has them, ``token_type_ids`` (list of int8). A
            blank text to which the tokenizer adds nothing (GPT-2's) is one padding token: models need one.
        """
        encoded = self._tokenizer(
            *(column.to_pylist() for column in texts),
            truncation=True,
            max_length=self.settings["max_length"],
            padding=False,
            return_attention_mask=False,
        )
        kinds = {"input_ids": pa.list_(pa.int32()), "token_type_ids": pa.list_(pa.int8())}
        blank = {"input_ids": [self.settings["pad"]], "token_type_ids": [0]}
        return {
            name: pa.array([ids or blank[name] for ids in encoded[name]], kinds[name])
            for name in FIELDS
            if name in encoded
        }

    def completions(self, prompts: pa.Array, completions: pa.Array) -> dict[str, pa.Array]:
        """Tokenise prompts, each followed by its completion and the end-of-text token.

        Both are tokenised by themselves and joined as they stand. What is too long loses the start of its prompt
        (but for special tokens there), and only then the end of its completion.

        Args:
            prompts: string array.
            completions: likewise, of equal length.

        Returns:
            ``input_ids`` (list of int32), and ``start`` (int32), the position of the completion's first token.
        """
        limit, end = self.settings["max_length"], self._tokenizer.eos_token_id
        plain = {"return_attention_mask": False, "verbose": False}
        before = self._tokenizer(prompts.to_pylist(), **plain)["input_ids"]
        after = self._tokenizer(completions.to_pylist(), add_special_tokens=False, **plain)["input_ids"]
        special = set(self._tokenizer.all_special_ids)
        rows, starts = [], []
        for prompt, completion in zip(before, after, strict=True):
            if not prompt:  # the first token of a text cannot be predicted
                prompt = [self._tokenizer.bos_token_id if self._tokenizer.bos_token_id is not None else end]
            opening = prompt[:1] if prompt[0] in special else []
            completion = [*completion, *([] if end is None else [end])][: limit - max(1, len(opening))]
            room = limit - len(completion)
            if len(prompt) > room:
                prompt = opening + prompt[len(prompt) - (room - len(opening)) :]
            rows.append([*prompt, *completion])
            starts.append(len(prompt))
        return {"input_ids": pa.array(rows, pa.list_(pa.int32())), "start": pa.array(starts, pa.int32())}

    def count_cut(self, texts: Sequence[pa.Array]) -> int:
        """Count the examples that are longer than the model's length.

        Args:
            texts: as in ``columns``.

        Returns:
            How many.
        """
        rows = zip(*(column.to_pylist() for column in texts), strict=True)
        # A token is a character at least, so that most examples need no counting.
        long = [row for row in rows if sum(map(len, row)) > self.settings["max_length"] // 2]
        if not long:
            return 0
        whole = self._tokenizer(
            *map(list, zip(*long, strict=True)), truncation=False, return_attention_mask=False, verbose=False
        )
        return sum(len(ids) > self.settings["max_length"] for ids in whole["input_ids"])


def longest_text(model: ModelSettings) -> int:
    """Find the most tokens that both a model and its tokenizer take, 512 where neither says.

    Returns:
        Tokens, special ones included.
    """
    limit = int(Tokenizer(model).settings["max_length"])
    positions = model_config(model).get("max_position_embeddings")
    return min(limit, positions) if isinstance(positions, int) and positions > 0 else limit


class TextSplit:
    """The token ids of one fetched split, ready to be cut into padded batches.

    Attributes:
        lengths: [N], tokens of each example.
        largest_id: the largest token id.
        largest_kind: the largest of the token type ids; 0 where there are none.
    """

    def __init__(self, table: pa.Table, labels: Tensor | None, pad: int) -> None:
        """Take the columns of a fetched table.

        Args:
            table: with ``input_ids``, perhaps ``token_type_ids``.
            labels: [N] int64 or float32; None for an unlabelled split.
            pad: the id that fills the end of shorter examples.
        """
        self._labels = labels
        self._pad = pad
        self._values: dict[str, np.ndarray] = {}
        for name in FIELDS:
            if name in table.column_names:
                column = table.column(name).combine_chunks()
                self._values[name] = values_of(column.values)
                self._offsets = values_of(column.offsets).astype(np.int64)
        self.lengths: Rows = np.diff(self._offsets)
        self._starts: Rows | None = None
        if "start" in table.column_names:
            self._starts = values_of(table.column("start").combine_chunks()).astype(np.int64)
        self.largest_id = int(self._values["input_ids"].max(initial=0))
        self.largest_kind = int(self._values["token_type_ids"].max(initial=0)) if len(self._values) > 1 else 0

    def batch(self, rows: Rows, device: torch.device | None = None) -> Mapping[str, Tensor]:
        """Pad some examples to the longest of them.

        Returns:
            ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``, int64 [B, T]; ``labels`` [B] where
            the split has them, [B, T] of completions, ``IGNORED`` outside them.
        """
        lengths = self.lengths[rows]
        filled_BT = np.arange(lengths.max(initial=0))[None, :] < lengths[:, None]
        batch: dict[str, Tensor] = {}
        for name, values in self._values.items():
            ids_BT = np.full(filled_BT.shape, self._pad if name == "input_ids" else 0, dtype=np.int64)
            ids_BT[filled_BT] = np.concatenate([values[self._offsets[r] : self._offsets[r + 1]] for r in rows])
            batch[name] = torch.from_numpy(ids_BT)
        batch["attention_mask"] = torch.from_numpy(filled_BT.astype(np.int64))
        if self._starts is not None:
            asked_BT = filled_BT & (np.arange(filled_BT.shape[1])[None, :] >= self._starts[rows][:, None])
            batch["labels"] = batch["input_ids"].masked_fill(~torch.from_numpy(asked_BT), IGNORED)
        elif self._labels is not None:
            batch["labels"] = self._labels[torch.from_numpy(rows)]
        return {name: sent(value, device) for name, value in batch.items()} if device else batch
