"""Predictor: rows in, answers out, by any of several deltas over one base that is loaded once."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.errors import ParamsError
from pipeline.losses import outputs_of
from pipeline.serving.answers import class_answers, number_answers, spread
from pipeline.serving.interface import Asked, Interface, read_delta
from pipeline.serving.questions import Texts
from pipeline.serving.shared import SharedBase
from pipeline.tasks.batches import by_length
from pipeline.tasks.draws import Rows
from pipeline.tasks.saved import ModelSource
from pipeline.tasks.text import TextSplit, Tokenizer
from pipeline.training.device import choose_device

Progress = Callable[[int, int], None]


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
        text: the columns to read, where a delta does not say.
        max_length: tokens to which texts are cut, in place of what a delta says.
        device: as ``choose_device`` takes it.
        precision: likewise.
        batch_size: rows that go through the model together.

    Attributes:
        names: of the deltas.
        active: the one in use.
        device: where it computes, and why.

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
        device: str = "auto",
        precision: str = "auto",
        batch_size: int = 64,
    ) -> None:
        named = {"delta": deltas} if isinstance(deltas, (str, Path)) else dict(deltas)
        if not named:
            raise ParamsError("no delta to ask; name one or more")
        if batch_size < 1:
            raise ParamsError(f"batch size {batch_size}: expected 1 or more")
        self._batch_size = batch_size
        self._asked: dict[str, Asked] = {}
        for name, path in named.items():
            asked = read_delta(Path(path).expanduser(), base)
            base = base or asked.interface.base
            known = asked.interface
            interface = replace(known, text=list(text or known.text), max_length=max_length or known.max_length)
            self._asked[name] = replace(asked, interface=interface)
        self.names = list(named)
        self.device = choose_device(device, precision)
        self._base = SharedBase(str(base), {n: a.delta for n, a in self._asked.items()}, self.device.device)
        self._tokenizers: dict[int | None, Tokenizer] = {}
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

    def answer(
        self,
        rows: pa.Table | Mapping[str, Sequence[object]],
        *,
        by: str | None = None,
        where: str = "the rows",
        progress: Progress | None = None,
    ) -> Answers:
        """Answer every row, in order.

        Args:
            rows: a table, or its columns; columns that the delta does not read are ignored.
            by: the delta to use, from now on.
            where: the file, for messages.
            progress: called with rows done and rows in all.

        Returns:
            The answers.
        """
        table = rows if isinstance(rows, pa.Table) else pa.table(dict(rows))
        with self._lock:
            texts, outputs, cut = self.outputs(table, by=by, where=where, progress=progress)
            classes = self.asked.interface.classes
        found = class_answers(outputs, classes) if classes else number_answers(outputs)
        return Answers(spread(found, texts.rows, table.num_rows), texts.missing, cut)

    def outputs(
        self, table: pa.Table, *, by: str | None = None, where: str = "the rows", progress: Progress | None = None
    ) -> tuple[Texts, np.ndarray, int]:
        """Run the complete rows of a table through the model.

        Returns:
            The complete rows; the model's outputs for them, float32 [N, C]; and how many texts were cut.
        """  # noqa: DOC201
        with self._lock:
            self.use(by or self.active)
            interface = self.asked.interface
            texts = Texts.of(table, columns_to_read(interface, table, where), where)
            if not len(texts.rows):
                return texts, np.empty((0, len(interface.classes or ["value"])), dtype=np.float32), 0
            tokenizer = self._tokenizer(interface)
            split = TextSplit(pa.table(tokenizer.columns(texts.columns)), None, tokenizer.settings["pad"])
            model = self._base.use(self.active).eval()
            outputs = self._run(model, split, texts.rows, progress)
        return texts, outputs, int((split.lengths >= tokenizer.settings["max_length"]).sum())

    def _run(self, model: nn.Module, split: TextSplit, rows: Rows, progress: Progress | None) -> np.ndarray:
        places = np.arange(len(rows), dtype=np.int64)
        groups = by_length(places, self._batch_size, split.lengths)
        device, autocast = self.device.device, self.device.autocast
        parts: list[Tensor] = []
        done = 0
        for group in groups:
            with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                parts.append(outputs_of(model, split.batch(group, device)).float().cpu())
            done += len(group)
            if progress is not None:
                progress(done, len(rows))
        order = torch.from_numpy(np.concatenate(groups))
        return torch.cat(parts)[order.argsort()].numpy()

    def _tokenizer(self, interface: Interface) -> Tokenizer:
        length = interface.max_length
        if length not in self._tokenizers:
            source = ModelSource(interface.base, interface.revision, length)
            self._tokenizers[length] = Tokenizer(source)
        return self._tokenizers[length]


def columns_to_read(interface: Interface, table: pa.Table, where: str) -> list[str]:
    """Name the columns of a table that a delta reads.

    Returns:
        Those that the interface names; where it names none, ``text``, or the only column of texts.

    Raises:
        ParamsError: if none can be told.
    """
    from pipeline.tasks.columns import is_text

    if interface.text:
        return interface.text
    texts = [name for name in table.column_names if is_text(table.schema.field(name).type)]
    if "text" in texts or len(texts) == 1:
        return ["text"] if "text" in texts else texts
    raise ParamsError(
        f"{where}: cannot tell which column the model reads (text columns: {', '.join(texts) or 'none'}); add "
        "--text COLUMN, twice for pairs"
    )
