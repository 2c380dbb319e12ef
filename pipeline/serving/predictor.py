"""Predictor: rows in, answers out, by any of several deltas over one base that is loaded once."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.errors import ParamsError
from pipeline.losses import Batch, outputs_of
from pipeline.serving.answers import PREDICTION, class_answers, number_answers, spread
from pipeline.serving.asked import Asked, read_delta
from pipeline.serving.completing import Completer
from pipeline.serving.questions import Pictures, Texts, columns_to_read
from pipeline.serving.shared import SharedBase
from pipeline.tasks.batches import by_length
from pipeline.tasks.draws import Rows
from pipeline.tasks.raw import RawSplit
from pipeline.tasks.saved import ModelSource
from pipeline.tasks.text import TextSplit, Tokenizer
from pipeline.training.device import choose_device

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Outputs:
    """What a model makes of the complete rows of a table.

    Attributes:
        values: float32 [N, C]: logits, or numbers.
        rows: places of the N rows in the table, ascending.
        missing: column -> rows that lack a value there, where there are any.
        cut: texts that were cut to the model's length.
    """

    values: np.ndarray
    rows: Rows
    missing: dict[str, int]
    cut: int = 0


@dataclass(frozen=True)
class Answers:
    """The answers to a table of rows.

    Attributes:
        columns: name -> [N], as ``answers`` makes them; null in rows that lack a value.
        missing: column -> rows that lack a value there, where there are any.
        cut: texts that were cut to the model's length.
    """

    columns: dict[str, pa.Array]
    missing: dict[str, int]
    cut: int


class Predictor:
    """A base and the deltas over it, ready to answer.

    The base is loaded and verified once; the deltas are switched in place, bit for bit, in milliseconds
    (``SharedBase``). Calls from several threads wait for each other.

        predictor = Predictor({"reviews": "tuned/reviews", "topics": "tuned/topics"})
        predictor.use("reviews").answer({"text": ["A lovely film."]}).columns["prediction"]

    Args:
        deltas: name -> delta file, tuned folder or published folder; or one such path, named ``delta``.
        base: the base's source; None takes the one that the first delta names.
        text: the columns to read, where a delta does not say, or others than it says.
        max_length: tokens to which texts are cut, in place of what a delta says.
        max_new_tokens: of a completion; see ``Completer``.
        device: as ``choose_device`` takes it.
        precision: likewise.
        batch_size: rows that go through the model together.

    Attributes:
        names: of the deltas.
        active: the one in use.
        device: where it computes, and why.
        batch_size: likewise.

    Raises:
        MismatchError: if the base is not that of every delta.
        ParamsError: if there is no delta, or something that is needed is said nowhere.
    """  # noqa: DOC502 - the first is raised by what it calls

    def __init__(
        self,
        deltas: Mapping[str, Path | str] | Path | str,
        base: str | None = None,
        *,
        text: Sequence[str] | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        device: str = "auto",
        precision: str = "auto",
        batch_size: int = 64,
    ) -> None:
        named = {"delta": deltas} if isinstance(deltas, (str, Path)) else dict(deltas)
        if not named:
            raise ParamsError("no delta to ask; name one or more")
        if batch_size < 1:
            raise ParamsError(f"batch size {batch_size}: expected 1 or more")
        self._asked: dict[str, Asked] = {}
        for name, path in named.items():
            asked = read_delta(Path(path).expanduser(), base)
            base = base or asked.interface.base
            known = asked.interface
            interface = replace(known, text=list(text or known.text), max_length=max_length or known.max_length)
            self._asked[name] = replace(asked, interface=interface)
        self.names = list(named)
        self.batch_size = batch_size
        self.device = choose_device(device, precision)
        self._base = SharedBase(str(base), {n: a.delta for n, a in self._asked.items()}, self.device.device)
        self._new_tokens = max_new_tokens
        self._tokenizers: dict[int | None, Tokenizer] = {}
        self._completers: dict[int | None, Completer] = {}
        self._lock = threading.RLock()
        self.active = self.names[0]

    @property
    def asked(self) -> Asked:
        """The delta in use, and how it is asked."""
        return self._asked[self.active]

    def use(self, name: str) -> "Predictor":
        """Answer by another delta from now on.

        Returns:
            This predictor.

        Raises:
            ParamsError: if there is no such delta.
        """
        if name not in self._asked:
            raise ParamsError(f"there is no delta '{name}'; there are: {', '.join(self.names)}")
        with self._lock:
            self.active = name
        return self

    def model(self) -> nn.Module:
        """The base with the delta in use, in eval mode; it changes when another one is used.

        Returns:
            The network.
        """
        with self._lock:
            return self._base.use(self.active).eval()

    def answer(
        self,
        rows: RawSplit | pa.Table | Mapping[str, Sequence[object]],
        *,
        by: str | None = None,
        progress: Progress | None = None,
    ) -> Answers:
        """Answer every row, in order.

        Args:
            rows: a table, or its columns; columns that the delta does not read are ignored. Images are encoded
                files (bytes) in any column.
            by: the delta to use, from now on.
            progress: called with rows done and rows in all.

        Returns:
            The answers. A DataError if a column is missing, or holds something else.
        """
        split = _split(rows)
        with self._lock:
            interface = self.use(by or self.active).asked.interface
            if interface.kind == "causal":
                return self._completed(split, progress)
            found = self.outputs(split, progress=progress)
        make = (
            class_answers(found.values, interface.classes) if interface.classes else number_answers(found.values)
        )
        return Answers(spread(make, found.rows, split.table.num_rows), found.missing, found.cut)

    def outputs(
        self,
        rows: RawSplit | pa.Table | Mapping[str, Sequence[object]],
        *,
        by: str | None = None,
        progress: Progress | None = None,
    ) -> Outputs:
        """Run the complete rows of a table through the model of a classifier or a regression.

        Args:
            rows: as in ``answer``.
            by: likewise.
            progress: likewise.

        Returns:
            The model's outputs.
        """
        split = _split(rows)
        with self._lock:
            interface = self.use(by or self.active).asked.interface
            width = len(interface.classes or ["value"])
            if interface.image is not None:
                return self._seen(Pictures(split, interface.image, self.batch_size), width, progress)
            texts = Texts.of(split, columns_to_read(interface.text, split))
            if not len(texts.rows):
                return Outputs(np.empty((0, width), dtype=np.float32), texts.rows, texts.missing)
            tokenizer = self.tokenizer()
            tokens = TextSplit(pa.table(tokenizer.columns(texts.columns)), None, tokenizer.settings["pad"])
            groups = by_length(np.arange(len(texts.rows), dtype=np.int64), self.batch_size, tokens.lengths)
            parts = self._run(_batches(tokens, groups, self.device.device), len(texts.rows), progress)
            values = torch.cat(parts)[torch.from_numpy(np.concatenate(groups)).argsort()].numpy()
            return Outputs(values, texts.rows, texts.missing, tokenizer.count_cut(texts.columns))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the delta in use, loaded once.

        Returns:
            As its ``max_length`` has it.
        """
        interface = self.asked.interface
        length = interface.max_length
        if length not in self._tokenizers:
            self._tokenizers[length] = Tokenizer(ModelSource(interface.base, interface.revision, length))
        return self._tokenizers[length]

    def _run(self, batches: Iterator[tuple[Batch, int]], total: int, progress: Progress | None) -> list[Tensor]:
        model, device, autocast = self.model(), self.device.device, self.device.autocast
        parts: list[Tensor] = []
        for batch, done in batches:
            with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                parts.append(outputs_of(model, batch).float().cpu())
            if progress is not None:
                progress(done, total)
        return parts

    def _seen(self, pictures: Pictures, width: int, progress: Progress | None) -> Outputs:
        total, column = pictures.split.table.num_rows, pictures.column
        batches: Iterator[tuple[Batch, int]] = (((x, None), at) for x, at in pictures.batches(self.device.device))
        parts = self._run(batches, total, progress)
        values = torch.cat(parts).numpy() if parts else np.empty((0, width), dtype=np.float32)
        rows = np.array(pictures.rows, dtype=np.int64)
        return Outputs(values, rows, {column: total - len(rows)} if len(rows) < total else {})

    def _completed(self, split: RawSplit, progress: Progress | None) -> Answers:
        interface = self.asked.interface
        texts = Texts.of(split, columns_to_read(interface.text, split))
        length = interface.max_length
        if length not in self._completers:
            source = ModelSource(interface.base, interface.revision, length)
            self._completers[length] = Completer(source, self._new_tokens)
        found, cut = self._completers[length].complete(
            self.model(), texts.columns[0].to_pylist(), self.batch_size, self.device.autocast, progress
        )
        answers = spread({PREDICTION: pa.array(found, pa.string())}, texts.rows, split.table.num_rows)
        return Answers(answers, texts.missing, cut)


def _batches(tokens: TextSplit, groups: Sequence[Rows], device: torch.device) -> Iterator[tuple[Batch, int]]:
    done = 0
    for group in groups:
        done += len(group)
        yield tokens.batch(group, device), done


def _split(rows: RawSplit | pa.Table | Mapping[str, Sequence[object]]) -> RawSplit:
    if isinstance(rows, RawSplit):
        return rows
    return RawSplit(rows if isinstance(rows, pa.Table) else pa.table(dict(rows)), "the rows")
