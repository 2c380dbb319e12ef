"""One table, and how its entries are written: numbers, bytes, scores; csv, markdown and terminal are views of it.

What was not measured is "–".
"""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.reports.cells import Cell
from pipeline.reports.chains import ChainCell
from pipeline.reports.shares import ShareCell

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MISSING = "–"
_PAIRS = {"accuracy_f1": "mean of accuracy and F1", "pearson_spearman": "mean of Pearson and Spearman"}
_HUNDREDTHS = ("accuracy", "f1", "matthews", "mcc", "pearson", "spearman", *_PAIRS)


@dataclass(frozen=True)
class Entry:
    """One formatted entry."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: the stem of its files.
        title: its caption.
        columns: the headings.
        rows: the entries, formatted.
        records: the same rows as plain values, more digits and more columns: the csv.
        notes: what a reader must know: seeds, spread, data, and how bold is meant.
        words: how many leading columns are words (aligned left) rather than numbers.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    records: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    words: int = 2

    def csv(self) -> str:
        """The records as csv: raw numbers, empty where nothing was measured."""
        text = io.StringIO()
        columns = list(dict.fromkeys(column for record in self.records for column in record))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return text.getvalue()

    def markdown(self) -> str:
        """The entries as a GitHub table under the caption, the notes below."""

        def line(texts: Iterable[str]) -> str:
            return f"| {' | '.join(texts)} |"

        rule = [":--" if i < self.words else "--:" for i in range(len(self.columns))]
        rows = [[f"**{_plain(e.text)}**" if e.bold else _plain(e.text) for e in row] for row in self.rows]
        lines = [
            f"**{_plain(self.title)}**",
            "",
            line(map(_plain, self.columns)),
            line(rule),
            *map(line, rows),
            "",
        ]
        return "\n".join([*lines, *(f"- {_plain(note)}" for note in self.notes)]) + "\n"

    def terminal(self) -> "RichTable":
        """The entries for a terminal, a rule between the groups of the first column."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        view = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
        view.title, view.caption = Text(self.title), Text("\n".join(self.notes))
        for i, column in enumerate(self.columns):
            view.add_column(Text(column), justify="left" if i < self.words else "right", no_wrap=True)
        for row, after in zip(self.rows, [*self.rows[1:], None], strict=True):
            texts = [Text(entry.text, style="bold" if entry.bold else "") for entry in row]
            view.add_row(*texts, end_section=after is not None and after[0].text != row[0].text)
        return view


def _plain(text: str) -> str:
    """Text that markdown shows as it is."""
    for character in "\\`*_|<":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def metric_title(metric: str) -> str:
    """``accuracy, %``, ``mcc × 100``, or the metric's own name and unit."""
    name = _PAIRS.get(metric, metric)
    return "accuracy, %" if metric == "accuracy" else f"{name} × 100" if metric in _HUNDREDTHS else name


def score_text(cell: Cell | ChainCell | ShareCell | None) -> str:
    """``90.5 ± 0.4``: mean and sample standard deviation in ``metric_title``'s unit; no ± for a single seed."""
    if cell is None or cell.mean is None:
        return MISSING
    scale = scale_of(cell.metric)
    digits = ".1f" if scale == 100 else ".4g"
    return f"{cell.mean * scale:{digits}}" + ("" if cell.spread is None else f" ± {cell.spread * scale:{digits}}")


def signed(value: float) -> str:
    """``+2.50`` or ``−2.50`` (two decimals, a true minus)."""
    return f"{value:+.2f}".replace("-", "−")


def p_text(value: float) -> str:
    """A p value to three digits, never 0."""
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


def percent(value: float) -> str:
    """``0.5 %`` of a fraction."""
    return f"{100 * value:.3g} %"


def size(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"


def scale_of(metric: str) -> int:
    """What a raw score is multiplied by to be shown."""
    return 100 if metric in _HUNDREDTHS else 1
